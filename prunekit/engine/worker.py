"""The process of a job: executes the runs that it is told to, and sends what they report."""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import IO, Any

from prunekit.catalog.registry import load_registry
from prunekit.engine.engine import Engine
from prunekit.engine.jobs import Ended, Order, Task, Unfit
from prunekit.engine.running import reporters
from prunekit.errors import Interrupted, RunError, UserError, explain_briefly
from prunekit.recipe.plan import Plan, make_plan
from prunekit.recipe.reduction import reduce_plan
from prunekit.report import Event, Progress, Report, Stop
from prunekit.store.out_folder import digest
from prunekit.store.records import open_recipe
from prunekit.store.stages import Store
from prunekit.training.compute import open_compute

INTERVAL = 0.1
"""Seconds between two events of the progress within a stage."""


def work() -> None:
    """Execute tasks from stdin until it is closed: then what is being computed is saved.

    What plugins print goes to stderr, for stdout has the pickled messages.
    """
    told, heard = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    stop, tasks = Stop(), queue.Queue[Task | None]()
    with stop.listen():
        try:
            order: Order = pickle.load(told)
            threading.Thread(target=_listen, args=(told, tasks, stop), daemon=True).start()
            _work(order, tasks, stop, heard)
        except (Interrupted, KeyboardInterrupt):
            sys.exit(130)
        except Exception as error:
            reason = str(error) if isinstance(error, UserError) else explain_briefly(error)
            _send(heard, Unfit(reason))


def _listen(told: IO[bytes], tasks: queue.Queue[Task | None], stop: Stop) -> None:
    # However the other process ended.
    with suppress(Exception):
        while True:
            tasks.put(pickle.load(told))
    stop.requested = True
    tasks.put(None)


def _send(heard: IO[bytes], message: Any) -> None:
    # A plugin's event may hold what cannot be pickled: the display goes without it.
    with suppress(Exception):
        heard.write(pickle.dumps(message))
        heard.flush()


def _work(order: Order, tasks: queue.Queue[Task | None], stop: Stop, heard: IO[bytes]) -> None:
    recipe = open_recipe(order.recipe, order.settings, trust=order.trust)
    plan = make_plan(recipe, load_registry())
    plan = reduce_plan(plan) if order.smoke else plan
    if digest(plan) != order.digest:
        raise RunError(f"{order.recipe} has changed meanwhile; run it again")
    plan.permit()
    compute = open_compute(order.device, order.threads, plan.compute.sparse, plan.backend)
    listeners: list[Report] = []
    drawn = 0.0

    def report(event: Event) -> None:
        nonlocal drawn
        if not isinstance(event, Progress) or monotonic() - drawn > INTERVAL:
            drawn = monotonic() if isinstance(event, Progress) else drawn
            _send(heard, event)
        for listener in listeners:
            listener(event)

    engine = Engine(Store(order.store), compute, report, stop, smoke=plan.smoke)
    engine.seen = order.seen
    with compute.active():
        while (task := tasks.get()) is not None:
            engine.failed.update(task.failed)
            place = order.out / task.run
            with reporters(plan, place, _tell, gathers=False) as listen:
                listeners[:] = [listen]
                _send(heard, _execute(engine, plan, order.out, task))
                listeners.clear()


def _execute(engine: Engine, plan: Plan, out: Path, task: Task) -> Ended:
    run = next(run for run in plan.runs if run.label == task.run)
    folder = engine.take(plan, run, out, RunError(task.broken) if task.broken else None)
    if folder is None:
        return Ended("")
    trace = "".join(traceback.format_exception(folder.cause)) if folder.cause else ""
    return Ended(folder.status, folder.error, folder.metrics, engine.failed, trace)


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
