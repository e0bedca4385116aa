"""Numbers as people read them."""

import math
import re

from fedmomentum.report.statistics import Mean

_NONE = "–"


def percent(share: float | None, digits: int = 1) -> str:
    """0.3861 as 38.6 %."""
    return _NONE if share is None else f"{100 * share:.{digits}f}\u00a0%"


def percent_range(interval: tuple[float, float]) -> str:
    """(0.342, 0.431) as 34.2 to 43.1 %."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}\u00a0%"


def points(change: float | None) -> str:
    """A difference of two shares in percentage points, signed with a real minus."""
    return _NONE if change is None else f"{100 * change:+.1f}".replace("-", "−")


def number(value: float | None, digits: int = 3) -> str:
    """A loss or another plain number."""
    if value is None:
        return _NONE
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def spread(value: Mean | None, factor: float = 1.0, digits: int = 3, unit: str = "") -> str:
    """A mean and its spread over seeds, 28.2 ± 0.6."""
    if value is None:
        return _NONE
    more = f" ± {factor * value.spread:.{digits}f}" if value.spread is not None else ""
    return f"{factor * value.mean:.{digits}f}{more}{unit}".replace("-", "−")


def interval(value: Mean | None, factor: float = 1.0, digits: int = 3) -> str:
    """A signed mean and its 95 % interval, +1.3 [−2.1, +4.7]."""
    if value is None:
        return _NONE
    ends = ""
    if value.low is not None and value.high is not None:
        ends = f" [{factor * value.low:+.{digits}f}, {factor * value.high:+.{digits}f}]"
    return f"{factor * value.mean:+.{digits}f}{ends}".replace("-", "−")


def count(value: int | None) -> str:
    """1234567 as 1,234,567."""
    return _NONE if value is None else f"{value:,}"


def human_bytes(num_bytes: float | None) -> str:
    """1234567 as 1.23 MB (decimal units)."""
    if num_bytes is None:
        return _NONE
    factor, unit = byte_unit(num_bytes)
    return f"{num_bytes / factor:.{0 if factor == 1 else 3}{'f' if factor == 1 else 'g'}}\u00a0{unit}"


def byte_unit(num_bytes: float) -> tuple[float, str]:
    """The decimal unit in which a number of bytes has at most three digits before the point."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= 0.9995 * factor:  # what would be shown as 1000 of a unit is shown as 1 of the next
            return factor, unit
    return 1.0, "B"


def human_seconds(seconds: float) -> str:
    """75.2 as 1 min 15 s."""
    if seconds < 60:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min {rest:02d}\u00a0s"
    return f"{minutes // 60}\u00a0h {minutes % 60:02d}\u00a0min"


def second_unit(seconds: float) -> tuple[float, str]:
    """The unit in which a time is plotted."""
    if seconds >= 7200:
        return 3600.0, "hours"
    return (60.0, "minutes") if seconds >= 300 else (1.0, "seconds")


def shorten(text: str, length: int) -> str:
    """One line of at most `length` characters, both ends kept."""
    text = re.sub(r"\s+", " ", text).strip() or "(no name)"
    if len(text) <= length:
        return text
    tail = (length - 1) // 3
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"
