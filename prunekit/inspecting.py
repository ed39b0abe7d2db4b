"""What `prunekit check --deep` finds: the networks of a plan, built and counted."""

from __future__ import annotations

from typing import Any

from prunekit.contracts import Context
from prunekit.engine import build_network
from prunekit.masks import find_prunable, find_unprunable
from prunekit.options import describe
from prunekit.plan import Plan, Run


def inspect_networks(plan: Plan) -> list[dict[str, Any]]:
    """One entry for each network of the plan. Reads a data set only where nothing else tells.

    Raises `UserError` where a network cannot be built for its images, or cannot be pruned.
    """
    found: dict[str, dict[str, Any]] = {}
    for run in plan.runs:
        patterns = [s.options.exclude for s in run.stages if s.kind == "prune"]
        key = str([describe(run.dataset), describe(run.architecture), patterns])
        if key not in found:
            found[key] = _inspect(run)
    return list(found.values())


def find_shape(run: Run) -> tuple[tuple[int, int, int], int]:
    """Of an image, and the number of classes; the data is read only where nothing else tells."""
    facts = run.dataset.component.facts
    known = facts(run.dataset.options) if facts else run.dataset.build(Context(folder=run.folder))
    return known.shape, known.classes


def _inspect(run: Run) -> dict[str, Any]:
    shape, classes = find_shape(run)
    model = build_network(run, shape, classes)
    weights = find_prunable(model)
    dense: dict[str, None] = {}
    for stage in run.stages:
        if stage.kind == "prune":
            exclude = stage.options.exclude
            chosen = getattr(model, "leave_dense", ()) if exclude is None else exclude
            kept = find_prunable(model, chosen)
            dense |= dict.fromkeys(name for name in weights if name not in kept)
    named = describe(run.architecture)
    return {
        "architecture": " ".join(str(named[k]) for k in ("use", "model") if k in named),
        "parameters": sum(p.numel() for p in model.parameters()),
        "prunable": sum(weight.numel() for weight in weights.values()),
        "layers": len(weights),
        "dense": list(dense),
        "unprunable": [f"{name} ({layer})" for name, layer in find_unprunable(model).items()],
    }
