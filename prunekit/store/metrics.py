"""Metrics in JSON, and those of old runs, whose names said what they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prunekit.contracts import Metric

FRACTIONS = {"abstained", "accuracy", "certified", "fraction", "rate", "verified"}
DIAGNOSES = {
    "zero_gradient": "gave no gradient; its accuracy may be overestimated, try another attack",
    "errors": "made the verifier fail; they count as not verified but may be robust",
    "timeouts": "ran out of time; they count as not verified but may be robust",
}
SETTINGS = {"standard", "seed", "sigma", "eps", "alpha", "n0", "samples", "sequential"}
STANDARD = "not its standard attacks and budgets in all rows; compare only like rows"


def write_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as plain data: each `Metric` as a table, whatever else as it is."""
    return {k: v.describe() if isinstance(v, Metric) else v for k, v in metrics.items()}


def read_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What `write_metrics` wrote. Raises `TypeError` for a table that is no metric."""
    return {
        name: Metric(found["value"], **{k: v for k, v in found.items() if k != "value"})
        if isinstance(found, Mapping) and "value" in found
        else found
        for name, found in metrics.items()
    }


def split_metric(metric: str) -> tuple[str, str]:
    """(evaluator, what it measured); the evaluator is empty for facts about the network itself.

    >>> split_metric("certify.certified@0.25")
    ('certify', 'certified@0.25')
    """
    # A dot before a digit is a decimal point.
    *owner, measure = re.split(r"\.(?!\d)", metric)
    return ".".join(owner), measure


def read_old_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of a run of format 1: plain numbers, and the ends of intervals beside them."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        owner, measure = split_metric(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or measure == "epoch":
            found[name] = value
        elif not (name.endswith(("_low", "_high")) or measure == "n"):
            images = metrics.get(f"{owner}.n") if owner else metrics.get("n")
            low, high = (metrics.get(f"{name}_{end}") for end in ("low", "high"))
            found[name] = Metric(value, n=images, low=low, high=high, **_tell(measure))
    return found


def _tell(measure: str) -> dict[str, Any]:
    if measure in DIAGNOSES:
        return {"kind": "diagnosis", "note": DIAGNOSES[measure]}
    if measure in SETTINGS:
        return {"kind": "setting", "note": STANDARD if measure == "standard" else ""}
    if measure == "sparsity":
        return {"unit": "sparsity"}
    return {} if FRACTIONS.isdisjoint(re.split(r"[^a-z]+", measure)) else {"unit": "fraction"}
