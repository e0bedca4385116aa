"""Numbers as text."""

import math
import re
import time

from fedmomentum.results.statistics import MeanEstimate

MISSING = "–"
BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
SECONDS_PLOTTED_AS_MINUTES = 300
SECONDS_PLOTTED_AS_HOURS = 7200


def percent(fraction: float | None, digits: int = 1) -> str:
    """Format 0.3861 as 38.6 %."""
    if fraction is None:
        return MISSING
    return f"{100 * fraction:.{digits}f}\u00a0%"


def target_percent(fraction: float) -> str:
    """Format a target that the user gave, with all of its digits: 0.725 as 72.5 %."""
    return f"{100 * fraction:.6g}\u00a0%"


def percent_range(interval: tuple[float, float]) -> str:
    """Format (0.342, 0.431) as 34.2 to 43.1 %."""
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f}\u00a0%"


def points(difference: float | None) -> str:
    """Format a difference of two fractions in percentage points, with its sign."""
    if difference is None:
        return MISSING
    return _signed(100 * difference, 1)


def number(value: float | None, digits: int = 3) -> str:
    """Format a loss or another plain number."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.{digits}f}"


def mean_and_spread(
    estimate: MeanEstimate | None,
    factor: float = 1.0,
    digits: int = 3,
    unit: str = "",
    num_seeds: int = 0,
) -> str:
    """Format a mean and its standard deviation over seeds as 28.2 ± 0.6.

    Args:
        estimate: The mean.
        factor: What it is multiplied by.
        digits: Digits after the point.
        unit: The unit, after a space.
        num_seeds: The number of seeds that were run; if fewer have a value, their number follows,
            as in 28.2 ± 0.6 (n = 2).
    """
    if estimate is None:
        return MISSING
    text = f"{factor * estimate.mean:.{digits}f}"
    if estimate.spread is not None:
        text += f" ± {factor * estimate.spread:.{digits}f}"
    return _with_minus(text + unit) + _count_note(estimate, num_seeds)


def mean_and_interval(
    estimate: MeanEstimate | None, factor: float = 1.0, digits: int = 3, num_seeds: int = 0
) -> str:
    """Format a signed mean and its 95 % interval as +1.3 [−2.1, +4.7].

    Args:
        estimate: The mean.
        factor: What it is multiplied by.
        digits: Digits after the point.
        num_seeds: See `mean_and_spread`.
    """
    if estimate is None:
        return MISSING
    text = _signed(factor * estimate.mean, digits)
    if estimate.low is not None and estimate.high is not None:
        low = _signed(factor * estimate.low, digits)
        high = _signed(factor * estimate.high, digits)
        text += f" [{low}, {high}]"
    return text + _count_note(estimate, num_seeds)


def _count_note(estimate: MeanEstimate, num_seeds: int) -> str:
    return f" (n = {estimate.count})" if estimate.count < num_seeds else ""


def count(value: int | None) -> str:
    """Format 1234567 as 1,234,567."""
    if value is None:
        return MISSING
    return f"{value:,}"


def human_bytes(num_bytes: float | None) -> str:
    """Format 1234567 as 1.23 MB, in decimal units."""
    if num_bytes is None:
        return MISSING
    factor, unit = byte_unit(num_bytes)
    if unit == "B":
        return f"{num_bytes:.0f}\u00a0B"
    return f"{num_bytes / factor:.3g}\u00a0{unit}"


def byte_unit(num_bytes: float) -> tuple[float, str]:
    """Return the decimal unit in which a size has at most three digits before the point."""
    for factor, unit in BYTE_UNITS:
        # A size that would round to 1000 of one unit is written as 1 of the next.
        if num_bytes >= 0.9995 * factor:
            return factor, unit
    return 1.0, "B"


def human_seconds(seconds: float) -> str:
    """Format 75.2 as 1 min 15 s."""
    if seconds < 59.95:  # above, it would round to 60.0 s
        return f"{seconds:.1f}\u00a0s"
    minutes, remainder = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min {remainder:02d}\u00a0s"
    return f"{minutes // 60}\u00a0h {minutes % 60:02d}\u00a0min"


def clock(timestamp: float) -> str:
    """Format seconds since 1970 as the time of day, 14:03:59."""
    return time.strftime("%H:%M:%S", time.localtime(timestamp))


def time_left(until: float, now: float) -> str:
    """Format the time until a deadline as 42.0 s left, or late by 5.0 s; both since 1970."""
    if until >= now:
        return f"{human_seconds(until - now)} left"
    return f"late by {human_seconds(now - until)}"


def second_unit(seconds: float) -> tuple[float, str]:
    """Return the unit in which a duration is plotted."""
    if seconds >= SECONDS_PLOTTED_AS_HOURS:
        return 3600.0, "hours"
    if seconds >= SECONDS_PLOTTED_AS_MINUTES:
        return 60.0, "minutes"
    return 1.0, "seconds"


def shorten(text: str, length: int) -> str:
    """Return text on one line of at most `length` characters, keeping both ends."""
    line = re.sub(r"\s+", " ", text).strip() or "(no name)"
    if len(line) <= length:
        return line
    tail_length = (length - 1) // 3
    head = line[: length - 1 - tail_length]
    return f"{head}…{line[-tail_length:]}"


def with_interval(fraction: float, bounds: tuple[float, float]) -> str:
    """Return a fraction and its interval in percent, such as `38.6 [34.2, 43.1]`."""
    low, high = bounds
    return f"{100 * fraction:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _signed(value: float, digits: int) -> str:
    """Return a number with its sign; none if it rounds to zero."""
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        return text[1:]
    return _with_minus(text)


def _with_minus(text: str) -> str:
    """Return a formatted number with a typographic minus instead of a hyphen."""
    return text.replace("-", "−")
