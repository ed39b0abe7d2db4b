"""What a run would do, without doing it."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunekit.contracts import Data
from prunekit.data.batches import count_batches
from prunekit.engine.engine import Engine
from prunekit.errors import DataMissingError, relative
from prunekit.models.failures import explained
from prunekit.pruning.layers import find_prunable
from prunekit.recipe.plan import Plan, Run, Stage
from prunekit.report import Event, Note
from prunekit.store.stages import Store
from prunekit.training.compute import find_device


@dataclass(frozen=True)
class Unread:
    """A split whose files are not here: so many images that nobody may look at."""

    labels: torch.Tensor

    def batches(self, indices: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        raise RuntimeError("a preview reads no images")


class Preview(Engine):
    """An engine that only looks: nothing is downloaded, missing data count as declared."""

    def build_data(self, run: Run) -> Data:
        use = run.dataset
        if hasattr(use.options, "download"):
            options = dataclasses.replace(use.options, download=False)
            run = dataclasses.replace(run, dataset=dataclasses.replace(use, options=options))
        try:
            return super().build_data(run)
        except DataMissingError:
            if use.component.facts is None:
                raise
            facts = use.component.facts(use.options)
            train, test = (
                Unread(torch.zeros(n, dtype=torch.int64)) for n in (facts.train, facts.test)
            )
            self.report(Note(f"{use.name} is not here; sizes are those it should have"))
            return Data(train, test, facts.shape, facts.classes, facts.augment, "missing")


def preview_plan(plan: Plan, out: Path, store: Path, device: str) -> dict[str, Any]:
    """What a run would do: resolved recipes, stages, stored or not, steps, passes.

    Downloads nothing: where data are missing, sizes are those that the data set declares.
    """
    notes = list(plan.notes)

    def report(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    engine = Preview(Store(store), find_device(device), report, smoke=plan.smoke)
    seen: set[str] = set()
    runs: list[dict[str, Any]] = []
    for run in plan.runs:
        with redirect_stdout(sys.stderr), explained(run):
            runs.append(_preview_run(engine, run, seen))
    return {
        "out": relative(out), "store": relative(store), "smoke": plan.smoke,
        "notes": list(dict.fromkeys(notes)), "runs": runs,
    }  # fmt: skip


def _preview_run(engine: Engine, run: Run, seen: set[str]) -> dict[str, Any]:
    """What `preview_plan` says of one run; `seen` are the stages of the runs before it."""
    model = engine.build(run, engine.load(run).data, None, weights=False).model
    stages: list[dict[str, Any]] = []
    for stage, key in zip(run.stages, engine.keys(run), strict=True):
        steps, passes = _count_work(engine, run, stage)
        status = "stored" if engine.store.is_done(key) else "shared" if key in seen else "to do"
        seen.add(key)
        stages.append(
            {"name": stage.name, "kind": stage.kind, "key": key, "status": status,
             "steps": steps, "forward_passes": passes}
        )  # fmt: skip
    return {
        "run": run.label,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prunable": sum(w.numel() for w in find_prunable(model).values()),
        "recipe": run.describe(),
        "stages": stages,
    }


def _count_work(engine: Engine, run: Run, stage: Stage) -> tuple[int, int]:
    """(optimiser steps, forward passes of a batch) of a stage."""
    options, size = stage.options, run.data.batch_size
    loaded = engine.load(run)
    if stage.kind == "evaluate":
        images = min(options.images or math.inf, len(loaded.data.test.labels))
        batches = min(math.ceil(images / size), stage.batches or math.inf)
        return 0, int(batches) * sum(u.component.forward_passes(u.options) for u in options.with_)
    if options.epochs is None:
        return 0, 0
    use = options.objective
    per_epoch = count_batches(loaded.train, size, stage.batches)
    checked = math.ceil(len(loaded.validation.labels) / size)
    steps = stage.epochs * per_epoch * stage.replays
    return steps, steps * use.component.forward_passes(use.options) + stage.epochs * checked
