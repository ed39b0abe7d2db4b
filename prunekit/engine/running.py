"""A run of a plan: its device, folders and reporters around the engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from prunekit.catalog.component import Use
from prunekit.catalog.containment import held
from prunekit.contexts import ReporterContext
from prunekit.engine.engine import Engine
from prunekit.engine.jobs import Jobs, run_beside
from prunekit.engine.keys import make_keys
from prunekit.engine.work import Inputs, open_place
from prunekit.errors import Interrupted, PluginError, UserError, explain_briefly, relative
from prunekit.recipe.plan import Plan, Run
from prunekit.report import Closing, Event, Note, Report, Reporter, RunStarted, Stop, Tell
from prunekit.store.files import OTHER_FOLDER, relative_link, set_aside
from prunekit.store.out_folder import ANEW, MOMENT, OutFolder
from prunekit.store.runs import RunFolder
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
    runs: Sequence[Run] | None = None,
    jobs: Jobs | None = None,
) -> list[RunFolder] | None:
    """Run a plan into a folder, or only some of its `runs`; None if its results are there already.

    A sweep may be run by several processes in the same folder: each takes runs that no other has
    begun, and only its own are returned. `tell` gets messages that are not events: how to `resume`
    after `Interrupted`, or to compute `anew` what was made with other sources. Errors say how to
    write `elsewhere`.
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
    joined, seen = folder.look()
    if joined:
        tell(f"another process is running in {relative(out)}: this one takes what is not begun")
    chosen = plan.runs if runs is None else runs
    gathers = jobs is not None or None
    try:
        with (
            nullcontext() if plan.swept else folder.alone(),
            compute.active(),
            reporters(
                plan, folder.runs()[plan.runs.index(chosen[0])].path, tell, gathers
            ) as report,
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
            engine.seen = seen if plan.swept else {}
            with engine.stop.listen():
                if jobs is None:
                    folders = engine.run(plan, out, chosen)
                else:
                    folders = run_beside(engine, plan, out, chosen, jobs, tell)
            _finish(folder, engine.inputs)
    except Interrupted:
        # Not earlier: the live display would draw over it.
        tell(f"everything so far is saved; resume with: {resume}")
        raise
    return folders


def _finish(folder: OutFolder, inputs: Inputs) -> None:
    """Record whether the plan is done: who ends the last of its runs finds that it is."""
    made: dict[str, Any] = {}
    if set(folder.find_statuses().values()) == {"done"}:
        # Here or on another machine: what its runs read may not be at hand.
        with suppress(Exception), held():
            made = _describe_making(folder.plan, inputs)
    with folder.alone(MOMENT) if folder.plan.swept else nullcontext():
        done = bool(made) and folder.is_complete(made["stages"])
        folder.mark(done=done, **(made if done else {}))


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
def reporters(
    plan: Plan, folder: Path, tell: Tell, gathers: bool | None = None
) -> Iterator[Report]:
    """One report function for all reporters; a reporter that fails is dropped with a message.

    They are built anew for each run, with its folder; what is told before the first run goes to
    that run's, in `folder`. With `gathers`, only those whose declaration says the same. Raises
    `UserError` if a reporter says so when it is built.
    """
    live = (
        sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )
    kept = [u for u in plan.reporters if gathers is None or u.component.gathers == gathers]
    listeners: list[tuple[Use[Reporter], Reporter]] = []

    def drop(use: Use[Reporter], error: BaseException) -> None:
        kept.remove(use)
        told = f"reporter {use.component.name!r} of plugin {use.plugin} failed: "
        told += explain_briefly(error)
        told = str(error) if isinstance(error, PluginError) else told
        tell(f"{told}; the run goes on without it")

    def build(place: Path, *, first: bool = False) -> None:
        nonlocal folder
        folder = place
        for use in list(kept):
            try:
                listeners.append((use, use.build(ReporterContext(seed=0, folder=place, live=live))))
            except Exception as error:
                if first and isinstance(error, UserError) and not isinstance(error, PluginError):
                    raise
                drop(use, error)

    def close() -> None:
        while listeners:
            _close(listeners.pop()[1])

    def report(event: Event) -> None:
        if isinstance(event, RunStarted) and event.folder != folder:
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

    build(folder, first=True)
    try:
        yield report
    finally:
        close()


def _close(listener: Reporter) -> None:
    with suppress(Exception), held():
        if isinstance(listener, Closing):
            listener.close()
