"""The command line: what is printed where, exit codes, and what a mistake gets."""

import csv
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import filelock
import numpy as np
import pytest
from click.testing import CliRunner

from prunekit.catalog.component import KINDS
from prunekit.catalog.registry import load_registry
from prunekit.cli.group import main

RECIPE = """\
name = "tiny"
architecture = "small-cnn"
objective = "benign"
report = ["console", "jsonl"]
[dataset]
use = "digits"
fraction = 0.1
[[stage]]
kind = "pretrain"
epochs = 1
[[stage]]
kind = "evaluate"
with = ["clean"]
images = 20
"""
REGISTRY = load_registry()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRUNEKIT_STORE", raising=False)
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


def call(*arguments, code=0):
    """Run the command; its stdout and stderr."""
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    if "--debug" not in arguments:
        assert "Traceback" not in done.output
    return done.stdout, done.stderr


def read(*arguments, code=0):
    """The same with --json: what stdout says."""
    content = json.loads(call(*arguments, "--json", code=code)[0])
    assert content.pop("schema_version") == 1
    return content


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with r.toml run into runs/tiny."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "r.toml").write_text(RECIPE)
    old = os.getcwd()
    os.chdir(folder)
    try:
        done = CliRunner().invoke(main, ["run", "r.toml", "--device", "cpu"])
    finally:
        os.chdir(old)
    assert done.exit_code == 0, done.output
    return folder, done


@pytest.fixture
def ran(finished, here, monkeypatch):
    """In a copy of that folder."""
    shutil.copytree(finished[0], here / "copy")
    monkeypatch.chdir(here / "copy")
    return here / "copy"


# list, show


def test_list_shows_every_component_in_a_line_of_its_own():
    out, err = call("list")
    lines = out.splitlines()
    assert lines[0].split() == ["kind", "name", "what", "it", "is", "from", "status"]
    assert len(lines) == 1 + len(REGISTRY.entries)
    assert err == ""
    (row,) = [line for line in lines if line.split()[1] == "trades"]
    assert row.split()[0] == "objective"
    assert row.rstrip().endswith("ready")


@pytest.mark.parametrize("kind", [*(f"{k}s" for k in KINDS), "pruner"])
def test_list_of_one_kind(kind):
    found = read("list", kind)["components"]
    assert {c["kind"] for c in found} == {kind.removesuffix("s")}
    assert {c["name"] for c in found} == set(REGISTRY.names(kind.removesuffix("s")))
    assert set(found[0]) == {"kind", "name", "summary", "plugin", "distribution", "status"}


def test_list_of_an_unknown_kind():
    _, err = call("list", "prunner", code=2)
    assert err == "prunekit: unknown kind 'prunner'; did you mean 'pruners'?\n"


def test_list_names_a_broken_plugin_and_goes_on(here, monkeypatch):
    info = here / "bad_plugin-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-plugin\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[prunekit]\nbad = bad_plugin_under_test\n")
    (here / "bad_plugin_under_test.py").write_text("raise SystemExit('[bold] no')\n")
    monkeypatch.syspath_prepend(here)
    out, _ = call("list")
    (row,) = [line for line in out.splitlines() if line.startswith("plugin ")]
    assert row.split() == [
        "plugin", "bad", "bad-plugin", "1.2", "broken:", "SystemExit:", "[bold]", "no"
    ]  # fmt: skip
    assert read("list")["broken"] == [
        {"plugin": "bad", "distribution": "bad-plugin 1.2", "reason": "SystemExit: [bold] no"}
    ]
    assert read("check", "r.toml")["recipes"][0]["problems"] == []


def test_show_tells_options_with_types_limits_and_defaults():
    out, err = call("show", "pgd")
    assert err == ""
    assert "  eps (radius, optional)\n      radius of the attack" in out
    assert '  norm ("linf" | "l2", optional)' in out
    assert "  restarts (whole number, at least 1 and at most 1000, default 10)" in out
    (told,) = read("show", "pgd")["components"]
    steps = next(o for o in told["options"] if o["name"] == "steps")
    assert steps == {
        "name": "steps",
        "type": "whole number",
        "default": 50,
        "required": False,
        "limits": "at least 1",
        "unit": "",
        "help": "steps of each restart",
    }


@pytest.mark.parametrize(
    ("name", "advice"), [("trads", "did you mean 'trades'?"), ("xyzzy", "see: prunekit list")]
)
def test_show_of_nothing(name, advice):
    _, err = call("show", name, code=2)
    assert err == f"prunekit: there is no component '{name}'; {advice}\n"


SECTIONS = {
    "dataset": '[dataset]\nuse = "digits"',
    "architecture": '[architecture]\nuse = "small-cnn"',
    "threat": "[threat]\neps = 0.1",
    "objective": '[objective]\nuse = "benign"',
}
FIRST = '[[stage]]\nkind = "pretrain"\nepochs = 1\n'


@pytest.mark.parametrize("entry", REGISTRY.entries, ids=lambda e: f"{e.kind}-{e.component.name}")
def test_the_fragment_that_show_prints_is_right_in_a_recipe(entry, here):
    if entry.missing:
        pytest.skip(entry.status)
    (told,) = [c for c in read("show", entry.reference)["components"] if c["kind"] == entry.kind]
    fragment = told["recipe"]
    assert textwrap.indent(fragment, "  ") in call("show", entry.reference)[0]
    (here / "my-file").touch()
    sections = "\n".join(s for kind, s in SECTIONS.items() if kind != entry.kind)
    parts = [sections, fragment if entry.kind in SECTIONS else "", FIRST]
    if entry.kind == "reporter":
        parts.insert(0, fragment)
    elif entry.kind not in SECTIONS:
        parts = [sections, fragment]
    (here / "r.toml").write_text("\n".join(parts))
    assert read("check", "r.toml")["recipes"] == [{"recipe": "r.toml", "problems": [], "runs": 1}]


# check


def test_check_says_good_or_everything_that_is_wrong(here):
    (here / "bad.toml").write_text(RECIPE.replace("epochs = 1", "epoch = 1") + "x = 1\n")
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


def test_check_tells_notes_and_counts_runs(here):
    (here / "s.toml").write_text('extends = "r.toml"\n[sweep]\nseed = [1, 2]\n')
    assert call("check", "s.toml") == ("s.toml: good (2 runs)\n", "")
    _, err = call("check", "s.toml", "--set", "evaluate.with=[{use='pgd', eps=8}]", code=2)
    assert err == (
        "--set evaluate.with=[{use='pgd', eps=8}]: eps is a radius in [0, 1] pixel units, got 8; "
        'write "8/255"\n'
    )


# Nothing heavy before it is needed


@pytest.mark.parametrize(
    "arguments",
    [["list", "--json"], ["show", "wrn-28-4"], ["check", "r.toml"], ["run", "--help"],
     ["run", "gone.toml"], ["run", "r.toml", "--set", "x=1"]],
    ids=" ".join,
)  # fmt: skip
def test_reading_and_refusing_import_nothing_heavy(arguments):
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'numpy', 'torchvision', 'timm'}\n"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "from prunekit.cli.group import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]"


# Usage


def test_usage_errors_exit_with_2():
    for arguments in (["chekc"], ["check"], ["run"], ["run", "r.toml", "--bogus"]):
        _, err = call(*arguments, code=2)
        assert err.startswith("Usage:")
    assert "did you mean" in call("run", "r.toml", "--devise", "cpu", code=2)[1].lower()


def test_a_defect_is_one_line_and_a_traceback_with_debug(monkeypatch):
    def burst(*arguments):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("prunekit.catalog.registry.load_registry", burst)
    line = "prunekit: ZeroDivisionError: oh (a defect of prunekit; --debug shows where)\n"
    assert call("list", code=1) == ("", line)
    _, err = call("--debug", "list", code=1)
    assert err.startswith("Traceback")
    assert err.endswith(line)


def test_interruption_exits_with_130(monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("prunekit.catalog.registry.load_registry", interrupt)
    assert call("list", code=130) == ("", "prunekit: interrupted\n")


def test_an_interrupted_run_says_how_to_go_on(here, monkeypatch):
    from prunekit.engine.engine import Engine
    from prunekit.errors import Interrupted

    def interrupt(*arguments):
        raise Interrupted

    command = ["prunekit", "run", "r.toml", "--set", "seed=1 # x", "--device", "cpu"]
    monkeypatch.setattr(Engine, "run", interrupt)
    monkeypatch.setattr(sys, "argv", command)
    out, err = call(*command[1:], code=130)
    assert out == ""
    assert err.splitlines()[-2:] == [
        "everything up to here is saved; go on with: prunekit run r.toml --set 'seed=1 # x' "
        "--device cpu",
        "prunekit: interrupted",
    ]
    monkeypatch.undo()
    monkeypatch.chdir(here)
    call(*command[1:])


def test_a_file_that_cannot_be_read_is_no_defect(monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr("prunekit.catalog.registry.load_registry", refuse)
    assert call("list", code=1) == ("", "prunekit: somewhere: Permission denied\n")


# run


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


def test_the_same_recipe_again_prints_what_is_stored(ran, finished):
    before = {p: p.stat().st_mtime_ns for p in (ran / "runs").rglob("*") if p.is_file()}
    out, err = call("run", "r.toml", "--device", "cpu")
    assert out == finished[1].stdout
    assert err == "runs/tiny is done already: these are its results\nin runs/tiny\n"
    assert {p: p.stat().st_mtime_ns for p in before} == before
    # The resolved recipe is the same recipe.
    assert call("run", "runs/tiny/recipe.toml", "--device", "cpu") == (out, err)
    assert read("run", "r.toml", "--device", "cpu") == read("results")


def test_another_recipe_does_not_overwrite_a_run(ran):
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


def test_files_of_somebody_else_are_left_alone(here):
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
    way = "choose another folder with --out"
    assert err == f"prunekit: mine/plan.json was not written by prunekit; {way}\n"


def test_an_output_folder_that_cannot_be(here):
    _, err = call("run", "r.toml", "--out", "r.toml/x", "--device", "cpu", code=2)
    way = "choose another folder with --out"
    assert err == f"prunekit: cannot write to r.toml/x: Not a directory; {way}\n"
    assert (here / "r.toml").read_text() == RECIPE


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_the_recipe_is_never_moved_out_of_the_way(here, force):
    _, err = call("run", "r.toml", "--out", "r.toml", "--device", "cpu", *force, code=2)
    assert err == "prunekit: r.toml is a file; choose another folder with --out\n"
    _, err = call("run", "r.toml", "--out", ".", "--device", "cpu", *force, code=2)
    assert "--out" in err
    assert (here / "r.toml").read_text() == RECIPE


def test_a_dry_run_downloads_nothing_and_knows_the_sizes(here, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_DATA", str(here / "nothing"))
    recipe = RECIPE.replace('"digits"', '"mnist"')
    (here / "m.toml").write_text(recipe)
    out, _ = call("run", "m.toml", "--dry-run", "--json", "--device", "cpu")
    assert any("mnist is not here" in note for note in json.loads(out)["notes"])
    assert not (here / "nothing").exists()
    stage = json.loads(out)["runs"][0]["stages"][0]
    assert stage["status"] == "to do"
    assert stage["steps"] > 0


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_in_which_another_process_runs(ran, force):
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


def test_no_space_in_the_middle_of_a_run_keeps_what_was_there(ran, monkeypatch):
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


def test_an_unknown_device():
    _, err = call("run", "r.toml", "--device", "tpuu", code=2)
    assert err.startswith("prunekit: no device 'tpuu' here (")
    assert err.endswith("); write auto, cpu, cuda, cuda:1 or mps\n")
    assert len(err) < 200


def test_a_run_that_fails_exits_with_1_and_the_others_go_on(here):
    (here / "s.toml").write_text(
        'extends = "r.toml"\n[sweep]\n"pretrain.select" = ["nonsense", "accuracy"]\n'
    )
    out, err = call("run", "s.toml", "--device", "cpu", "--out", "out", code=1)
    assert "prunekit: run 'select=nonsense' failed: " in err
    assert "nonsense" in err.splitlines()[-1]
    told = {
        label: json.loads((here / f"out/select={label}/run.json").read_text())["status"]
        for label in ("nonsense", "accuracy")
    }
    assert told == {"nonsense": "failed", "accuracy": "done"}
    assert "accuracy" in out


# --dry-run, --smoke


def test_dry_run_says_what_would_be_done_and_does_nothing(ran):
    before = sorted(ran.rglob("*"))
    told = read("run", "r.toml", "--dry-run", "--device", "cpu")
    assert (told["out"], told["store"], told["smoke"]) == ("runs/tiny", "runs/.stages", False)
    (run,) = told["runs"]
    assert [(s["name"], s["status"]) for s in run["stages"]] == [
        ("pretrain", "stored"), ("evaluate", "stored")
    ]  # fmt: skip
    # 144 images of 1,437 are used, 14 of them for validation: two batches of 128, one to validate.
    assert run["stages"][0]["steps"] == 2
    assert run["stages"][1]["forward_passes"] == 1
    assert run["recipe"]["stage"][0]["optimizer"]["lr"] == 0.1

    out, err = call("run", "r.toml", "--dry-run", "--device", "cpu", "--set", "seed=8")
    assert err == ""
    assert out.count(" to do ") == 2
    assert 'use = "digits"' in out
    assert sorted(ran.rglob("*")) == before


def test_dry_run_of_a_sweep_tells_what_is_shared(here):
    (here / "s.toml").write_text('extends = "r.toml"\n[sweep]\n"evaluate.images" = [10, 20]\n')
    told = read("run", "s.toml", "--dry-run", "--device", "cpu")
    assert [[s["status"] for s in run["stages"]] for run in told["runs"]] == [
        ["to do", "to do"], ["shared", "to do"]
    ]  # fmt: skip


def test_smoke_proves_a_recipe_beside_its_real_run(here):
    (here / "big.toml").write_text(RECIPE.replace("epochs = 1", "epochs = 1000"))
    out, err = call("run", "big.toml", "--smoke", "--device", "cpu")
    assert "SMOKE" in out
    told = json.loads((here / "runs/tiny-smoke/run.json").read_text())
    assert (told["status"], told["smoke"]) == ("done", True)
    assert err.endswith("in runs/tiny-smoke\n")
    assert not (here / "runs/tiny").exists()


# results, clean


def test_results_in_three_forms(ran):
    out, err = call("results", "runs")
    assert "evaluate" in out
    assert err == ""
    (row,) = read("results", "runs")["rows"]
    accuracy = row["metrics"]["clean.accuracy"]["mean"]
    (line,) = csv.DictReader(io.StringIO(call("results", "runs", "--csv")[0]))
    assert float(line["clean.accuracy"]) == accuracy
    assert call("results", "runs", "--csv", "--json", code=2)[1].startswith("Usage:")


def test_results_of_nothing():
    assert call("results", "gone", code=2)[1] == "prunekit: there is no folder gone\n"


def test_clean_frees_what_no_run_refers_to(ran):
    stages = {p.name for p in (ran / "runs/.stages/v2").iterdir()}
    assert len(stages) == 2
    assert call("clean")[0] == "0.0 MB freed (0 stages)\n"
    call("run", "r.toml", "--set", "seed=1", "--device", "cpu", "--out", "runs/second")
    shutil.rmtree(ran / "runs/second")
    out, _ = call("clean", "--dry-run")
    assert out.splitlines()[-1].endswith(" would be freed (2 stages)")
    assert len(list((ran / "runs/.stages/v2").iterdir())) == 4
    out, _ = call("clean")
    assert out.splitlines()[-1].endswith(" freed (2 stages)")
    assert {p.name for p in (ran / "runs/.stages/v2").iterdir()} == stages


def test_clean_of_nothing(here):
    assert call("clean", "gone", code=2)[1] == "prunekit: there is no folder gone\n"


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
    assert "everything up to here is saved; go on with: prunekit run slow.toml" in rest
    assert "Traceback" not in rest
    (progress,) = (tmp_path / "runs/.stages/v2").glob("*/progress.safetensors")
    assert json.loads((tmp_path / "runs/slow/run.json").read_text())["status"] == "interrupted"
    content = progress.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["prunekit"])["at"]["epoch"] >= 3


def test_changed_data_is_run_again(tmp_path):
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
    assert "has changed since: running it again" in changed.stderr
    assert "is done already" in CliRunner().invoke(main, arguments).stderr
    # Gone, the results are still there to be shown.
    (tmp_path / "my.npz").rename(tmp_path / "gone.npz")
    assert CliRunner().invoke(main, ["results", out]).exit_code == 0


def test_results_count_the_layers(ran):
    out, _ = call("results", "runs", "--layers")
    header, *rows = [line.split() for line in out.splitlines()]
    assert header == ["run", "layer", "kept", "weights", "sparsity"]
    told = json.loads((ran / "runs/tiny/run.json").read_text())["sparsity"]
    counts = {row[1]: [int(cell.replace(",", "")) for cell in row[2:4]] for row in rows}
    assert counts.pop("all") == [told["kept"], told["weights"]]
    assert counts == {n: [c["kept"], c["weights"]] for n, c in told["layers"].items()}
    _, err = call("results", "runs", "--layers", "--json", code=2)
    assert "exclude each other" in err
