"""Names of metrics: which are results by themselves, and how their values are formatted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

FRACTIONS = {"abstained", "accuracy", "certified", "fraction", "rate", "sparsity", "verified"}
"""A metric with one of these words in its name (without the evaluator) is shown in percent."""

DIAGNOSTICS = {
    "zero_gradient": "gave no gradient; its accuracy may be overestimated, try another attack",
    "errors": "made the verifier fail; they count as not verified but may be robust",
    "timeouts": "ran out of time; they count as not verified but may be robust",
}
"""Metric that counts images -> what is wrong with those images.

These limit how far other metrics can be trusted: not columns of the table, but notes below it.
"""

FACTS = {"standard", "seed", "sigma", "eps", "alpha", "n0", "samples", "sequential"}
"""Numbers that say how a metric was measured; not columns of the table either."""


def split_metric(metric: str) -> tuple[str, str]:
    """(evaluator, what it measured); the evaluator is empty for facts about the network itself.

    >>> split_metric("certify.certified@0.25")
    ('certify', 'certified@0.25')
    """
    # A dot before a digit is a decimal point.
    *owner, measure = re.split(r"\.(?!\d)", metric)
    return ".".join(owner), measure


def is_part(metric: str) -> bool:
    """Whether it belongs to another metric: an end of its interval, or its number of images."""
    return metric.endswith(("_low", "_high")) or split_metric(metric)[1] == "n"


def is_diagnosis(metric: str) -> bool:
    """Whether a metric counts images that limit how far other metrics can be trusted."""
    return split_metric(metric)[1] in DIAGNOSTICS


def is_main(metric: str) -> bool:
    """Whether a metric is a result by itself, not the interval, n or diagnosis of another.

    >>> [is_main(name) for name in ("pgd.accuracy", "pgd.accuracy_low", "pgd.n")]
    [True, False, False]
    """
    return not is_part(metric) and split_metric(metric)[1] not in DIAGNOSTICS.keys() | FACTS


def is_fraction(metric: str) -> bool:
    """Whether the metric is a fraction by its name, and shown in percent.

    >>> [is_fraction(name) for name in ("certify.certified@0.25", "certify.acr")]
    [True, False]
    """
    return not FRACTIONS.isdisjoint(re.split(r"[^a-z]+", split_metric(metric)[1]))


def format_metric(metric: str, value: float, unit: str = "%") -> str:
    """The value as text: percent for fractions, four significant digits for others.

    >>> format_metric("pgd.accuracy", 0.714), format_metric("loss", 0.123456)
    ('71.4%', '0.1235')
    """
    if is_fraction(metric):
        # Sparsities are close to 1, where a tenth of a percent matters.
        return f"{100 * value:.{2 if metric.endswith('sparsity') else 1}f}{unit}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def format_setting(value: Any) -> str:
    """A value of a recipe as short text; a component with its options in parentheses.

    >>> format_setting(0.9), format_setting({"use": "snip", "batches": 2})
    ('0.9', 'snip(batches=2)')
    """
    if isinstance(value, Mapping):
        options = [f"{k}={format_setting(v)}" for k, v in value.items() if k != "use"]
        return str(value.get("use", "")) + (f"({', '.join(options)})" if options else "")
    if isinstance(value, list):
        return ", ".join(map(format_setting, value))
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)
