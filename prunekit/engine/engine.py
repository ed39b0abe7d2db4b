"""run(plan): the fold over stages; stages that are stored already are not computed again."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from prunekit.engine.stages import STAGES
from prunekit.engine.work import (
    Inputs,
    Loaded,
    Outcome,
    Work,
    build_state,
    describe_stage,
    make_keys,
)
from prunekit.errors import Interrupted, RunError
from prunekit.models.building import describe_model
from prunekit.models.failures import explain, release
from prunekit.pruning.masks import State, describe_counts
from prunekit.recipe.plan import Plan, Run
from prunekit.recipe.reduction import reduce_run
from prunekit.recipe.stages import Stage, uses_in
from prunekit.report import Event, Note, Report, RunDone, RunFailed, RunStarted, StageDone, Stop
from prunekit.store.checkpoint import write_model
from prunekit.store.keys import version_of
from prunekit.store.runs import RunFolder
from prunekit.store.stages import StageFolder, StageResult, Store
from prunekit.training.compute import Compute
from prunekit.training.loop import retell


@dataclass
class Engine:
    """Executes plans in one place against one store."""

    store: Store
    compute: Compute
    report: Report
    stop: Stop = field(default_factory=Stop)
    smoke: bool = False
    inputs: Inputs = field(init=False)
    _failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = Inputs(self.compute, self.report, self.smoke)

    def run(self, plan: Plan, out: Path) -> list[RunFolder]:
        """Execute all runs of a plan; a failed one does not stop the others.

        Returns the run folders, in the plan's order. Raises `Interrupted` where a stop was asked
        for; the same call then goes on from there.
        """
        folders = []
        broken = {} if self.smoke else self._rehearse(plan)
        for number, run in enumerate(plan.runs, start=1):
            self.stop.check()
            folder = RunFolder(out / run.label if plan.swept else out, plan, run)
            folder.start(self.compute.describe())
            names, total = tuple(s.name for s in run.stages), len(plan.runs)
            told = (run.label, folder.path, names, run.settings, number, total, plan.smoke)
            self.report(RunStarted(*told))
            started = time.monotonic()
            try:
                if run.label in broken:
                    raise broken[run.label]
                self._run_one(run, self.inputs.load(run), folder)
            except (Interrupted, KeyboardInterrupt):
                folder.close("interrupted")
                raise Interrupted from None
            # A plugin may raise anything, SystemExit included.
            except (Exception, SystemExit) as error:
                message = explain(error, run)
                folder.close("failed", message)
                self.report(RunFailed(run.label, folder.path, message))
                release(error)
                folder.cause = error
            else:
                folder.close("done")
                spent = time.monotonic() - started
                self.report(RunDone(run.label, folder.path, folder.metrics, spent))
            folders.append(folder)
        return folders

    def _rehearse(self, plan: Plan) -> dict[str, BaseException]:
        """Send one batch through every missing stage before hours are spent on the first.

        Returns label -> what would fail. Of runs that differ in numbers only, one that passes
        speaks for the others.
        """
        failures: dict[str, BaseException] = {}
        told = False
        seen: set[frozenset[tuple[str, str]]] = set()
        for run in plan.runs:
            parts = frozenset((u.kind, u.component.name) for u in run.uses())
            if parts in seen:
                continue
            try:
                loaded = self.inputs.load(run)
                keys = make_keys(run, loaded, self.compute)
                if all(map(self.store.is_done, keys)):
                    continue
                if not told:
                    self.report(Note("rehearsing: one batch through every stage"))
                    told = True
                with tempfile.TemporaryDirectory(prefix="prunekit-") as scratch:
                    small = reduce_run(run, batches=1)
                    quiet = Engine(Store(Path(scratch)), self.compute, _ignore, self.stop, True)
                    quiet._run_one(small, loaded, None)
                seen.add(parts)
            except (Interrupted, KeyboardInterrupt):
                raise Interrupted from None
            except (Exception, SystemExit) as error:
                release(error)
                if isinstance(error, RunError):
                    error = RunError(f"rehearsal, one batch a stage: {error}")
                failures[run.label] = error
        return failures

    def _run_one(self, run: Run, loaded: Loaded, folder: RunFolder | None) -> None:
        keys = make_keys(run, loaded, self.compute)
        if folder is not None:
            folder.expect(keys)
        state: State | None = None
        latest: StageFolder | None = None
        for stage, key in zip(run.stages, keys, strict=True):
            if key in self._failed:
                raise RunError(self._failed[key])
            with self.store.locked(key, partial(self._tell_waiting, stage), self.stop) as stored:
                if reused := stored.done:
                    result = stored.read()
                    for row in result.history:
                        self.report(retell(stage.name, stage.epochs, row))
                else:
                    if state is None:
                        state = build_state(run, loaded.data, self.compute, latest)
                    try:
                        result = self._compute(run, stage, key, stored, state, loaded)
                    except (Exception, SystemExit) as error:
                        if not isinstance(error, Interrupted):
                            self._failed[key] = explain(error, run)
                        raise
                if stage.kind != "evaluate":
                    latest, state = stored, None if reused else state
                for text in result.notes:
                    self.report(Note(text, warning=True))
                spent = 0.0 if reused else result.seconds
                self.report(StageDone(stage.name, stage.kind, key, result.metrics, spent, reused))
                if folder is not None:
                    folder.add(stage, key, result, stored, reused)

    def _tell_waiting(self, stage: Stage) -> None:
        self.report(
            Note(f"stage {stage.name!r} is being computed by another process; waiting for it")
        )

    def _compute(
        self, run: Run, stage: Stage, key: str, stored: StageFolder, state: State, loaded: Loaded
    ) -> StageResult:
        started = time.monotonic()
        work = Work(run, loaded, self.compute, stored, key, self.report, self.stop)
        outcome: Outcome = STAGES[stage.kind](state, stage, work)
        if stage.kind == "evaluate":
            stored.write_records(outcome.records)
        else:
            header = {
                **describe_model(run, loaded.data.shape, loaded.data.classes),
                "stage": describe_stage(stage),
                # No stage has pruned what `init` brought pruned.
                "sparsity": stage.sparsity or outcome.metrics["sparsity"],
                "smoke": self.smoke,
            }
            write_model(stored.model, state.model, state.masks, header)
        counts = describe_counts(state)
        result = StageResult(
            {**_finite(outcome.metrics), "counts": counts},
            [_finite(row) for row in outcome.history],
            time.monotonic() - started,
            list(outcome.notes),
            {n: version_of(n) for use in uses_in(stage.options) for n in use.component.needs},
        )
        stored.finish(result, describe_stage(stage))
        return result


def _ignore(event: Event) -> None:
    """The report of a rehearsal, which is silent."""


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """Without numbers that JSON cannot hold (a term of a loss may be NaN)."""
    return {k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
