"""Rows as dictionaries, for comparisons."""


def as_dicts(rows):
    """All rows with all of their columns."""
    columns = [rows[name] for name in rows.column_names]
    return [
        dict(zip(rows.column_names, values, strict=True)) for values in zip(*columns, strict=True)
    ]
