"""A run of a plan: its device, folders and reporters around the engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prunekit.catalog.component import Use
from prunekit.catalog.containment import held
from prunekit.contexts import ReporterContext
from prunekit.engine.engine import Engine
from prunekit.engine.keys import make_keys
from prunekit.engine.work import Inputs, open_place
from prunekit.errors import Interrupted, PluginError, UserError, explain_briefly
from prunekit.recipe.plan import Plan
from prunekit.report import Closing, Event, Note, Report, Reporter, RunStarted, Stop, Tell
from prunekit.store.files import OTHER_FOLDER, relative_link, set_aside
from prunekit.store.runs import ANEW, OutFolder, RunFolder
from prunekit.store.stages import Store
from prunekit.training.compute import Compute


def run_plan(
    plan: Plan,
    out: Path,
    store: Path,
    *,
    force: bool,
    resume: str,
    elsewhere: str = OTHER_FOLDER,
    anew: str = ANEW,
    tell: Tell,
    stop: Stop | None = None,
) -> list[RunFolder] | None:
    """Run a plan into a folder; None if its results are there already.

    `tell` gets messages that are not events: how to `resume` after `Interrupted`, or to compute
    `anew` what was made with other sources. Errors say how to write `elsewhere`.
    """
    plan.permit()
    compute = open_place(plan)
    folder = OutFolder(out, plan, elsewhere, anew)
    known = folder.prepare(tell, force=force)
    changed = folder.find_changed(done=known is not None)
    if known is not None and not changed and _is_current(plan, known, compute, anew, tell):
        return None
    try:
        Store(store).prepare(tell)
    except UserError:
        folder.withdraw()
        raise
    try:
        with (
            folder.alone(),
            compute.active(),
            reporters(plan, out, tell) as report,
        ):
            for file in changed:
                where = relative_link(file)
                if os.path.lexists(file):
                    aside = relative_link(set_aside(file))
                    tell(f"{where} is not what the run wrote: moved to {aside}")
                else:
                    tell(f"{where} is missing: it is written again")
            for note in plan.notes:
                report(Note(note))
            engine = Engine(Store(store), compute, report, stop or Stop(), smoke=plan.smoke)
            with engine.stop.listen():
                folders = engine.run(plan, out)
            done = all(f.status == "done" for f in folders)
            folder.mark(done=done, **(_describe_making(plan, engine.inputs) if done else {}))
    except Interrupted:
        # Not earlier: the live display would draw over it.
        tell(f"everything so far is saved; resume with: {resume}")
        raise
    return folders


def _describe_making(plan: Plan, inputs: Inputs) -> dict[str, Any]:
    """What the results of a plan depend on: its inputs, the place, and the keys of all stages."""
    made = [make_keys(run, inputs.load(run), inputs.compute) for run in plan.runs]
    return {
        "inputs": [digest for run in plan.runs for digest in inputs.identify(run)],
        "compute": inputs.compute.key(),
        "stages": [[stage.key for stage in stages] for stages in made],
    }


def _is_current(
    plan: Plan, known: Mapping[str, Any], compute: Compute, anew: str, tell: Tell
) -> bool:
    """Whether results are those that the plan would give now, or are left as they are.

    Where what they depend on cannot be read any more, they are still there.
    """
    try:
        with held():
            now = _describe_making(plan, Inputs(compute, lambda event: None, plan.smoke))
    # Also where a plugin of the data set is broken by now.
    except Exception:
        return True
    if known.get("inputs", []) != now["inputs"]:
        tell("the data or a file that the recipe names has changed: running it again")
        return False
    before = known.get("compute", now["compute"])
    if before != now["compute"]:
        told = " and ".join(
            f"{'with sparse = ' if k == 'sparse' else 'on '}{new} instead of {old}"
            for k in sorted(now["compute"].keys() | before.keys())
            if (new := now["compute"].get(k, "off")) != (old := before.get(k, "off"))
        )
        tell(f"this run computes {told}: running it again")
        return False
    if known.get("stages", now["stages"]) != now["stages"]:
        tell(
            "these results were made with other sources or versions of prunekit, of a plugin or of "
            f"what they need; to compute them again: {anew}"
        )
    return True


@contextmanager
def reporters(plan: Plan, out: Path, tell: Tell) -> Iterator[Report]:
    """One report function for all reporters; a reporter that fails is dropped with a message.

    They are built anew for each run, with its folder; what is told before the first run goes to
    that run's. Raises `UserError` if a reporter says so when it is built.
    """
    live = (
        sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )
    kept = list(plan.reporters)
    listeners: list[tuple[Use[Reporter], Reporter]] = []

    def drop(use: Use[Reporter], error: BaseException) -> None:
        kept.remove(use)
        told = f"reporter {use.component.name!r} of plugin {use.plugin} failed: "
        told += explain_briefly(error)
        told = str(error) if isinstance(error, PluginError) else told
        tell(f"{told}; the run goes on without it")

    def build(folder: Path, *, first: bool = False) -> None:
        for use in list(kept):
            try:
                listeners.append(
                    (use, use.build(ReporterContext(seed=0, folder=folder, live=live)))
                )
            except Exception as error:
                if first and isinstance(error, UserError) and not isinstance(error, PluginError):
                    raise
                drop(use, error)

    def close() -> None:
        while listeners:
            _close(listeners.pop()[1])

    def report(event: Event) -> None:
        if isinstance(event, RunStarted) and event.number > 1:
            close()
            build(event.folder)
        for use, listener in list(listeners):
            try:
                with held():
                    listener(event)
            except Exception as error:
                listeners.remove((use, listener))
                _close(listener)
                drop(use, error)

    build(out / plan.runs[0].label if plan.swept else out, first=True)
    try:
        yield report
    finally:
        close()


def _close(listener: Reporter) -> None:
    with suppress(Exception), held():
        if isinstance(listener, Closing):
            listener.close()
