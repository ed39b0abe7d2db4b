"""The same stages, tiny: what `--smoke` runs, and the rehearsal before a long run."""

from __future__ import annotations

import dataclasses
from typing import Any

from prunekit.catalog.component import Use
from prunekit.recipe.plan import Plan, Run

SMOKE_BATCHES, SMOKE_BATCH_SIZE = 2, 8
"""Batches of each stage of a smoke run, and images in each of them."""


def reduce_plan(plan: Plan) -> Plan:
    """The smoke plan: one run for each distinct component, tiny batches, short attacks."""
    runs: list[Run] = []
    seen: set[tuple[str, str]] = set()
    for run in plan.runs:
        parts = {(use.kind, use.component.name) for use in run.uses()}
        if parts - seen:
            seen |= parts
            small = dataclasses.replace(run, dataset=reduce_options(run.dataset))
            runs.append(reduce_run(small, SMOKE_BATCHES, SMOKE_BATCH_SIZE))
    return dataclasses.replace(plan, runs=tuple(runs), smoke=True)


def reduce_run(run: Run, batches: int, batch_size: int | None = None) -> Run:
    """One epoch of `batches` batches a stage, and options cut to what `option(smoke=)` says."""
    size = min(run.data.batch_size, batch_size or run.data.batch_size)
    stages = []
    for stage in run.stages:
        options = reduce_options(stage.options)
        if getattr(options, "epochs", None) is not None:
            options = dataclasses.replace(options, epochs=1)
        # A rewirer is called before the first step, and in the last.
        limit = max(batches, 2) if getattr(options, "rewire", None) else batches
        stages.append(dataclasses.replace(stage, options=options, limit=limit))
    data = dataclasses.replace(run.data, batch_size=size)
    return dataclasses.replace(run, stages=tuple(stages), data=data)


def reduce_options(value: Any) -> Any:
    """Options, and those of the components they name, cut to what `option(smoke=)` says."""
    if isinstance(value, Use):
        return dataclasses.replace(value, options=reduce_options(value.options))
    if isinstance(value, tuple):
        return tuple(map(reduce_options, value))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changes: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        old, most = getattr(value, f.name), f.metadata.get("smoke")
        changes[f.name] = min(old, most) if most is not None and old else reduce_options(old)
    return dataclasses.replace(value, **changes)
