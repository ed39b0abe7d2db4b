"""run(plan): the fold over stages; stages that are stored already are not computed again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from prunekit.catalog.component import Use
from prunekit.catalog.containment import held
from prunekit.engine.evaluating import assemble, join_places, judge
from prunekit.engine.keys import StageKey, describe_stage, make_keys
from prunekit.engine.rehearsal import rehearse
from prunekit.engine.stages import STAGES
from prunekit.engine.work import Inputs, Loaded, Outcome, Place, Work
from prunekit.errors import Interrupted, RunError
from prunekit.models.building import describe_model
from prunekit.models.failures import explain, release
from prunekit.pruning.masks import describe_counts
from prunekit.recipe.describing import uses_in
from prunekit.recipe.plan import Plan, Run
from prunekit.recipe.stages import Stage
from prunekit.report import (
    EpochDone,
    Event,
    Note,
    Report,
    RunDone,
    RunFailed,
    RunStarted,
    StageDone,
    StageStarted,
    Stop,
)
from prunekit.store.files import read_npz, write_npz
from prunekit.store.keys import used_version
from prunekit.store.layout import EVALUATIONS
from prunekit.store.runs import RunFolder
from prunekit.store.stages import StageFolder, StageResult, Store
from prunekit.store.tensors.checkpoint import write_model
from prunekit.training.compute import Compute
from prunekit.training.progress import tell_epoch


@dataclass
class Engine:
    """Executes plans in one place against one store."""

    store: Store
    compute: Compute
    report: Report
    stop: Stop = field(default_factory=Stop)
    smoke: bool = False
    inputs: Inputs = field(init=False)
    seen: Mapping[str, Any] = field(default_factory=dict)
    """Label -> stamp of its record when this began, where other processes share the runs."""
    failed: dict[str, str] = field(default_factory=dict)
    """Keys of the results that could not be computed, and why."""

    def __post_init__(self) -> None:
        self.inputs = Inputs(self.compute, self.report, self.smoke)

    def run(self, plan: Plan, out: Path, runs: Sequence[Run] | None = None) -> list[RunFolder]:
        """Execute the runs, by default all of a plan; a failed one does not stop the others.

        Returns the folders of those that this process executed, in their order. Those come last
        of which another process is computing a result now. Raises `Interrupted` where a stop was
        asked for; the same call then goes on from there.
        """
        waiting = list(plan.runs if runs is None else runs)
        broken = {} if self.smoke else rehearse(self, waiting)
        folders = []
        while waiting:
            self.stop.check()
            free = (r for r in waiting if len(waiting) == 1 or not self._is_awaited(r))
            run = next(free, waiting[0])
            waiting.remove(run)
            if folder := self.take(plan, run, out, broken.get(run.label)):
                folders.append(folder)
        return sorted(folders, key=lambda folder: plan.runs.index(folder.run))

    def _is_awaited(self, run: Run) -> bool:
        """Whether another process is computing a result of the run."""
        with suppress(Exception), held():  # what is wrong with it is told when its turn comes
            keys = make_keys(run, self.inputs.load(run), self.compute)
            return any(self.store.is_held(part) for key in keys for part in key.parts)
        return False

    def take(
        self, plan: Plan, run: Run, out: Path, broken: BaseException | None = None
    ) -> RunFolder | None:
        """Execute a run, or record why it is `broken`; its folder, None where another process is
        running in it, or ended it since `seen`."""
        folder = RunFolder(out / run.label if plan.swept else out, plan, run)
        with folder.alone() as mine:
            if not mine or (self.seen and self.seen.get(run.label) != folder.stamp):
                return None
            self._execute(plan, run, folder, broken)
        return folder

    def _execute(
        self, plan: Plan, run: Run, folder: RunFolder, broken: BaseException | None
    ) -> None:
        folder.start(self.compute.describe())
        names = tuple(s.name for s in run.stages)
        number, total = plan.runs.index(run) + 1, len(plan.runs)
        told = (run.label, folder.path, names, run.settings, number, total, plan.smoke)
        self.report(RunStarted(*told))
        started = time.monotonic()
        try:
            if broken is not None:
                raise broken
            with held():
                self.run_one(run, self.inputs.load(run), folder)
        except (Interrupted, KeyboardInterrupt):
            folder.close("interrupted")
            raise Interrupted from None
        except Exception as error:
            message = explain(error, run)
            folder.close("failed", message)
            self.report(RunFailed(run.label, folder.path, message))
            release(error)
            folder.cause = error
        else:
            folder.close("done")
            spent = time.monotonic() - started
            self.report(RunDone(run.label, folder.path, folder.metrics, spent))

    def run_one(self, run: Run, loaded: Loaded, folder: RunFolder | None) -> None:
        """Fold over the stages of a run; without a folder nothing but the store has them."""
        keys, at = make_keys(run, loaded, self.compute), Place(run, loaded, self.compute)
        if folder is not None:
            folder.expect([part for key in keys for part in key.parts])
            # Where no stage makes a network, the folder gets the one judged, if none lies beside.
            beside = folder.path.parent.name == EVALUATIONS
            if not beside and {stage.kind for stage in run.stages} == {"evaluate"}:
                self._write(folder.model, at, {})
        late = []
        for stage, key in zip(run.stages, keys, strict=True):
            # Nothing follows from an evaluation: another process may compute it meanwhile.
            if stage.kind == "evaluate" and any(map(self.store.is_held, key.parts)):
                late.append((stage, key, replace(at, _state=None)))
            else:
                self._fold(stage, key, at, folder)
        for stage, key, then in late:
            self._fold(stage, key, then, folder)

    def _fold(self, stage: Stage, key: StageKey, at: Place, folder: RunFolder | None) -> None:
        judged = stage.kind == "evaluate"
        if judged:
            result, reused, records = self._judge(stage, key, at)
            files: dict[str, Any] = {"records": records}
        else:
            result, reused, stored = self._train(stage, key.key, at)
            files = {"model": stored.model}
        for text in result.notes if judged or reused else ():
            self.report(Note(text, warning=judged))
        spent = 0.0 if reused else result.seconds
        self.report(StageDone(stage.name, stage.kind, key.key, result.metrics, spent, reused))
        if folder is not None:
            folder.add(stage, key.key, result, reused, **files)

    def _train(self, stage: Stage, key: str, at: Place) -> tuple[StageResult, bool, StageFolder]:
        """(result, whether it was stored, where it is stored) of a stage that makes a network."""
        asked = {"stage": describe_stage(stage), "seed": at.run.seed}
        asked |= {"shape": at.loaded.data.shape, "classes": at.loaded.data.classes}
        with self._open(stage, key, asked) as (stored, known):
            if reused := known is not None:
                result = known
                self.report(StageStarted(stage.name, stage.kind, key, stage.epochs, stored=True))
                for row in result.history:
                    own = (stage.name, stage.epochs, row, stage.select, stage.accuracy_of)
                    self.report(tell_epoch(*own, stored=True))
            else:
                state = at.open()
                work = partial(STAGES[stage.kind], state)
                result = self._store(stage, key, stored, at, work, stage.uses())
            at.move(stage, stored, reused)
        return result, reused, stored

    def _judge(
        self, stage: Stage, key: StageKey, at: Place
    ) -> tuple[StageResult, bool, Mapping[str, Any]]:
        """(result, whether all of it was stored, records) of an evaluate stage."""
        found: dict[str, Outcome] = {}
        results: list[tuple[bool, StageResult]] = []
        files: dict[str, str] = {}
        for use, part in zip(stage.options.with_, key.parts, strict=True):
            with self._open(stage, part) as (stored, known):
                if known is None:
                    if all(old for old, _ in results):
                        self.report(StageStarted(stage.name, stage.kind, key.key))
                    work = partial(judge, at.open(), use=use)
                    own = self._store(stage, part, stored, at, work, uses_in((use,)))
                    results.append((False, own))
                else:
                    results.append((True, known))
                result = results[-1][1]
                files |= {f"{use.name}/{name}": digest for name, digest in result.files.items()}
                records = read_npz(stored.records)
                found[use.name] = Outcome(dict(result.metrics), [], records, tuple(result.notes))
        outcome = assemble(stage, at.run, at.loaded, found)
        new = [result for known, result in results if not known]
        if not new:
            self.report(StageStarted(stage.name, stage.kind, key.key, stored=True))
        whole = StageResult(
            outcome.metrics,
            seconds=sum(result.seconds for result in new or [r for _, r in results]),
            notes=list(outcome.notes),
            versions={k: v for _, result in results for k, v in result.versions.items()},
            compute=join_places([result.compute for _, result in results]),
            files=files,
        )
        return whole, not new, outcome.records

    @contextmanager
    def _open(
        self, stage: Stage, key: str, asked: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[StageFolder, StageResult | None]]:
        """The locked folder of a result, and the result if it is stored and what is asked for.

        Raises `RunError` if it failed before in this plan.
        """
        if key in self.failed:
            raise RunError(self.failed[key])
        told = f"stage {stage.name!r} is being computed by another process; waiting for it"
        with self.store.locked(key, partial(self._note, told), self.stop) as stored:
            yield stored, stored.repair(partial(self._note, warning=True), asked)

    def _write(self, file: Path, at: Place, told: Mapping[str, Any]) -> None:
        """Write the network as it is now, with what is `told` of it."""
        state = at.open()
        known = describe_model(at.run, at.loaded.data.shape, at.loaded.data.classes)
        header = {**known, **told, "smoke": self.smoke}
        write_model(file, state.model, state.masks, header)

    def _note(self, text: str, *, warning: bool = False) -> None:
        self.report(Note(text, warning))

    def _store(
        self,
        stage: Stage,
        key: str,
        stored: StageFolder,
        at: Place,
        compute: Callable[..., Outcome],
        uses: Iterable[Use[Any]],
    ) -> StageResult:
        """Compute a result, `compute(stage=, work=)`, with the components `uses`, and store it."""
        started = time.monotonic()
        told: list[str] = []
        times: dict[int, float] = {}

        def report(event: Event) -> None:
            if isinstance(event, Note):
                told.append(event.text)
            elif isinstance(event, StageStarted):
                times[0] = event.seconds
            elif isinstance(event, EpochDone):
                times[event.epoch] = event.seconds
            self.report(event)

        work = Work(at.run, at.loaded, self.compute, stored, key, report, self.stop, at.dense)
        for text in at.tell():
            report(Note(text))
        try:
            with held():
                outcome = compute(stage=stage, work=work)
        except Exception as error:
            if not isinstance(error, Interrupted):
                self.failed[key] = explain(error, at.run)
            raise
        metrics = _finite(outcome.metrics)
        if stage.kind == "evaluate":
            write_npz(stored.records, outcome.records)
        else:
            # No stage has pruned what `init` brought pruned.
            sparsity = stage.sparsity or float(outcome.metrics["sparsity"])
            self._write(stored.model, at, {"stage": describe_stage(stage), "sparsity": sparsity})
            metrics["counts"] = describe_counts(at.open())
        result = StageResult(
            metrics,
            [{**_finite(row), "seconds": times[row["epoch"]]} for row in outcome.history],
            times.get(0, 0.0) + time.monotonic() - started,
            list(dict.fromkeys((*told, *outcome.notes))),
            {n: used_version(n) for use in uses for n in use.component.needs},
            self.compute.take_chosen(),
        )
        return stored.finish(result, describe_stage(stage))


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """Without numbers that JSON cannot hold (a term of a loss may be NaN)."""
    return {k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
