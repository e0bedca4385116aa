"""Self-contained HTML pages about runs and comparisons, made only from their files.

Functions are imported on first use, since the plotting library takes half a second to load.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmomentum.report.comparison_page import write_comparison_page as write_comparison_page
    from fedmomentum.report.page import write_report as write_report


_MODULES = {"write_comparison_page": "comparison_page", "write_report": "page"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_MODULES)}"
        )
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
