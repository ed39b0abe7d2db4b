"""What the reporters leave behind: lines on stderr, a clean terminal, strict JSON."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
from prunekit_reporters import console, jsonl
from rich.console import Console

from prunekit.catalog.component import NoOptions
from prunekit.contexts import ReporterContext
from prunekit.contracts import Metric
from prunekit.report import (
    EpochDone,
    Event,
    FromRun,
    Note,
    Progress,
    RunDone,
    RunFailed,
    RunStarted,
    StageDone,
    StageStarted,
    rehearsing,
)
from prunekit.testing import example_context

VALID = "validation.robust_accuracy"
VALUE = Metric(0.5, unit="fraction")
ATTACKED = Metric(0.875, unit="fraction", note="attacked training images")


def tell_run(folder: Path, *, smoke: bool = False) -> list[Event]:
    settings = {"prune.pruner": {"use": "snip", "batches": 2}, "prune.sparsity": 0.9}
    return [
        RunStarted("a", folder, ("pretrain", "prune", "evaluate"), settings, 2, 6, smoke),
        StageStarted("pretrain", "pretrain", "k0"),
        StageDone(
            "pretrain", "pretrain", "k0", {"accuracy": Metric(0.91, unit="fraction")}, reused=True
        ),
        Note("runs on a CPU"),
        Note("3 layers left dense", warning=True),
        StageStarted("prune", "prune", "k1", epochs=10, batches=20, epoch=8, batch=4),
        EpochDone("prune", 8, 10, {"loss": 0.7}, stored=True),
        Progress("prune", 5, 20, epoch=8, epochs=10, metrics={"loss": 0.6}),
        EpochDone(
            "prune",
            9,
            10,
            {"loss": 0.56789, "accuracy": Metric(0.8125, unit="fraction"), VALID: VALUE},
            seconds=12.34,
            decides=VALID,
        ),
        EpochDone(
            "prune",
            10,
            10,
            {"loss": 0.5, "accuracy": ATTACKED},
            best=True,
            seconds=9,
        ),
        StageDone(
            "prune",
            "prune",
            "k1",
            {
                "sparsity": Metric(0.9, unit="sparsity"),
                "loss": 0.5,
                "layers": {"0": 1},
                VALID: VALUE,
                "select": "robust_accuracy",
            },
            seconds=75,
        ),
        RunDone("a", folder, {}, seconds=7260),
    ]


LINES = """\
run 2/6 prune.pruner=snip(batches=2) prune.sparsity=0.9: pretrain > prune > evaluate
pretrain  stored already  accuracy 91.0%
note: runs on a CPU
warning: 3 layers left dense
prune  resumes at epoch 9/10, batch 5/20
prune  epoch  9/10        validation.robust_accuracy 50.0%  accuracy 81.2%  12s  loss 0.5679
prune  epoch 10/10  best  accuracy 87.5% (attacked training images)  9.0s  loss 0.5
prune  done in 1m15s  validation.robust_accuracy 50.0%  sparsity 90.00%
run 2/6 prune.pruner=snip(batches=2) prune.sparsity=0.9 done in 2h01m: FOLDER
"""


@pytest.mark.parametrize(
    ("live", "environment"),
    [(False, {}), (False, {"FORCE_COLOR": "1"}), (True, {"NO_COLOR": "1"})],
)
def test_lines_are_plain_off_a_terminal_and_without_colour(
    live: bool,
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    report = console.build(NoOptions(), example_context(ReporterContext, live=live))
    for event in tell_run(tmp_path):
        report(event)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == LINES.replace("FOLDER", str(tmp_path))


def test_smoke_and_failure_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = console.build(NoOptions(), example_context(ReporterContext))
    report(RunStarted("quickstart", tmp_path, ("evaluate",), smoke=True))
    report(RunFailed("quickstart", tmp_path, "the loss is nan [step 3]"))
    assert capsys.readouterr().err == (
        "SMOKE run 1/1 quickstart: evaluate\n"
        "SMOKE run 1/1 quickstart FAILED: the loss is nan [step 3]\n"
    )


def make_live_screen() -> tuple[console.Screen, io.StringIO]:
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=80, color_system=None)
    return console.Screen(terminal, live=True), file


@pytest.mark.parametrize("end", ["done", "failed", "interrupted"])
def test_live_display_leaves_the_terminal_as_it_was(end: str, tmp_path: Path) -> None:
    screen, file = make_live_screen()
    *events, done = tell_run(tmp_path, smoke=True)
    before = sys.stderr
    for event in events:
        screen(event)
    shown = file.getvalue()
    assert "SMOKE run 2/6" in shown
    assert shown.rfind("\x1b[?25l") > shown.rfind("\x1b[?25h")
    if end == "interrupted":
        screen.close()
    else:
        screen(done if end == "done" else RunFailed("a", tmp_path, "no memory"))
        screen(Note("between two runs nothing is drawn"))
    shown = file.getvalue()
    screen.close()
    assert file.getvalue() == shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")
    assert sys.stderr is before


def test_live_display_shows_place_numbers_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(console, "monotonic", lambda: clock[0])
    # Between events, nothing is drawn here.
    monkeypatch.setattr(console, "TICKS", 1e-3)
    screen, file = make_live_screen()
    screen(RunStarted("a", tmp_path, ("pretrain", "prune")))
    screen(StageStarted("prune", "prune", "k", epochs=10, batches=20, epoch=2))
    clock[0] = 30.0
    # From 2 to 3.5 of 10 epochs in 30 s: at 20 s an epoch the other 6.5 take 130 s.
    screen(
        Progress(
            "prune",
            10,
            20,
            epoch=3,
            epochs=10,
            metrics={"loss": 0.25, "accuracy": Metric(0.5, unit="fraction")},
        )
    )
    drawn = file.getvalue()
    assert "prune  2/2  epoch 4/10  batch 10/20" in drawn
    assert "30s, 2m10s left" in drawn
    assert "accuracy 50.0%  loss 0.25" in drawn
    # A tenth of a second later is too early to draw again, unless something else begins.
    clock[0] = 30.1
    screen(Progress("prune", 11, 20, epoch=3, epochs=10))
    assert file.getvalue() == drawn
    screen(Progress("prune", 1, 3, epoch=3, epochs=10, label="validating"))
    assert "epoch 4/10  validating  batch 1/3" in file.getvalue().removeprefix(drawn)
    screen.close()


def test_time_left_of_evaluators_is_counted_for_each() -> None:
    part = console.Part(StageStarted("evaluate", "evaluate", "k"), began=0.0)
    part = part.advance(Progress("evaluate", 2, 4, label="clean"), 10.0)
    assert part.estimate(10.0) == 10.0
    part = part.advance(Progress("evaluate", 1, 10, label="pgd"), 20.0)
    assert part.estimate(20.0) is None
    part = part.advance(Progress("evaluate", 4, 10, label="pgd"), 50.0)
    assert part.estimate(50.0) == pytest.approx(60.0)
    # While nothing happens, time goes by; it does not become 0 s.
    assert part.estimate(70.0) == pytest.approx(40.0)
    assert part.estimate(111.0) is None
    part = part.advance(Progress("evaluate", 10, 10, label="pgd"), 120.0)
    assert part.estimate(120.0) is None


def test_runs_side_by_side_have_a_line_each_and_their_labels(tmp_path: Path) -> None:
    screen, file = make_live_screen()
    for label in ("a", "b"):
        screen(FromRun(label, RunStarted(label, tmp_path, ("prune",))))
        screen(FromRun(label, StageStarted("prune", "prune", "k", epochs=4)))
    for label in ("a", "b"):
        screen(FromRun(label, Progress("prune", 1, 2, epoch=1, epochs=4)))
    drawn = file.getvalue()
    for label in ("a", "b"):
        assert f"{label}  prune  1/1  epoch 2/4  batch 1/2" in drawn
    screen(FromRun("b", Note("slow")))
    assert "b  note: slow" in file.getvalue()
    screen(FromRun("a", RunDone("a", tmp_path, {}, 3.0)))
    assert screen.display is not None
    # A process may die before its run begins.
    screen(FromRun("c", RunFailed("c", tmp_path, "killed")))
    assert "c  run c FAILED: killed" in file.getvalue()
    screen(FromRun("b", RunDone("b", tmp_path, {}, 3.0)))
    assert screen.display is None
    shown = file.getvalue()
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")


def test_a_long_attack_is_named_and_ticks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "TICKS", 50)
    screen, file = make_live_screen()
    screen(RunStarted("a", tmp_path, ("evaluate",)))
    screen(StageStarted("evaluate", "evaluate", "k"))
    for label, done in (("pgd", 1), ("pgd", 2), ("autoattack", 0)):
        screen(Progress("evaluate", done, 2, label=label))
    before = len(file.getvalue())
    assert "evaluate  1/1  autoattack  batch 1/2" in file.getvalue()
    end = monotonic() + 20
    while "autoattack" not in file.getvalue()[before:]:
        assert monotonic() < end
    screen.close()
    shown = file.getvalue()
    assert " left" not in shown[shown.index("autoattack") :]


def test_a_rehearsal_is_shown_before_any_run() -> None:
    screen, file = make_live_screen()
    report = rehearsing(screen)
    report(StageStarted("prune", "prune", "k"))
    report(Progress("evaluate", 0, 1, label="pgd"))
    report(Note("not of the rehearsal"))
    screen.close()
    assert "rehearsal  prune  batch 1/1" in file.getvalue()
    assert "rehearsal  evaluate  pgd  batch 1/1" in file.getvalue()
    assert "not of" not in file.getvalue()


@pytest.mark.parametrize("epochs", [15, 100])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_an_epoch_is_whole_in_80_columns(epochs: int, stage: str) -> None:
    """What decides comes first, then of what the accuracy is; what does not fit is left out."""
    numbers = {"loss": 2.3, "accuracy": ATTACKED, "validation.accuracy": VALUE, VALID: VALUE}
    event = EpochDone(stage, 1, epochs, numbers, best=True, seconds=75.0, decides=VALID)
    line = console.describe_epoch(event, 80)
    number = f"epoch {1:>{len(str(epochs))}}/{epochs}"
    told = f"{stage}  {number}  best  {VALID} 50.0%  attacked 87.5%"
    assert line.startswith(told)
    assert len(line) <= 80
    assert console.describe_epoch(event, None) == (
        f"{stage}  {number}  best  {VALID} 50.0%  accuracy 87.5% (attacked training images)"
        "  1m15s  validation.accuracy 50.0%  loss 2.3"
    )


def test_validation_after_an_epoch_moves_no_bar() -> None:
    part = console.Part(StageStarted("prune", "prune", "k", epochs=4), began=0.0)
    part = part.advance(Progress("prune", 8, 8, epoch=1, epochs=4, label="training"), 1.0)
    part = part.advance(Progress("prune", 1, 3, epoch=1, epochs=4, label="validating"), 2.0)
    assert part.fraction == 0.5


@pytest.mark.parametrize(
    ("started", "line"),
    [
        (StageStarted("e", "evaluate", "k", batches=9, batch=3), "e  resumes at batch 4/9\n"),
        (StageStarted("p", "prune", "k", epochs=2, epoch=2), "p  resumes at its end\n"),
        (StageStarted("p", "prune", "k", epochs=2), ""),
    ],
)
def test_where_a_stage_goes_on(
    started: StageStarted, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.build(NoOptions(), example_context(ReporterContext))(started)
    assert capsys.readouterr().err == line


def read_strictly(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_jsonl_has_every_event_but_progress_in_order(tmp_path: Path) -> None:
    report = jsonl.build(NoOptions(), example_context(ReporterContext, folder=tmp_path))
    for event in tell_run(tmp_path):
        report(event)
    lines = read_strictly(tmp_path / "metrics.jsonl")
    assert " ".join(line["event"] for line in lines) == (
        "run_started stage_started stage_done note note stage_started epoch epoch epoch stage_done"
        " run_done"
    )
    assert {line["run"] for line in lines} == {"a"}
    time = datetime.fromisoformat(lines[6].pop("time"))
    offset = time.utcoffset()
    assert offset is not None
    assert not offset
    assert lines[6] == {
        "event": "epoch",
        "run": "a",
        "stage": "prune",
        "epoch": 8,
        "epochs": 10,
        "best": False,
        "seconds": 0.0,
        "stored": True,
        "decides": "",
        "loss": 0.7,
    }
    assert lines[0]["settings"]["prune.sparsity"] == 0.9
    assert "smoke" not in lines[1]


def test_jsonl_is_there_line_by_line_and_starts_afresh_with_its_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("left by an earlier process\n")
    report = jsonl.build(NoOptions(), example_context(ReporterContext, folder=tmp_path))
    report(Note("before any run"))
    report(RunStarted("a", tmp_path, ("prune",), smoke=True))
    report(EpochDone("prune", 1, 2, {"loss": 1.0}))
    assert len(read_strictly(tmp_path / "metrics.jsonl")) == 2
    report(RunFailed("a", tmp_path, "out of memory"))
    report(Note("after it"))
    lines = read_strictly(tmp_path / "metrics.jsonl")
    assert [line["smoke"] for line in lines] == [True] * 3
    assert lines[-1]["error"] == "out of memory"


def test_jsonl_is_strict_whatever_the_metrics_are(tmp_path: Path) -> None:
    report = jsonl.build(NoOptions(), example_context(ReporterContext, folder=tmp_path))
    report(RunStarted("a", tmp_path, ("prune",)))
    odd: dict[str, Any] = {
        "nan": float("nan"),
        "inf": float("inf"),
        "nested": {"low": [float("-inf"), np.float32(0.5)]},
        "count": np.int64(3),
        "path": Path("x"),
        "epoch": 99,
    }
    report(EpochDone("prune", 1, 2, odd))
    line = read_strictly(tmp_path / "metrics.jsonl")[-1]
    assert line["nan"] is None
    assert line["inf"] is None
    assert line["nested"] == {"low": [None, 0.5]}
    assert line["count"] == 3
    assert line["path"] == "x"
    assert line["epoch"] == 1


def test_declarations_import_neither_rich_nor_torch() -> None:
    code = (
        "import sys, prunekit_reporters as p; names = [c.name for c in p.prunekit_reporters()];"
        "print(names, [m for m in ('rich', 'torch') if m in sys.modules])"
    )
    path = Path(console.__file__).parent.parent
    told = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({str(path)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == "['console', 'jsonl'] []\n"
