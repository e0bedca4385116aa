"""From a run folder to a page that can be read anywhere. Reads files only.

The names below are imported when they are first used: the figures' library takes half a second, and most of what asks
this package for something wants no figure.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmomentum.report.cells import COMPARISON as COMPARISON
    from fedmomentum.report.comparison_page import write_comparison_page as write_comparison_page
    from fedmomentum.report.page import write_report as write_report
    from fedmomentum.report.participation import Absence as Absence
    from fedmomentum.report.participation import absences as absences
    from fedmomentum.report.run import Run as Run
    from fedmomentum.report.run import read_run as read_run
    from fedmomentum.report.summary import Measure as Measure
    from fedmomentum.report.summary import SummaryRow as SummaryRow
    from fedmomentum.report.summary import summarise as summarise
    from fedmomentum.report.summary import wilson_interval as wilson_interval

_HOMES = {
    "Absence": "participation",
    "COMPARISON": "cells",
    "Measure": "summary",
    "Run": "run",
    "SummaryRow": "summary",
    "absences": "participation",
    "read_run": "run",
    "summarise": "summary",
    "wilson_interval": "summary",
    "write_comparison_page": "comparison_page",
    "write_report": "page",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
