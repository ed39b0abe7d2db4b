"""`prunekit eval`: judging what is finished, beside its own results."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from prunekit.cli.group import main
from prunekit.engine.eval_plan import EvalRequest, plan_evaluation
from prunekit.results.comparison import compare
from prunekit.store.networks import read_network
from prunekit.store.records import find_runs

RECIPE = """\
name = "tiny"
architecture = "lin-1"
objective = "benign"
[threat]
eps = 0.1
[dataset]
use = "digits"
fraction = 0.1
[[stage]]
kind = "pretrain"
epochs = 1
[[stage]]
kind = "prune"
sparsity = 0.5
pruner = "lwm"
[[stage]]
kind = "evaluate"
with = ["clean"]
images = 20
[sweep]
"prune.sparsity" = [0.5, 0.75]
"""


def call(*arguments, code=0):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def finished(finish):
    return finish(RECIPE)


@pytest.fixture
def run(ran):
    """A run folder; its sweep is all that is in runs/tiny."""
    return sorted(path.parent for path in Path("runs/tiny").glob("*/run.json"))[0]


def judge(*arguments, code=0):
    return call("eval", *arguments, "--device", "cpu", code=code)


def read(*arguments):
    return json.loads(judge(*arguments, "--json")[0])


def test_the_result_is_a_table_and_kept_beside_the_run(run):
    own = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    out, _ = judge(run, "--with", "clean,pgd", "--images", 30, "--set", "pgd.steps=2",
                   "--set", "pgd.restarts=1")  # fmt: skip
    titles, *lines = [line.split() for line in out.splitlines()]
    assert titles == ["evaluator", "metric", "value", "95", "%", "interval", "n"]
    assert [line[:2] for line in lines[:2]] == [["clean", "accuracy"], ["pgd", "accuracy"]]
    assert all(line[2].endswith("%") and line[-1] == "30" for line in lines[:2])
    assert all(path.read_bytes() == content for path, content in own.items())
    (folder,) = (run / "evaluations").iterdir()
    assert folder.name.startswith("clean+pgd-")
    with np.load(folder / "records.npz") as records:
        assert len(records["clean+pgd/index"]) == 30
        assert records["clean+pgd/pgd.correct"].shape == (30,)
    recipe = (folder / "recipe.toml").read_text()
    assert "eps = 0.1" in recipe
    assert "steps = 2" in recipe


def test_the_masks_and_the_accuracy_are_those_of_the_run(run):
    told = json.loads((run / "run.json").read_text())["stages"]
    metrics = read(run, "--with", "clean", "--images", 20)["metrics"]
    expected = told[-1]["metrics"]
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["sparsity"]["value"] > 0


def test_the_same_again_is_stored(run):
    first = read(run, "--with", "clean", "--images", 20)
    file = Path(first["evaluation"]) / "run.json"
    before = file.stat().st_mtime_ns
    assert read(run, "--with", "clean", "--images", 20) == first
    assert file.stat().st_mtime_ns == before
    assert read(run, "--with", "clean", "--images", 21) != first
    assert len(list((run / "evaluations").iterdir())) == 2


def test_another_network_in_its_place_is_judged_anew(run):
    first = read(run, "--with", "clean")
    state = load_file(run / "model.safetensors")
    (run / "model.safetensors").unlink()
    with_header = {"prunekit": json.dumps({"format": 1, "masked": [], "kept_zeros": {}})}
    save_file({name: -value for name, value in state.items()}, run / "model.safetensors",
              with_header)  # fmt: skip
    second = read(run, "--with", "clean")
    assert second["evaluation"] == first["evaluation"]
    old, new = (found["metrics"]["clean.accuracy"]["value"] for found in (first, second))
    assert new < old


def test_a_lone_file_says_what_it_is(run):
    shutil.copy(run / "model.safetensors", "lone.safetensors")
    shutil.rmtree("runs")
    out = read("lone.safetensors", "--with", "pgd", "--images", 20, "--set", "pgd.steps=2")
    assert out["metrics"]["pgd.accuracy"]["n"] == 20
    assert Path(out["evaluation"]).parent == Path("evaluations").absolute()


def test_a_file_that_says_nothing_is_asked_about(run):
    save_file(load_file(run / "model.safetensors"), "lone.safetensors")
    assert "does not say its dataset; give --dataset" in judge(
        "lone.safetensors", "--with", "clean", code=2)[1]  # fmt: skip
    assert "does not say its architecture; give --model" in judge(
        "lone.safetensors", "--with", "clean", "--dataset", "digits", code=2)[1]  # fmt: skip
    known = ("lone.safetensors", "--dataset", "digits", "--model", "lin-1", "--images", 20)
    assert "give --eps" in judge(*known, "--with", "pgd", code=2)[1]
    assert read(*known, "--with", "pgd", "--eps", "8/255")["metrics"]["pgd.accuracy"]["n"] == 20
    wrong = judge("lone.safetensors", "--dataset", "digits", "--model", "lin-2", "--with", "clean",
                  code=2)[1]  # fmt: skip
    assert "does not fit the network" in wrong


def test_mistakes_name_the_option(run):
    for arguments, message in {
        ("--with", "pgdd"): "--with pgdd: unknown evaluator 'pgdd'; did you mean 'pgd'?",
        ("--with", "clean,"): "--with clean,: separate evaluators by commas",
        ("--with", "clean pgd"): "--with clean pgd: separate evaluators by commas",
        ("--with", "pgd", "--eps", "8"): "--eps 8: eps is a radius in [0, 1] pixel units",
        ("--with", "clean", "--dataset", "digit"): "--dataset digit: unknown dataset",
        ("--with", "pgd", "--set", "pgd.stpes=3"): "unknown option 'stpes' of evaluator 'pgd'",
        ("--with", "pgd", "--set", "steps=3"): "--set steps=3: ",
    }.items():
        assert message in judge(run, *arguments, code=2)[1]
    assert "choose one of its runs, such as runs/tiny/" in judge(
        "runs/tiny", "--with", "clean", code=2)[1]  # fmt: skip
    assert (
        "there is no run folder or file nowhere" in judge("nowhere", "--with", "clean", code=2)[1]
    )
    Path("w.pt").write_bytes(b"")
    assert "prunekit import" in judge("w.pt", "--with", "clean", code=2)[1]


def test_another_radius_than_the_one_trained_for_is_flagged(run):
    told = "the network was trained for linf, 0.1"
    request = ("--with", "pgd", "--images", 10, "--set", "pgd.steps=2", "--set", "pgd.restarts=1")
    assert told in judge(run, *request, "--eps", "8/255")[1]
    assert told not in judge(run, *request, "--eps", "0.1")[1]


def test_evaluations_of_a_sweep_keep_its_settings(run):
    request = EvalRequest(("pgd",), eps="8/255", settings=("pgd.steps=3",))
    found = plan_evaluation(read_network(run), request).runs[0]
    assert found.settings == {"prune.sparsity": 0.5, "threat.eps": "8/255", "pgd.steps": 3}
    for folder in sorted(Path("runs/tiny").glob("*/run.json")):
        judge(folder.parent, "--with", "clean", "--images", 10)
    rows = [row for row in compare(find_runs(Path("runs/tiny"))) if row.stage == "clean"]
    assert [row.settings["prune.sparsity"] for row in rows] == [0.5, 0.75]


def test_results_stay_in_use_for_clean(run):
    read(run, "--with", "clean")
    out, _ = call("clean", "runs", "--dry-run")
    assert "0 stages" in out


def test_where_nothing_can_be_written_it_says_what_helps(run):
    (run / "evaluations").touch()
    _, err = judge(run, "--with", "clean", code=2)
    assert "Not a directory; results stand beside the network: copy it to a folder" in err
    assert "--out" not in err


def test_a_file_that_does_not_fit_is_no_failed_run(run):
    file = run / "model.safetensors"
    header = {"architecture": "lin-1", "dataset": "digits", "shape": [1, 8, 8], "classes": 10}
    metadata = {"prunekit": json.dumps({**header, "masked": ["nope"]})}
    save_file(load_file(file), "misfit.safetensors", metadata)
    told = judge("misfit.safetensors", "--with", "clean", code=2)[1]
    assert "its masks do not fit its weights ('nope')" in told
