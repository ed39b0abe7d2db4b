"""run(plan): the fold over stages, with what is stored already left as it is."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prunekit.contracts import Context, Data, Split
from prunekit.data.batches import Extra, fingerprint, hold_out, to_device
from prunekit.data.extra import read_extra
from prunekit.engine.rehearsal import random_data, reduce_run
from prunekit.engine.stages import STAGES
from prunekit.engine.work import Outcome, Work
from prunekit.errors import DataMissingError, Interrupted, RunError
from prunekit.models.building import build_network, describe_model
from prunekit.models.failures import explain, release
from prunekit.pruning.masks import State, describe_counts
from prunekit.recipe.plan import Plan, Run, Stage, uses_in
from prunekit.recipe.resolver import describe
from prunekit.report import EpochDone, Note, Report, RunDone, RunFailed, RunStarted, StageDone, Stop
from prunekit.store.checkpoint import read_model, start_from, write_model
from prunekit.store.keys import hash_file, hash_stage, version_of
from prunekit.store.runs import RunFolder
from prunekit.store.stages import StageFolder, StageResult, Store


@dataclass(frozen=True)
class Loaded:
    """A data set ready for training: parts on the device, and what identifies the content."""

    data: Data
    train: Split
    extra: Extra | None
    validation: Split
    fingerprint: str


@dataclass
class Engine:
    """Executes plans on one device against one store."""

    store: Store
    device: torch.device
    report: Report
    stop: Stop = field(default_factory=Stop)
    smoke: bool = False
    _loaded: dict[str, Loaded] = field(default_factory=dict)
    _failed: dict[str, str] = field(default_factory=dict)

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
            folder.start(self.device)
            self.report(
                RunStarted(
                    run.label, folder.path, tuple(s.name for s in run.stages), run.settings,
                    number, len(plan.runs), plan.smoke,
                )
            )  # fmt: skip
            started = time.monotonic()
            try:
                if run.label in broken:
                    raise broken[run.label]
                self._run_one(run, folder)
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
        """One batch through every missing stage, before hours are spent on the first of them.

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
                keys = self.keys(run)
                if all(map(self.store.is_done, keys)):
                    continue
                if not told:
                    self.report(Note("rehearsing: one batch through every stage"))
                    told = True
                with tempfile.TemporaryDirectory(prefix="prunekit-") as scratch:
                    small = reduce_run(run, batches=1)
                    quiet = Engine(
                        Store(Path(scratch)), self.device, lambda event: None, self.stop, True,
                        self._loaded,
                    )  # fmt: skip
                    quiet._run_one(small, None)
                seen.add(parts)
            except (Interrupted, KeyboardInterrupt):
                raise Interrupted from None
            except (Exception, SystemExit) as error:
                release(error)
                if isinstance(error, RunError):
                    error = RunError(f"rehearsal, one batch a stage: {error}")
                failures[run.label] = error
        return failures

    def _run_one(self, run: Run, folder: RunFolder | None) -> None:
        loaded = self.load(run)
        keys = self.keys(run)
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
                        self.report(_retell(stage, row))
                else:
                    if state is None:
                        state = self.build(run, loaded.data, latest)
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
        self.report(Note(f"stage {stage.name!r} is computed by another process; waiting for it"))

    def _compute(
        self, run: Run, stage: Stage, key: str, stored: StageFolder, state: State, loaded: Loaded
    ) -> StageResult:
        started = time.monotonic()
        work = Work(
            run, loaded.data, loaded.train, loaded.extra, loaded.validation, self.device,
            stored, key, self.report, self.stop,
        )  # fmt: skip
        outcome: Outcome = STAGES[stage.kind](state, stage, work)
        if stage.kind == "evaluate":
            stored.write_records(outcome.records)
        else:
            header = {
                **describe_model(run, loaded.data.shape, loaded.data.classes),
                "stage": _describe_stage(stage),
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
        stored.finish(result, _describe_stage(stage))
        return result

    def load(self, run: Run) -> Loaded:
        """The run's data, loaded once for all runs that share it."""
        chosen = run.data
        name = str([describe(run.dataset), chosen.fraction, chosen.validation,
                    chosen.validation_seed, chosen.extra, chosen.extra_ratio])  # fmt: skip
        if name not in self._loaded:
            data = self.build_data(run)
            content = fingerprint(data)
            train, validation = hold_out(
                data.train, chosen.fraction, chosen.validation, chosen.validation_seed
            )
            train, validation, test = (
                to_device(part, self.device) for part in (train, validation, data.test)
            )
            # The whole training set is let go: a large one would fill memory twice.
            data = dataclasses.replace(data, train=train, test=test)
            self._loaded[name] = Loaded(
                data, train, self._load_extra(run, data), validation, content
            )
        return self._loaded[name]

    def build_data(self, run: Run) -> Data:
        """The data set; in a smoke run random images where its files are missing."""
        try:
            # Without the run's seed: runs of all seeds share the data.
            return run.dataset.build(Context(folder=run.folder))
        except DataMissingError:
            facts = run.dataset.component.facts
            if not self.smoke or facts is None:
                raise
            self.report(Note(f"{run.dataset.name} is not here: random images instead", True))
            return random_data(facts(run.dataset.options), run.data)

    def _load_extra(self, run: Run, data: Data) -> Extra | None:
        if run.data.extra is None:
            return None
        split = read_extra(run.data.extra, data.shape, data.classes)
        return Extra(to_device(split, self.device), run.data.extra_ratio)

    def inputs(self, run: Run) -> list[str]:
        """Hashes of all that a run reads: its data, extra images, the weights it starts from."""
        files = [path for path in (run.data.extra, run.init) if path]
        files += [path for use in run.uses() for path in use.component.files(use.options)]
        return [self.load(run).fingerprint, *map(hash_file, files)]

    def keys(self, run: Run) -> list[str]:
        """The hash of every stage of a run, over everything that decides its result."""
        environment = {
            "torch": torch.__version__,
            "device": self.device.type,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else 0,
            "precision": "fp32",
            "ranks": 1,
        }
        loaded = self.load(run)
        start = {
            "seed": run.seed,
            # By content, not by where the files are or how many processes read them.
            "data": [loaded.fingerprint, loaded.data.shape, loaded.data.classes],
            "use": [loaded.data.augment, describe(run.data, hash_file)],
            "architecture": describe(run.architecture, hash_file),
            "init": hash_file(run.init) if run.init else None,
        }
        keys, upstream = [], ""
        for stage in run.stages:
            uses = list(uses_in((run.dataset, run.architecture, stage.options)))
            files = [hash_file(path) for u in uses for path in u.component.files(u.options)]
            key = hash_stage(
                upstream,
                {"start": start, **_describe_stage(stage), "files": files},
                {name for u in uses for name in (u.component.package, *u.component.sources)},
                {**environment, **{n: version_of(n) for u in uses for n in u.component.needs}},
            )
            keys.append(key)
            if stage.kind != "evaluate":
                upstream = key
        return keys

    def build(
        self, run: Run, data: Data, latest: StageFolder | None, *, weights: bool = True
    ) -> State:
        """The network of a run: fresh, from the file of `init`, or as a stored stage left it.

        Without `weights` only its shapes matter, and nothing is fetched for a fresh one.
        """
        fresh = weights and latest is None and run.init is None
        model = build_network(run, data.shape, data.classes, self.device, fresh=fresh)
        state = State(model)
        if latest is not None:
            state.masks = read_model(latest.model, model)
        elif run.init is not None:
            state.masks = start_from(run.init, model)
        state.masks = {name: mask.to(self.device) for name, mask in state.masks.items()}
        return state


def _describe_stage(stage: Stage) -> dict[str, Any]:
    """What a stage computes, threats resolved: part of its key, and of what is stored of it."""
    threats = [
        [use.kind, use.name, use.threat.norm, use.threat.eps]
        for use in uses_in(stage.options)
        if use.threat is not None and hasattr(use.options, "eps")
    ]
    return {
        "kind": stage.kind,
        "position": stage.position,
        "options": describe(stage.options, hash_file),
        "threats": threats,
        "batches": stage.batches,
    }


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """Without the numbers that JSON has no word for (a term of a loss may be NaN)."""
    return {k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)}


def _retell(stage: Stage, row: Mapping[str, Any]) -> EpochDone:
    metrics = {k: v for k, v in row.items() if k not in ("epoch", "best")}
    return EpochDone(stage.name, row["epoch"], stage.epochs, metrics, row["best"], stored=True)
