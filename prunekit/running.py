"""What `prunekit run` does: devices, folders and reporters around the engine."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from prunekit.component import Use
from prunekit.contracts import Context, Data, Reporter
from prunekit.data import count_batches
from prunekit.engine import Engine
from prunekit.errors import DataMissingError, Interrupted, PluginError, UserError, relative
from prunekit.failures import explained
from prunekit.files import make_folder
from prunekit.masks import find_prunable
from prunekit.plan import Plan, Run, Stage
from prunekit.report import Event, Note, Report
from prunekit.runfolder import OutFolder, RunFolder
from prunekit.stop import Stop
from prunekit.store import Store


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" takes the fastest there is. Raises `UserError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0].partition(" device type")[0][:80]
        raise UserError(
            f"no device {name!r} here ({reason}); write auto, cpu, cuda, cuda:1 or mps"
        ) from None
    if device.type == "cuda":
        # fp32 means fp32; and the same run gives the same bits.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    return device


def run_plan(
    plan: Plan,
    out: Path,
    store: Path,
    device: str,
    *,
    force: bool,
    resume: str,
    stop: Stop | None = None,
) -> list[RunFolder] | None:
    """Run a plan into a folder; None where its results are there already.

    Raises `Interrupted` after printing how to go on.
    """
    chosen = find_device(device)
    folder = OutFolder(out, plan)
    known = folder.prepare(force=force)
    if known is not None:
        if _is_current(plan, known, Store(store), chosen):
            return None
        click.echo("the data or a file of the recipe has changed since: running it again", err=True)
    make_folder(store)
    try:
        # What a plugin prints must not end up among the results.
        with folder.alone(), redirect_stdout(sys.stderr), reporters(plan, out) as report:
            for note in plan.notes:
                report(Note(note))
            engine = Engine(Store(store), chosen, report, stop or Stop(), smoke=plan.smoke)
            with engine.stop.listen():
                folders = engine.run(plan, out)
            done = all(f.status == "done" for f in folders)
            inputs = [i for run in plan.runs for i in engine.inputs(run)] if done else []
            folder.mark(done=done, inputs=inputs)
    except Interrupted:
        # Only now: before, the live display would draw over it.
        click.echo(f"everything up to here is saved; go on with: {resume}", err=True)
        raise
    return folders


def _is_current(plan: Plan, known: list[str], store: Store, device: torch.device) -> bool:
    """Whether what the results were computed from is the same still; also where it is gone."""
    engine = Engine(store, device, lambda event: None, smoke=plan.smoke)
    try:
        with redirect_stdout(sys.stderr):
            return known == [digest for run in plan.runs for digest in engine.inputs(run)]
    # Also where a plugin of the data set is broken by now: what was found is there still.
    except (Exception, SystemExit):
        return True


@contextmanager
def reporters(plan: Plan, out: Path) -> Iterator[Report]:
    """One report function for all reporters; one that fails is dropped with a message.

    Raises `UserError` where a reporter says what has to be mended before it can be built.
    """
    live = (
        sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )
    listeners: list[tuple[Use[Reporter], Reporter]] = []

    def drop(use: Use[Reporter], error: BaseException) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        told = f"reporter {use.component.name!r} of plugin {use.plugin} failed: {reason}"
        told = str(error) if isinstance(error, PluginError) else told
        click.echo(f"prunekit: {told}; the run goes on without it", err=True)

    for use in plan.reporters:
        try:
            listeners.append((use, use.build(Context(folder=out, live=live))))
        except (Exception, SystemExit) as error:
            if isinstance(error, UserError) and not isinstance(error, PluginError):
                raise
            drop(use, error)

    def report(event: Event) -> None:
        for use, listener in list(listeners):
            try:
                listener(event)
            except (Exception, SystemExit) as error:
                listeners.remove((use, listener))
                _close(listener)
                drop(use, error)

    try:
        yield report
    finally:
        for _, listener in listeners:
            _close(listener)


def _close(listener: Reporter) -> None:
    with suppress(Exception, SystemExit):
        getattr(listener, "close", lambda: None)()


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
            click.echo(f"note: {use.name} is not here; sizes are those it should have", err=True)
            return Data(train, test, facts.shape, facts.classes, facts.augment, "missing")


def preview_plan(plan: Plan, out: Path, store: Path, device: str) -> dict[str, Any]:
    """What a run would do: resolved recipes, stages, stored or not, steps, passes.

    Downloads nothing: where data are missing, sizes are those that the data set declares.
    """
    engine = Preview(Store(store), find_device(device), lambda event: None, smoke=plan.smoke)
    seen: set[str] = set()
    runs: list[dict[str, Any]] = []
    for run in plan.runs:
        with redirect_stdout(sys.stderr), explained(run):
            runs.append(_preview_run(engine, run, seen))
    return {
        "out": relative(out), "store": relative(store), "smoke": plan.smoke,
        "notes": list(plan.notes), "runs": runs,
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
        return 0, int(batches) * sum(u.component.passes(u.options) for u in options.with_)
    if options.epochs is None:
        return 0, 0
    use = options.objective
    per_epoch = count_batches(loaded.train, size, stage.batches)
    checked = math.ceil(len(loaded.validation.labels) / size)
    steps = stage.passes * per_epoch * stage.replays
    return steps, steps * use.component.passes(use.options) + stage.passes * checked
