"""A run of a plan: its device, folders and reporters around the engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

import torch

from prunekit.catalog.component import Use
from prunekit.contracts import ReporterContext
from prunekit.engine.engine import Engine
from prunekit.engine.work import Inputs
from prunekit.errors import Interrupted, PluginError, UserError, explain_briefly
from prunekit.recipe.plan import Plan
from prunekit.report import Closing, Event, Note, Report, Reporter, Stop, Tell
from prunekit.store.runs import OutFolder, RunFolder
from prunekit.store.stages import Store
from prunekit.training.compute import find_device


def run_plan(
    plan: Plan,
    out: Path,
    store: Path,
    device: str,
    *,
    force: bool,
    resume: str,
    tell: Tell,
    stop: Stop | None = None,
) -> list[RunFolder] | None:
    """Run a plan into a folder; None if its results are there already.

    `tell` gets messages that are not events, such as how to resume after `Interrupted`.
    """
    chosen = find_device(device)
    folder = OutFolder(out, plan)
    known = folder.prepare(tell, force=force)
    if known is not None:
        if _is_current(plan, known, chosen):
            return None
        tell("the data or a file that the recipe names has changed: running it again")
    Store(store).prepare(tell)
    try:
        # What a plugin prints must not end up among the results.
        with folder.alone(), redirect_stdout(sys.stderr), reporters(plan, out, tell) as report:
            for note in plan.notes:
                report(Note(note))
            engine = Engine(Store(store), chosen, report, stop or Stop(), smoke=plan.smoke)
            with engine.stop.listen():
                folders = engine.run(plan, out)
            done = all(f.status == "done" for f in folders)
            inputs = [i for run in plan.runs for i in engine.inputs.identify(run)] if done else []
            folder.mark(done=done, inputs=inputs)
    except Interrupted:
        # Not earlier: the live display would draw over it.
        tell(f"everything so far is saved; resume with: {resume}")
        raise
    return folders


def _is_current(plan: Plan, known: list[str], device: torch.device) -> bool:
    """Whether the inputs of the results are unchanged; True where they cannot be read."""
    inputs = Inputs(device, lambda event: None, plan.smoke)
    try:
        with redirect_stdout(sys.stderr):
            return known == [digest for run in plan.runs for digest in inputs.identify(run)]
    # Also where a plugin of the data set is broken by now: the results are still there.
    except (Exception, SystemExit):
        return True


@contextmanager
def reporters(plan: Plan, out: Path, tell: Tell) -> Iterator[Report]:
    """One report function for all reporters; a reporter that fails is dropped with a message.

    Raises `UserError` if a reporter says so when it is built.
    """
    live = (
        sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )
    listeners: list[tuple[Use[Reporter], Reporter]] = []

    def drop(use: Use[Reporter], error: BaseException) -> None:
        told = f"reporter {use.component.name!r} of plugin {use.plugin} failed: "
        told += explain_briefly(error)
        told = str(error) if isinstance(error, PluginError) else told
        tell(f"{told}; the run goes on without it")

    for use in plan.reporters:
        try:
            listeners.append((use, use.build(ReporterContext(seed=0, folder=out, live=live))))
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
        if isinstance(listener, Closing):
            listener.close()
