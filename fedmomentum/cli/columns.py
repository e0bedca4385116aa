"""Columns of tables in the terminal, which has little room."""

from rich.table import Column


def name_column(title: str = "") -> Column:
    """Return a column of names, which are broken where there is no room, and never cut off."""
    return Column(title, overflow="fold", min_width=8)


def number_columns(*titles: str) -> list[Column]:
    """Return columns of numbers, which are not broken; their titles may be."""
    return [Column(title, no_wrap=True) for title in titles]
