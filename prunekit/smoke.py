"""The same stages, tiny: what `--smoke` runs, and what is rehearsed before a long run."""

from __future__ import annotations

import dataclasses
from typing import Any

from prunekit.component import Use
from prunekit.plan import Plan, Run, uses_in

SMOKE_BATCHES, SMOKE_BATCH_SIZE = 2, 8


def reduce_plan(plan: Plan) -> Plan:
    """The smoke plan: one run for each distinct component, tiny batches, short attacks."""
    runs, seen = [], set()
    for run in plan.runs:
        parts = {(use.kind, use.component.name) for use in uses_in((run.dataset, run.architecture))}
        for stage in run.stages:
            parts |= {(use.kind, use.component.name) for use in uses_in(stage.options)}
        if parts - seen:
            seen |= parts
            runs.append(reduce_run(run, SMOKE_BATCHES, SMOKE_BATCH_SIZE))
    return dataclasses.replace(plan, runs=tuple(runs), smoke=True)


def reduce_run(run: Run, batches: int, batch_size: int | None = None) -> Run:
    """One epoch of `batches` batches a stage, and options cut to what `option(smoke=)` says."""
    size = min(run.data.batch_size, batch_size or run.data.batch_size)
    stages = []
    for stage in run.stages:
        options = _reduce_options(stage.options)
        if getattr(options, "epochs", None) is not None:
            options = dataclasses.replace(options, epochs=1)
        stages.append(dataclasses.replace(stage, options=options, batches=batches))
    data = dataclasses.replace(run.data, batch_size=size)
    return dataclasses.replace(run, stages=tuple(stages), data=data)


def _reduce_options(value: Any) -> Any:
    if isinstance(value, Use):
        return dataclasses.replace(value, options=_reduce_options(value.options))
    if isinstance(value, tuple):
        return tuple(map(_reduce_options, value))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changes: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        old, most = getattr(value, f.name), f.metadata.get("smoke")
        changes[f.name] = min(old, most) if most is not None and old else _reduce_options(old)
    return dataclasses.replace(value, **changes)
