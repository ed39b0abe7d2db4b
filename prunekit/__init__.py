"""prunekit prunes adversarially robust neural networks."""

import importlib
from typing import TYPE_CHECKING, Any

from prunekit.component import (
    API_VERSION,
    Component,
    Facts,
    NoOptions,
    Radius,
    Use,
    hookimpl,
    option,
)
from prunekit.errors import DataMissingError, OptionError, RunError, UserError

if TYPE_CHECKING:
    from prunekit.api import Judgement, RunResult, evaluate, load, make_masks, run, run_sweep
    from prunekit.masks import apply_masks

__all__ = [
    "API_VERSION",
    "Component",
    "DataMissingError",
    "Facts",
    "Judgement",
    "NoOptions",
    "OptionError",
    "Radius",
    "RunError",
    "RunResult",
    "Use",
    "UserError",
    "apply_masks",
    "evaluate",
    "hookimpl",
    "load",
    "make_masks",
    "option",
    "run",
    "run_sweep",
]
__version__ = "0.1.0"

_LATER = {"apply_masks": "prunekit.masks"} | dict.fromkeys(
    ("Judgement", "RunResult", "evaluate", "load", "make_masks", "run", "run_sweep"), "prunekit.api"
)
"""What is imported when it is first used: it needs torch."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
