"""Runs of a sweep side by side: the same bits, nothing twice, and nothing lost."""

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from prunekit.engine.keys import make_keys
from prunekit.engine.schedule import choose
from prunekit.engine.work import Inputs
from prunekit.report import StageDone
from prunekit.store.runs import claim
from prunekit.store.stages import Store

SWEEP = """
name = "s"
architecture = "small-cnn"
objective = "benign"
report = ["console", "jsonl"]
[compute]
device = "cpu"
threads = 1
[dataset]
use = "digits"
fraction = 0.1
[[stage]]
kind = "pretrain"
epochs = 2
[[stage]]
kind = "prune"
sparsity = 0.5
pruner = "lwm"
[[stage]]
kind = "finetune"
epochs = 1
[[stage]]
kind = "evaluate"
with = ["clean"]
images = 20
[sweep]
"finetune.optimizer.lr" = [0.1, 1e30, 0.05]
"""
LABELS = ["lr=0.1", "lr=1e+30", "lr=0.05"]


@pytest.fixture
def sweep(here):
    (here / "s.toml").write_text(SWEEP)
    return here


def read(folder):
    return json.loads((folder / "run.json").read_text())


def statuses(out):
    return {label: read(out / label)["status"] for label in LABELS if (out / label).exists()}


def files(out):
    """What runs have computed: their networks, records and epochs, and the keys of the stages."""
    found = {}
    for path in sorted(out.glob("*/*")):
        if path.name in ("model.safetensors", "records.npz"):
            found[path.relative_to(out)] = path.read_bytes()
        elif path.name == "run.json":
            found[path.relative_to(out)] = [
                s["key"] for s in json.loads(path.read_text())["stages"]
            ]
    return found


def test_what_most_wait_for_comes_first_and_nobody_waits_for_what_is_owed():
    waiting = {"a": ["p", "x"], "b": ["q", "y"], "c": ["q", "z"], "d": []}
    assert choose(waiting, []) == "b"
    # Somebody else computes that: what is free comes first.
    assert choose(waiting, [], lambda key: key == "q") == "a"
    assert choose(waiting, ["q"]) == "a"
    assert choose({"c": ["q", "z"]}, ["q", "y"]) is None
    assert choose({"d": []}, ["q"]) == "d"
    assert choose({}, []) is None


@pytest.mark.slow
def test_side_by_side_gives_the_same_bits_and_computes_what_is_shared_once(sweep, call):
    call("run", "s.toml", "--out", "one/s", code=1)
    out, err = call("run", "s.toml", "--out", "two/s", "--jobs", "2", code=1)
    assert "note: 2 jobs of 1 thread each" in err
    assert statuses(sweep / "two/s") == dict(zip(LABELS, ["done", "failed", "done"], strict=True))
    assert files(sweep / "two/s") == files(sweep / "one/s")
    reused = [read(sweep / "two/s" / label)["stages"][0]["reused"] for label in LABELS]
    assert sorted(reused) == [False, True, True]
    # Every line says whose it is; the failure is told once more at the end.
    assert "lr=0.05  finetune  epoch 1/1  best" in err
    assert "prunekit: run 'lr=1e+30' failed: " in err.splitlines()[-1]
    assert "accuracy" in out
    log = (sweep / "two/s/lr=0.1/metrics.jsonl").read_text().splitlines()
    assert [json.loads(log[i])["event"] for i in (0, -1)] == ["run_started", "run_done"]


def test_a_part_of_a_sweep_and_what_is_missing(sweep, call):
    _, err = call("run", "s.toml", "--only", "lr=0.05")
    assert "not done, of 3 runs: lr=0.1 (missing), lr=1e+30 (missing)\n" in err
    assert statuses(sweep / "runs/s") == {"lr=0.05": "done"}
    assert not json.loads((sweep / "runs/s/plan.json").read_text())["done"]
    _, err = call("run", "s.toml", "--only", "lr=5", code=2)
    assert err == "prunekit: there is no run 'lr=5'; did you mean 'lr=0.05'?\n"


def test_parts_one_after_another_are_the_whole(sweep, call):
    sweep.joinpath("s.toml").write_text(SWEEP.replace("1e30, ", ""))
    call("run", "s.toml", "--only", "*.1")
    call("run", "s.toml", "--only", "lr=0.05")
    assert json.loads((sweep / "runs/s/plan.json").read_text())["done"]
    _, err = call("run", "s.toml")
    assert "runs/s is done already" in err


def test_a_second_process_takes_what_nobody_has_begun(sweep, call):
    sweep.joinpath("s.toml").write_text(SWEEP.replace("1e30, ", ""))
    call("run", "s.toml", "--only", "lr=0.05")
    mark = sweep / "runs/s/plan.json"
    (sweep / "runs/s/lr=0.1").mkdir()
    before = (sweep / "runs/s/lr=0.05/run.json").stat().st_mtime_ns
    with claim(sweep / "runs/s/lr=0.1"):
        _, err = call("run", "s.toml")
        assert "another process is running in runs/s: this one takes what is not begun" in err
        assert "not done, of 2 runs: lr=0.1 (missing)" in err
        # It has done this one, as far as anybody knows.
        assert (sweep / "runs/s/lr=0.05/run.json").stat().st_mtime_ns == before
        _, err = call("run", "s.toml", "--force", code=2)
        assert "another process is running in runs/s; wait for it" in err
    assert not json.loads(mark.read_text())["done"]
    call("run", "s.toml")
    assert json.loads(mark.read_text())["done"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--devices", "cpu,meta"], "--devices must be of one type, which is part of what results"),
        (["--devices", "cpu,cuda:99"], "no device 'cuda:99' here ("),
        (["--devices", "cpu", "--device", "cpu"], "--device and --devices exclude each other"),
        (["--jobs", "0"], "0 is not in the range x>=1"),
    ],
)
def test_mistakes_are_answered_in_one_line(sweep, call, arguments, told):
    _, err = call("run", "s.toml", *arguments, code=2)
    assert told in err
    assert not (sweep / "runs").exists()


def test_a_run_goes_on_while_another_process_evaluates(bench):
    dense = '[[stage]]\nkind = "evaluate"\nname = "dense"\nwith = ["clean"]\n'
    recipe = bench.recipe.replace('[[stage]]\nkind = "prune"', f'{dense}[[stage]]\nkind = "prune"')
    bench.run(recipe=recipe, out="one", store="one-store")
    (run,) = bench.plan(recipe=recipe).runs
    keys = make_keys(run, Inputs(bench.compute, bench.events.append).load(run), bench.compute)
    ends, told = ExitStack(), []

    def report(event):
        if isinstance(event, StageDone):
            told.append(event.stage)
            if event.stage == "finetune":
                ends.close()

    with ends:
        ends.enter_context(Store(bench.folder / "store").locked(keys[1].parts[0], pytest.fail))
        bench.run(recipe=recipe, report=report)
    assert told == ["pretrain", "prune", "finetune", "evaluate", "dense"]
    first, second = read(bench.folder / "one"), read(bench.folder / "out")
    assert [s["name"] for s in second["stages"]] == [s["name"] for s in first["stages"]]
    assert second["sparsity"] == first["sparsity"]
    assert second["files"] == first["files"]


SLOW = SWEEP.replace("fraction = 0.1", "").replace("[0.1, 1e30, 0.05]", "[0.1, 0.05]")


@pytest.fixture
def start(tmp_path):
    """Starts a sweep whose last stage is long; waits until both runs are in it."""

    def start(epochs):
        recipe = SLOW.replace('"finetune"\nepochs = 1', f'"finetune"\nepochs = {epochs}')
        (tmp_path / "s.toml").write_text(recipe)
        command = [sys.executable, "-m", "prunekit", "run", "s.toml", "--jobs", "2"]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        told, seen = [], set()
        for line in process.stderr:
            told.append(line)
            if "finetune  epoch" in line:
                seen.add(line.split()[0])
            if len(seen) == 2:
                return process
        raise AssertionError("".join(told))

    return start


def find_children(parent):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        if int(rest.split()[1]) == parent:
            found.append(int(name.split()[0]))
    return sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_and_everything_goes_on_from_there(tmp_path, start, number, call):
    process = start(400)
    workers = find_children(process.pid)
    assert len(workers) == 2
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(60) == 130, rest
    assert "everything so far is saved; resume with: prunekit run s.toml --jobs 2" in rest
    assert "Traceback" not in rest
    assert {read(p.parent)["status"] for p in (tmp_path / "runs/s").glob("*/run.json")} == {
        "interrupted"
    }
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert len(list((tmp_path / "runs/.stages/v3").glob("*/progress.safetensors"))) == 2


@pytest.mark.slow
def test_two_processes_share_a_folder(sweep):
    recipe = SWEEP.replace("[0.1, 1e30, 0.05]", "[0.1, 0.05]").replace("fraction = 0.1", "")
    (sweep / "s.toml").write_text(recipe)
    command = [sys.executable, "-m", "prunekit", "run", "s.toml"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert json.loads((sweep / "runs/s/plan.json").read_text())["done"]
    # Whoever took it: a run began once, and what they share was computed once.
    text = "".join(told)
    assert [text.count(f"run {n}/2 finetune.optimizer.lr=") for n in (1, 2)] == [2, 2]
    assert text.count("pretrain  done in") == 1


@pytest.mark.slow
def test_a_killed_process_is_told_and_the_others_go_on(tmp_path, start, call):
    process = start(12)
    os.kill(find_children(process.pid)[0], signal.SIGKILL)
    rest = process.stderr.read()
    assert process.wait(120) == 1, rest
    assert "failed: its process ended (SIGKILL; did memory run out?); the same command" in rest
    told = sorted(read(p.parent)["status"] for p in (tmp_path / "runs/s").glob("*/run.json"))
    assert told == ["done", "failed"]
    _, err = call("run", "s.toml")
    assert "finetune  resumes at epoch" in err
    assert json.loads((tmp_path / "runs/s/plan.json").read_text())["done"]
