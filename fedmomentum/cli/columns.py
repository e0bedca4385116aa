"""Columns of tables in the terminal, which has little room."""

from rich.table import Column


def name_column(title: str = "", *, min_width: int = 8) -> Column:
    """Return a column of names, which are broken where there is no room, and never cut off."""
    return Column(title, overflow="fold", min_width=min_width)


def number_columns(*titles: str) -> list[Column]:
    """Return columns of numbers, which are not broken; their titles may be."""
    return [Column(title, no_wrap=True) for title in titles]
