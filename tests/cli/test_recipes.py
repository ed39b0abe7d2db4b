"""`prunekit check` and `run`: what is printed where, and what a run leaves alone."""

import errno
import json
import os
import signal
import subprocess
import sys

import filelock
import numpy as np
import pytest
from click.testing import CliRunner

from prunekit.cli.group import main
from prunekit.judging import LOOKS

pytestmark = pytest.mark.usefixtures("here")


def test_check_says_good_or_everything_that_is_wrong(here, call, read, recipe):
    (here / "bad.toml").write_text(recipe.replace("epochs = 1", "epoch = 1") + "x = 1\n")
    out, err = call("check", "r.toml", "bad.toml", "gone.toml", code=2)
    assert out == "r.toml: good (1 run)\n"
    first, second, third, last = err.splitlines()
    assert first.startswith("bad.toml:8: stage 'pretrain' needs epochs")
    assert second == (
        "bad.toml:10: unknown option 'epoch' of stage 'pretrain'; did you mean 'epochs'?"
    )
    assert third.startswith("bad.toml:15: unknown option 'x' of stage 'evaluate'")
    assert last == "there is no recipe gone.toml"
    told = read("check", "r.toml", "bad.toml", "gone.toml", code=2)["recipes"]
    assert told[0] == {"recipe": "r.toml", "problems": [], "runs": 1}
    assert [len(r["problems"]) for r in told] == [0, 3, 1]


def test_check_tells_notes_and_counts_runs(here, call):
    (here / "s.toml").write_text('extends = "r.toml"\n[sweep]\nseed = [1, 2]\n')
    assert call("check", "s.toml") == ("s.toml: good (2 runs)\n", "")
    _, err = call("check", "s.toml", "--set", "evaluate.with=[{use='pgd', eps=8}]", code=2)
    assert err == (
        "--set evaluate.with=[{use='pgd', eps=8}]: eps is a radius in [0, 1] pixel units, got 8; "
        'write "8/255"\n'
    )


def test_check_tells_of_a_fraction_that_leaves_nothing(here, call):
    few = ("--set", "dataset.fraction=0.0003")  # of 1,437
    _, err = call("check", "r.toml", *few, code=2)
    assert err.endswith(
        "fraction = 0.0003 leaves none of 1437 training images; give a larger one\n"
    )


@pytest.mark.parametrize(
    ("table", "code", "told"),
    [
        ('{ use = "mnist", download = false }', 2, "c.toml: mnist was not found: there is no "),
        ('{ use = "mnist", root = "there", download = false }', 2, "no there/mnist.npz"),
        ('{ use = "digits", extra = { use = "svhn", download = false } }', 2, "svhn was not found"),
        ('{ use = "image-folder", root = "there" }', 2, "there needs the folders train and val"),
        ('{ use = "imagenet", root = "there" }', 2, "imagenet was not found: there needs"),
        ('"given"', 2, "images of a Python program can only be used there"),
        # What a run may still get.
        ('"mnist"', 0, "its folder torchvision; a run downloads it\n"),
        ('"imagenet"', 0, "with a folder for each class; or set root\n"),
        ('"digits"', 0, ""),
    ],
)
def test_check_looks_for_the_data(here, call, recipe, monkeypatch, table, code, told):
    monkeypatch.setenv("PRUNEKIT_DATA", "nothing")
    rest = recipe.replace('[dataset]\nuse = "digits"\nfraction = 0.1\n', "")
    (here / "c.toml").write_text(f"dataset = {table}\n{rest}")
    _, err = call("check", "c.toml", code=code)
    assert told in err
    assert bool(err) is bool(told)


def test_a_run_writes_its_folder_and_prints_its_results(finished):
    folder, done = finished
    out = folder / "runs/tiny"
    assert {p.name for p in out.iterdir()} >= {
        "recipe.toml", "run.json", "plan.json", "model.safetensors", "records.npz", "metrics.jsonl"
    }  # fmt: skip
    assert "accuracy" in done.stdout
    assert "pretrain" not in done.stdout
    assert "pretrain" in done.stderr
    assert done.stderr.endswith("in runs/tiny\n")
    told = json.loads((out / "run.json").read_text())
    assert (told["status"], told["smoke"], told["seed"]) == ("done", False, 0)
    with np.load(out / "records.npz") as records:
        assert records["evaluate/clean.correct"].shape == (20,)


def test_the_same_recipe_again_prints_what_is_stored(ran, finished, call, read):
    before = {p: p.stat().st_mtime_ns for p in (ran / "runs").rglob("*") if p.is_file()}
    out, err = call("run", "r.toml", "--device", "cpu")
    assert out == finished[1].stdout
    assert err == "runs/tiny is done already: these are its results\nin runs/tiny\n"
    assert {p: p.stat().st_mtime_ns for p in before} == before
    # The resolved recipe is the same recipe.
    assert call("run", "runs/tiny/recipe.toml", "--device", "cpu") == (out, err)
    assert read("run", "r.toml", "--device", "cpu") == read("results")


def test_another_recipe_does_not_overwrite_a_run(ran, call):
    content = (ran / "runs/tiny/run.json").read_bytes()
    out, err = call("run", "r.toml", "--set", "seed=1", "--device", "cpu", code=2)
    assert out == ""
    assert err == (
        "prunekit: runs/tiny holds the runs of another recipe (r.toml); choose another folder with "
        "--out, or move it aside with --force\n"
    )
    call("run", "r.toml", "--set", "seed=1", "--device", "cpu", "--force")
    assert (ran / "runs/tiny.old1/run.json").read_bytes() == content
    assert json.loads((ran / "runs/tiny/run.json").read_text())["seed"] == 1
    call("run", "r.toml", "--device", "cpu", "--force")
    assert json.loads((ran / "runs/tiny.old2/run.json").read_text())["seed"] == 1
    told = json.loads((ran / "runs/tiny/run.json").read_text())
    assert [stage["reused"] for stage in told["stages"]] == [True, True]


def test_files_of_somebody_else_are_left_alone(here, call):
    (here / "mine").mkdir()
    (here / "mine/thesis.tex").write_text("all of it")
    for arguments in ([], ["--smoke"]):
        _, err = call("run", "r.toml", "--out", "mine", "--device", "cpu", *arguments, code=2)
        assert err == (
            "prunekit: mine holds files that are not runs of prunekit; choose another folder with "
            "--out, or move it aside with --force\n"
        )
    assert [p.name for p in (here / "mine").iterdir()] == ["thesis.tex"]
    (here / "mine/plan.json").write_text("[]")
    _, err = call("run", "r.toml", "--out", "mine", "--device", "cpu", code=2)
    way = "choose another folder with --out, or move it aside with --force"
    assert err == f"prunekit: mine/plan.json was not written by prunekit; {way}\n"


def test_an_output_folder_that_cannot_be(here, call, recipe):
    _, err = call("run", "r.toml", "--out", "r.toml/x", "--device", "cpu", code=2)
    way = "choose another folder with --out"
    assert err == f"prunekit: cannot write to r.toml/x: Not a directory; {way}\n"
    assert (here / "r.toml").read_text() == recipe


def test_a_store_that_cannot_be_leaves_no_folder(here, call, recipe):
    (here / "file").touch()
    told = call("run", "r.toml", "--store", "file", "--out", "out/a", code=2)[1]
    assert "cannot write to file/v3" in told
    assert not (here / "out/a").exists()


def test_a_recipe_that_comes_with_prunekit_can_be_copied(here, call):
    for name in ("quickstart.toml", "recipes/quickstart.toml"):
        assert call("run", name, code=2)[1].endswith(
            ": prunekit init quickstart --like quickstart\n"
        )


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_the_recipe_is_never_moved_out_of_the_way(here, force, call, recipe):
    _, err = call("run", "r.toml", "--out", "r.toml", "--device", "cpu", *force, code=2)
    assert err == "prunekit: r.toml is a file; choose another folder with --out\n"
    _, err = call("run", "r.toml", "--out", ".", "--device", "cpu", *force, code=2)
    assert "--out" in err
    assert (here / "r.toml").read_text() == recipe


@pytest.mark.parametrize("extra", [[], ["--set", "dataset.extra=mnist"]])
def test_a_dry_run_downloads_nothing_and_knows_the_sizes(here, monkeypatch, call, recipe, extra):
    monkeypatch.setenv("PRUNEKIT_DATA", str(here / "nothing"))
    (here / "m.toml").write_text(recipe.replace('"digits"', '"mnist"'))
    command = ["run", "m.toml", "--device", "cpu", *extra]
    out, _ = call(*command, "--dry-run", "--json")
    assert any("mnist is not here" in note for note in json.loads(out)["notes"])
    assert not (here / "nothing").exists()
    stage = json.loads(out)["runs"][0]["stages"][0]
    assert stage["status"] == "to do"
    assert stage["steps"] > 0
    call(*command, "--smoke")


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_in_which_another_process_runs(ran, force, call):
    (ran / "runs/tiny/run.json").unlink()
    marker = json.loads((ran / "runs/tiny/plan.json").read_text())
    (ran / "runs/tiny/plan.json").write_text(json.dumps({**marker, "done": False}))
    with filelock.FileLock(ran / "runs/tiny/.lock"):
        arguments = ["--force"] if force else []
        _, err = call("run", "r.toml", "--device", "cpu", *arguments, code=2)
    assert err == (
        "prunekit: another process is running in runs/tiny; wait for it, or choose another "
        "folder with --out\n"
    )
    assert not (ran / "runs/tiny.old1").exists()


def test_no_space_in_the_middle_of_a_run_keeps_what_was_there(ran, monkeypatch, call):
    write = os.fsync
    runs = ran / "runs"
    kept = {p: p.read_bytes() for p in runs.rglob("*") if p.is_file() and "tiny" in p.parts}
    calls = []

    def run_out(handle):
        calls.append(handle)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(handle)

    monkeypatch.setattr("os.fsync", run_out)
    done = CliRunner().invoke(
        main, ["run", "r.toml", "--set", "seed=5", "--device", "cpu", "--out", "runs/other"]
    )
    assert done.exit_code == 1
    assert "no space left on the disk" in done.stderr
    assert "Traceback" not in done.output
    assert {p: p.read_bytes() for p in kept} == kept
    assert [p for p in runs.rglob(".*.*") if p.is_file()] == []
    monkeypatch.setattr("os.fsync", write)
    call("run", "r.toml", "--set", "seed=5", "--device", "cpu", "--out", "runs/other")


def test_an_unknown_device(call):
    _, err = call("run", "r.toml", "--device", "tpuu", code=2)
    assert err.startswith("prunekit: no device 'tpuu' here (")
    assert err.endswith("); write auto, cpu, cuda, cuda:1 or mps\n")
    assert len(err) < 200


def test_a_run_that_fails_exits_with_1_and_the_others_go_on(here, call):
    (here / "s.toml").write_text(
        'extends = "r.toml"\n[sweep]\n"pretrain.optimizer.lr" = [1e30, 0.1]\n'
    )
    out, err = call("run", "s.toml", "--device", "cpu", "--out", "out", code=1)
    assert "prunekit: run 'lr=1e+30' failed: " in err
    assert "NaN or infinity" in err.splitlines()[-1]
    told = {
        label: json.loads((here / f"out/lr={label}/run.json").read_text())["status"]
        for label in ("1e+30", "0.1")
    }
    assert told == {"1e+30": "failed", "0.1": "done"}
    assert "accuracy" in out


def test_dry_run_says_what_would_be_done_and_does_nothing(ran, call, read):
    before = sorted(ran.rglob("*"))
    told = read("run", "r.toml", "--dry-run", "--device", "cpu")
    assert (told["out"], told["store"], told["smoke"]) == ("runs/tiny", "runs/.stages", False)
    (run,) = told["runs"]
    assert [(s["name"], s["status"]) for s in run["stages"]] == [
        ("pretrain", "stored"), ("evaluate", "stored")
    ]  # fmt: skip
    # 144 images of 1,437 are used, 14 of them for validation: two batches of 128, one to validate.
    assert run["stages"][0]["steps"] == 2
    assert run["stages"][1]["forward_passes"] == LOOKS + 1
    assert run["recipe"]["stage"][0]["optimizer"]["lr"] == 0.1

    out, err = call("run", "r.toml", "--dry-run", "--device", "cpu", "--set", "seed=8")
    assert err == ""
    assert out.count(" to do ") == 2
    assert out.endswith(
        "# not counted: the rehearsal before, which sends one batch through every stage\n"
    )
    assert 'use = "digits"' in out
    assert sorted(ran.rglob("*")) == before


def test_dry_run_of_a_sweep_tells_what_is_shared(here, read):
    (here / "s.toml").write_text('extends = "r.toml"\n[sweep]\n"evaluate.images" = [10, 20]\n')
    told = read("run", "s.toml", "--dry-run", "--device", "cpu")
    assert [[s["status"] for s in run["stages"]] for run in told["runs"]] == [
        ["to do", "to do"], ["shared", "to do"]
    ]  # fmt: skip


def test_smoke_proves_a_recipe_beside_its_real_run(here, call, recipe):
    (here / "big.toml").write_text(recipe.replace("epochs = 1", "epochs = 1000"))
    out, err = call("run", "big.toml", "--smoke", "--device", "cpu")
    assert "SMOKE" in out
    told = json.loads((here / "runs/tiny-smoke/run.json").read_text())
    assert (told["status"], told["smoke"]) == ("done", True)
    assert err.endswith("in runs/tiny-smoke\n")
    assert not (here / "runs/tiny").exists()


def damage(path, kind):
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to nothing":
        path.symlink_to("nothing")
    elif kind is not None:
        path.write_text(kind)


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("kind", ["null", '{"format": 2}', '{"form', "a folder", "a pipe", None])
def test_a_broken_record_of_a_run_is_written_again(ran, call, kind, done):
    whole = call("results")[0]
    if not done:
        plan = ran / "runs/tiny/plan.json"
        plan.write_text(json.dumps({**json.loads(plan.read_text()), "done": False}))
    damage(ran / "runs/tiny/run.json", kind)
    out, err = call("run", "r.toml", "--device", "cpu")
    assert out == whole
    told = (
        "is missing: it is written again" if kind is None else "moved to runs/tiny/run.json.damag"
    )
    # What a run wrote that has not ended is written over.
    assert (told in err) is (done or kind in ("a folder", "a pipe"))
    assert json.loads((ran / "runs/tiny/run.json").read_text())["status"] == "done"
    assert "is done already" in call("run", "r.toml", "--device", "cpu")[1]


@pytest.mark.parametrize("name", ["records.npz", "recipe.toml", "model.safetensors"])
@pytest.mark.parametrize("kind", [None, "x", "a folder", "a pipe", "a link to nothing"])
def test_a_lost_or_swapped_file_of_a_run_is_written_again(ran, call, name, kind):
    file = ran / "runs/tiny" / name
    content = file.read_bytes()
    damage(file, kind)
    fault = "is missing" if kind is None else "is not what the run wrote"
    assert call("results")[1] == f"runs/tiny/{name} {fault}\n"
    _, err = call("run", "r.toml", "--device", "cpu")
    after = ": it is written again" if kind is None else f": moved to runs/tiny/{name}.damaged1"
    assert f"runs/tiny/{name} {fault}{after}\n" in err
    assert file.read_bytes() == content
    assert not file.is_symlink()
    assert call("results")[1] == ""


def test_a_lost_log_is_told_and_written_again(ran, call):
    file = ran / "runs/tiny/metrics.jsonl"
    kinds = [json.loads(line)["event"] for line in file.read_text().splitlines()]
    (ran / "runs/tiny/notes").touch()  # of whoever reads it
    file.unlink()
    assert call("results")[1] == "runs/tiny/metrics.jsonl is missing\n"
    assert "metrics.jsonl is missing: it is" in call("run", "r.toml", "--device", "cpu")[1]
    again = [json.loads(line)["event"] for line in file.read_text().splitlines()]
    assert [k for k in again if k != "note"] == [k for k in kinds if k != "note"]
    assert call("results")[1] == ""


@pytest.mark.parametrize(
    "kind", ["[" * 2000, '{"format": 2', "{}", '{"format": null}', "a pipe", "a folder"]
)
def test_a_damaged_plan_blocks_nothing_for_good(ran, call, kind):
    damage(ran / "runs/tiny/plan.json", kind)
    _, err = call("run", "r.toml", "--device", "cpu", code=2)
    assert err.count("\n") == 1
    assert "or move it aside with --force" in err
    call("run", "r.toml", "--device", "cpu", "--force")


@pytest.mark.parametrize("key", ["inputs", "compute", "stages"])
def test_a_plan_that_says_nothing_of_use_is_made_again(ran, call, key):
    plan = ran / "runs/tiny/plan.json"
    whole = json.loads(plan.read_text())
    plan.write_text(json.dumps({**whole, key: "x"}))
    call("run", "r.toml", "--device", "cpu")
    assert json.loads(plan.read_text()) == whole


SLOW = """
[dataset]
use = "digits"
[architecture]
use = "small-cnn"
[objective]
use = "benign"
[[stage]]
kind = "pretrain"
epochs = 400
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number):
    (tmp_path / "slow.toml").write_text(SLOW)
    command = [sys.executable, "-m", "prunekit", "run", "slow.toml"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    told = []
    for line in process.stderr:
        told.append(line)
        if "epoch" in line and "3/400" in line:
            process.send_signal(number)
            break
    rest = process.stderr.read()
    assert process.wait(60) == 130, "".join(told) + rest
    assert "everything so far is saved; resume with: prunekit run slow.toml" in rest
    assert "Traceback" not in rest
    (progress,) = (tmp_path / "runs/.stages/v3").glob("*/progress.safetensors")
    assert json.loads((tmp_path / "runs/slow/run.json").read_text())["status"] == "interrupted"
    content = progress.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["prunekit"])["at"]["epoch"] >= 3


def test_what_other_sources_made_stays_and_says_so(ran, finished, call, monkeypatch):
    """Until --force; on another kind of device it is computed again."""
    monkeypatch.setattr("prunekit.store.keys.hash_source", lambda package: "changed")
    _, told = call("run", "r.toml", "--device", "cpu")
    first, second, _ = told.splitlines()
    assert first == (
        "these results were made with other sources or versions of prunekit, of a plugin or of "
        "what they need; to compute them again: move it aside with --force"
    )
    assert "is done already" in second
    plan = json.loads((ran / "runs/tiny/plan.json").read_text())
    plan["compute"]["device"] = "cuda"
    (ran / "runs/tiny/plan.json").write_text(json.dumps(plan))
    _, told = call("run", "r.toml", "--device", "cpu")
    assert "this run computes on cpu instead of cuda: running it again" in told
    assert "is done already" not in told


def test_changed_data_is_run_again(tmp_path, recipe):
    def write(seed):
        labels = np.arange(40) % 2
        images = np.random.default_rng(seed).integers(0, 256, (40, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / "my.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)

    write(0)
    recipe = SLOW.replace('use = "digits"', 'use = "npz"\nfile = "my.npz"').replace("400", "1")
    (tmp_path / "r.toml").write_text(recipe + '[[stage]]\nkind = "evaluate"\nwith = ["clean"]\n')
    out = str(tmp_path / "out")
    arguments = ["run", str(tmp_path / "r.toml"), "--out", out, "--device", "cpu"]
    first = CliRunner().invoke(main, arguments)
    assert first.exit_code == 0, first.output
    again = CliRunner().invoke(main, arguments)
    assert "is done already" in again.stderr
    write(1)
    changed = CliRunner().invoke(main, arguments)
    assert changed.exit_code == 0, changed.output
    assert "has changed: running it again" in changed.stderr
    assert "is done already" in CliRunner().invoke(main, arguments).stderr
    # Gone, the results are still there to be shown.
    (tmp_path / "my.npz").rename(tmp_path / "gone.npz")
    assert CliRunner().invoke(main, ["results", out]).exit_code == 0
