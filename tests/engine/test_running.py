"""A run of a plan: reporters for each run, with its folder, told of what is stored too."""

import dataclasses

import pytest

from prunekit.catalog.component import NoOptions, Use
from prunekit.catalog.kinds import ReporterComponent
from prunekit.engine.running import run_plan
from prunekit.report import EpochDone, Note, RunDone, RunStarted, StageDone, StageStarted

PARTS = """
told = []


def build(options, context):
    events = []
    told.append((context.folder, events))
    return events.append
"""


@pytest.fixture
def listen(tmp_path, monkeypatch):
    """(folder, events) of each reporter that a plan builds."""
    (tmp_path / "listening.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    import listening

    listening.told.clear()
    component = ReporterComponent(name="listen", summary="Listens", build="listening:build")

    def run(bench, plan, out):
        plan = dataclasses.replace(plan, reporters=(Use(component, NoOptions(), "test"),))
        store = bench.folder / "store"
        run_plan(plan, bench.folder / out, store, force=False, resume="", tell=print)
        found = list(listening.told)
        listening.told.clear()
        return found

    return run


def test_each_run_has_reporters_of_its_own(bench, listen):
    plan = bench.plan(recipe=bench.recipe + "[sweep]\nseed = [0, 1]\n")
    first, second = listen(bench, plan, "out")
    assert [folder for folder, _ in (first, second)] == [
        bench.folder / "out" / run.label for run in plan.runs
    ]
    assert isinstance(first[1][0], Note)  # of the rehearsal
    for number, (folder, events) in enumerate((first, second), start=1):
        (started,) = [event for event in events if isinstance(event, RunStarted)]
        assert (started.number, started.folder) == (number, folder)
        assert isinstance(events[-1], RunDone)


def test_what_is_stored_is_told_from_its_start(bench, listen):
    listen(bench, bench.plan(), "out")
    ((_, events),) = listen(bench, bench.plan(), "again")
    told = [(e.stage, e.stored) for e in events if isinstance(e, StageStarted)]
    assert told == [(name, True) for name in ("pretrain", "prune", "finetune", "evaluate")]
    assert all(e.stored for e in events if isinstance(e, EpochDone))
    assert all(e.reused for e in events if isinstance(e, StageDone))
    kinds = [type(e) for e in events if isinstance(e, StageStarted | StageDone)]
    assert kinds == [StageStarted, StageDone] * 4


def test_a_reporter_that_cannot_be_built_for_a_later_run_is_left_out(bench, tmp_path, monkeypatch):
    (tmp_path / "picky.py").write_text(
        "from prunekit import UserError\n"
        "def build(options, context):\n"
        "    if 'seed=1' in str(context.folder):\n"
        "        raise UserError('not there')\n"
        "    return lambda event: None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    component = ReporterComponent(name="picky", summary="Picky", build="picky:build")
    plan = bench.plan(recipe=bench.recipe + "[sweep]\nseed = [0, 1]\n")
    plan = dataclasses.replace(plan, reporters=(Use(component, NoOptions(), "test"),))
    told = []
    out, store = bench.folder / "out", bench.folder / "store"
    folders = run_plan(plan, out, store, force=False, resume="", tell=told.append)
    assert [folder.status for folder in folders] == ["done", "done"]
    assert [text for text in told if "picky" in text and "goes on without it" in text]
