"""Metrics in JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from prunekit.contracts import Metric, MetricKind

FIELDS: dict[str, Any] = {
    **dict.fromkeys(("value", "low", "high"), int | float),
    "n": int,
    **dict.fromkeys(("unit", "kind", "note"), str),
}
"""Key of a metric's table -> the type of its value."""
LARGEST = 1e100
"""The largest number that a metric may be: means and deviations of it can be computed."""


def write_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as plain data: each `Metric` as a table, whatever else as it is."""
    return {k: v.describe() if isinstance(v, Metric) else v for k, v in metrics.items()}


def read_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What `write_metrics` wrote. Raises `TypeError` for a table that is no metric."""
    return {
        name: _read_metric(name, **found)
        if isinstance(found, Mapping) and "value" in found
        else check_number(name, found)
        for name, found in metrics.items()
    }


def check_number(name: str, value: Any) -> Any:
    """The value. Raises `TypeError` for a number that nothing can be computed with."""
    if isinstance(value, int | float) and not abs(value) <= LARGEST:
        raise TypeError(f"{name} is {value:g}")
    return value


def _read_metric(name: str, value: Any, **told: Any) -> Metric:
    for key, found in {"value": value, **told}.items():
        if key not in FIELDS:
            raise TypeError(f"{name} has an unknown {key!r}")
        optional = found is None and key in ("n", "low", "high")
        if not optional and (not isinstance(found, FIELDS[key]) or isinstance(found, bool)):
            raise TypeError(f"{key} of {name} is {found!r}")
        check_number(name, found)
    if (told.get("n") or 0) < 0 or told.get("kind", "result") not in get_args(MetricKind):
        raise TypeError(f"{name} is no metric: {told!r}")
    return Metric(value, **told)


def split_metric(metric: str) -> tuple[str, str]:
    """(evaluator, what it measured); the evaluator is empty for facts about the network itself.

    >>> split_metric("certify.certified@0.25")
    ('certify', 'certified@0.25')
    """
    # A dot before a digit is a decimal point.
    *owner, measure = re.split(r"\.(?!\d)", metric)
    return ".".join(owner), measure
