"""Metrics and settings as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from prunekit.contracts import Metric

PERCENT = {"fraction": 1, "sparsity": 2}
"""Units that are shown in percent -> decimals: sparsities are close to 1, where they matter."""


def is_main(value: float) -> bool:
    """Whether a number is a result by itself, no diagnosis and no setting; plain numbers are."""
    return not isinstance(value, Metric) or value.kind == "result"


def is_fraction(value: float) -> bool:
    """Whether a number is a metric that is shown in percent.

    >>> is_fraction(Metric(0.5, unit="fraction")), is_fraction(0.5)
    (True, False)
    """
    return isinstance(value, Metric) and value.unit in PERCENT


def format_metric(value: float, unit: str = "%") -> str:
    """A number as text: percent for fractions, four significant digits for others.

    >>> format_metric(Metric(0.714, unit="fraction")), format_metric(0.123456)
    ('71.4%', '0.1235')
    """
    if isinstance(value, Metric) and value.unit in PERCENT:
        return f"{100 * value:.{PERCENT[value.unit]}f}{unit}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def format_setting(value: Any) -> str:
    """A value of a recipe as short text; a component with its options in parentheses.

    >>> format_setting(0.9), format_setting({"use": "snip", "batches": 2}), format_setting([])
    ('0.9', 'snip(batches=2)', 'none')
    """
    if isinstance(value, Mapping):
        options = [f"{k}={format_setting(v)}" for k, v in value.items() if k != "use"]
        return str(value.get("use", "")) + (f"({', '.join(options)})" if options else "")
    if isinstance(value, list):
        return ", ".join(map(format_setting, value)) or "none"
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)
