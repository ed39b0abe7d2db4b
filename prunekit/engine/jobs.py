"""Runs of a sweep side by side: the processes, what they are told, and what they say."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.engine.engine import Engine
from prunekit.engine.rehearsal import rehearse
from prunekit.engine.schedule import Schedule
from prunekit.errors import Interrupted, RunError
from prunekit.models.failures import explain
from prunekit.recipe.plan import Plan, Run
from prunekit.report import FromRun, Note, RunFailed, StageDone, Tell
from prunekit.store.out_folder import digest
from prunekit.store.runs import RunFolder

PATIENCE = 10.0
"""Seconds that a process has to save what it does, once it must end at once."""


@dataclass(frozen=True)
class Jobs:
    """How runs go side by side: a process for each of the `devices`.

    `settings` and `trust` are those that the plan was made with: each process makes it again.
    """

    devices: tuple[str, ...]
    settings: tuple[str, ...] = ()
    trust: bool = False


@dataclass(frozen=True)
class Order:
    """What a process is told first: on which plan it works (its `digest`), where, and how."""

    recipe: Path
    settings: tuple[str, ...]
    trust: bool
    smoke: bool
    digest: str
    out: Path
    store: Path
    seen: Mapping[str, Any]
    threads: int
    device: str


@dataclass(frozen=True)
class Task:
    """A run to execute; keys of the results that `failed` before; why it is `broken`, if it is."""

    run: str
    failed: Mapping[str, str]
    broken: str = ""


@dataclass(frozen=True)
class Ended:
    """How a run ended: its status, "" if another process has it, and what a `RunFolder` knows."""

    status: str
    error: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    trace: str = ""


@dataclass(frozen=True)
class Unfit:
    """Why a process cannot execute runs."""

    reason: str


@dataclass(eq=False)
class _Worker:
    """A process, the run that it executes, and the thread that listens to it."""

    order: Order
    process: subprocess.Popen[bytes]
    run: Run | None = None
    listener: threading.Thread | None = None

    @property
    def label(self) -> str:
        return self.run.label if self.run else ""

    def tell(self, message: Order | Task) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):  # that it died is seen where it is listened to
            self.process.stdin.write(pickle.dumps(message))
            self.process.stdin.flush()

    def end(self) -> None:
        """Let it save what it does, and end: as it does when this process is killed."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()


Inbox = queue.Queue[tuple[_Worker, Any]]
"""Of each process: events, `Ended`, `Unfit`, lines that it printed; None when it has ended."""


def run_beside(
    engine: Engine, plan: Plan, out: Path, runs: Sequence[Run], jobs: Jobs, tell: Tell
) -> list[RunFolder]:
    """Execute runs as `Engine.run` does, to the same results, but in several processes.

    A run whose process dies has failed, and another process goes on with the others.
    """
    inbox: Inbox = queue.Queue()
    own = (plan.path, jobs.settings, jobs.trust, plan.smoke, digest(plan), out, engine.store.root)

    def hire(device: str) -> _Worker:
        return _start(Order(*own, engine.seen, engine.compute.threads, device), inbox)

    crew = [hire(device) for device in jobs.devices[: len(runs)]]
    try:
        engine.report(Note(_describe_jobs(engine, jobs.devices[: len(runs)])))
        broken = {} if engine.smoke else rehearse(engine, runs)
        schedule = Schedule(engine, runs, broken)
        folders: dict[str, RunFolder] = {}
        while crew:
            for worker in crew:
                if engine.stop.requested or not (worker.run or schedule.waiting):
                    worker.end()
                elif worker.run is None:
                    worker.run = run = schedule.take(w.label for w in crew if w.run)
                    if run:
                        error = broken.get(run.label)
                        told = explain(error, run) if error else ""
                        worker.tell(Task(run.label, engine.failed, told))
            if not (heard := _hear(inbox, crew)):
                continue
            worker, message = heard
            run, label = worker.run, worker.label
            match message:
                case str():
                    tell(f"{label}: {message}" if label else message)
                case Unfit():
                    raise RunError(message.reason)
                case Ended() if run:
                    worker.run = None
                    engine.failed.update(message.failed)
                    if message.status:
                        folders[label] = folder = RunFolder(out / label, plan, run, message.status)
                        folder.metrics, folder.error = dict(message.metrics), message.error
                        folder.cause = broken.get(label, RunError(message.trace))
                case None if worker in crew:
                    crew.remove(worker)
                    worker.process.wait()
                    if not engine.stop.requested:
                        if run:
                            folders[label] = _bury(
                                engine, RunFolder(out / label, plan, run), worker
                            )
                        if schedule.waiting:
                            crew.append(hire(worker.order.device))
                case _ if message is not None:
                    engine.report(FromRun(label, message))
                    if isinstance(message, StageDone):
                        schedule.note(label, message.key)
    finally:
        _dismiss(crew)
    if engine.stop.requested:
        raise Interrupted
    return [folders[run.label] for run in plan.runs if run.label in folders]


def _describe_jobs(engine: Engine, devices: Sequence[str]) -> str:
    """How many processes of how many threads there are, and whether the machine has so many."""
    number, threads = len(devices), engine.compute.threads
    jobs = f"{number} job{'s' * (number > 1)}"
    if engine.compute.device.type != "cpu":
        return f"{jobs} on {', '.join(dict.fromkeys(devices))}"
    of = f"{jobs} of {threads} thread{'s' * (threads > 1)}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores and number * threads > cores:
        fit = max(1, cores // number)
        way = f"; --threads {fit} may be faster" if fit < threads else ""
        return f"{of} each, on {cores} core{'s' * (cores > 1)}{way}"
    return f"{of} each"


def _start(order: Order, inbox: Inbox) -> _Worker:
    """Start a process that is told what to do over its stdin, and the threads that listen to it."""
    code = f"import sys; sys.path[:] = {sys.path!r}; import prunekit.engine.worker as w; w.work()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches this process alone, which lets the others end
    )
    worker = _Worker(order, process)
    worker.tell(order)

    def hear_events() -> None:
        assert process.stdout is not None
        # Whatever is left of the last message of a process that was killed.
        with suppress(Exception):
            while True:
                inbox.put((worker, pickle.load(process.stdout)))
        inbox.put((worker, None))

    def hear_lines() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            inbox.put((worker, line.decode(errors="replace").rstrip()))

    threading.Thread(target=hear_lines, daemon=True).start()
    worker.listener = threading.Thread(target=hear_events, daemon=True)
    worker.listener.start()
    return worker


def _hear(inbox: Inbox, crew: Sequence[_Worker]) -> tuple[_Worker, Any] | None:
    """The next message, if there is one soon."""
    with suppress(queue.Empty):
        return inbox.get(timeout=0.2)
    for worker in crew:
        # One that has ended may have left a process of its own, which holds its stdout.
        if worker.process.poll() is not None and worker.listener:
            worker.listener.join(1)
            if worker.listener.is_alive():
                return worker, None
    return None


def _bury(engine: Engine, folder: RunFolder, worker: _Worker) -> RunFolder:
    """Record that a run failed because its process ended."""
    code = worker.process.returncode
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    how += "; did memory run out?" if how == "SIGKILL" else ""
    error = f"its process ended ({how}); the same command goes on from there"
    with folder.alone() as mine:
        if mine:
            folder.start(engine.compute.describe())
            folder.close("failed", error)
    engine.report(FromRun(folder.run.label, RunFailed(folder.run.label, folder.path, error)))
    return folder


def _dismiss(crew: Sequence[_Worker]) -> None:
    """End processes at once, but not before they saved what can be saved in a moment."""
    for worker in crew:
        worker.end()
        worker.process.terminate()
    for worker in crew:
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(PATIENCE)
        worker.process.kill()
        worker.process.wait()
