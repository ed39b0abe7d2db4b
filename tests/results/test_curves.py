"""Certified accuracy against the radius: by hand, from run folders, as a picture."""

import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from prunekit.cli.group import main
from prunekit.errors import UserError
from prunekit.results.curves import draw, find_curves, trace


def write_run(folder, settings, *evaluations):
    """A run folder; each evaluation is (stage, key of its result, records of evaluators)."""
    folder.mkdir(parents=True)
    stages = [
        {"name": stage, "kind": "evaluate", "key": key, "metrics": {"certify.accuracy": 0.5}}
        for stage, key, _ in evaluations
    ]
    told = {
        "format": 2, "name": "smooth", "status": "done", "smoke": False,
        "seed": settings.get("seed", 0), "settings": settings, "stages": stages,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(told))
    arrays = {
        f"{stage}/{name}": np.array(values)
        for stage, _, records in evaluations
        for name, values in records.items()
    }
    np.savez(folder / "records.npz", **arrays)


def radii(radius, correct, name="certify"):
    return {
        f"{name}.radius": radius,
        f"{name}.correct": correct,
        f"{name}.count": [1] * len(radius),
    }


DENSE = radii([0.5, 0.2, 0.0, 0.9], [True, True, True, False])


@pytest.fixture
def sweep(tmp_path):
    """Two sparsities that share the dense network's result."""
    for sparsity, radius in ((0.9, [0.4, 0.1, 0.0, 0.3]), (0.99, [0.0, 0.0, 0.2, 0.0])):
        pruned = radii(radius, [True, True, False, True])
        run = (("dense", "d", DENSE), ("pruned", f"p{sparsity}", pruned))
        write_run(tmp_path / f"runs/{sparsity}", {"prune.sparsity": sparsity}, *run)
    return tmp_path / "runs"


def test_accuracy_falls_behind_each_radius_of_a_correct_image():
    curve = trace("x", np.array([0.5, 0.2, 0.5, 0.9, 0.0]), np.array([1, 1, 1, 0, 1], bool))
    assert curve.radii.tolist() == [0.0, 0.2, 0.5]
    assert curve.accuracy.tolist() == [0.8, 0.6, 0.4, 0.0]
    assert curve.images == 5


def test_a_network_that_is_never_right_has_a_curve_too(tmp_path):
    curve = trace("x", np.array([0.5, 0.2]), np.zeros(2, bool))
    assert (curve.radii.tolist(), curve.accuracy.tolist()) == ([], [0.0])
    draw([curve], tmp_path / "flat.png")


def test_a_curve_for_each_result_a_shared_one_once(sweep):
    curves = find_curves([sweep])
    labels = ["dense", "pruned, sparsity 0.9", "pruned, sparsity 0.99"]
    assert [curve.label for curve in curves] == labels
    assert curves[0].images == 4
    assert curves[0].accuracy.tolist() == [0.75, 0.5, 0.25, 0.0]
    assert curves[1].radii.tolist() == [0.1, 0.3, 0.4]
    again = find_curves([sweep / "0.9", sweep])  # a run that is named twice counts once
    assert [curve.label for curve in again] == labels


def test_seeds_are_one_curve(tmp_path):
    for seed, radius in enumerate(([0.1, 0.2], [0.3, 0.4])):
        run = ("evaluate", f"k{seed}", radii(radius, [True, True]))
        write_run(tmp_path / f"seed{seed}", {"seed": seed}, run)
    (curve,) = find_curves([tmp_path])
    assert (curve.label, curve.images) == ("evaluate", 4)
    assert curve.accuracy.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_evaluators_of_one_stage_are_told_apart(tmp_path):
    records = DENSE | radii([0.1] * 4, [True] * 4, "at-0.5") | {"clean.correct": [True] * 4}
    write_run(tmp_path / "run", {}, ("evaluate", "k", records))
    labels = [curve.label for curve in find_curves([tmp_path])]
    assert labels == ["evaluate, certify", "evaluate, at-0.5"]


def test_runs_without_radii_say_what_to_do(tmp_path):
    write_run(tmp_path / "run", {}, ("evaluate", "k", {"clean.correct": [True]}))
    with pytest.raises(UserError, match="--with certify"):
        find_curves([tmp_path])
    (tmp_path / "run/records.npz").unlink()
    with pytest.raises(UserError, match="--with certify"):
        find_curves([tmp_path])
    with pytest.raises(UserError, match="there is no folder"):
        find_curves([tmp_path / "other"])


@pytest.mark.parametrize(("name", "start"), [("c.png", b"\x89PNG"), ("c.SVG", b"<?xml")])
def test_the_command_writes_a_picture_and_tells_the_curves(sweep, tmp_path, name, start):
    file = tmp_path / name
    done = CliRunner().invoke(main, ["curve", str(sweep), "--out", str(file), "--json"])
    assert done.exit_code == 0, done.output
    assert file.read_bytes().startswith(start)
    told = json.loads(done.stdout)
    assert told["schema_version"] == 1
    assert told["curves"][0] == {
        "label": "dense", "images": 4, "radii": [0.0, 0.2, 0.5], "accuracy": [0.75, 0.5, 0.25, 0.0],
    }  # fmt: skip
    assert str(file) in done.stderr


def test_a_picture_has_a_name_that_says_its_format(sweep, tmp_path):
    for name in ("curve", "curve.txt"):
        done = CliRunner().invoke(main, ["curve", str(sweep), "--out", str(tmp_path / name)])
        assert done.exit_code == 2
        assert "end it in .png" in done.stderr
        assert list(tmp_path.glob("curve*")) == []


def test_without_matplotlib_the_command_says_what_to_install(sweep, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = CliRunner().invoke(main, ["curve", str(sweep), "--out", str(tmp_path / "c.png")])
    assert done.exit_code == 2
    assert done.stderr == (
        "prunekit: figures need matplotlib, which is not installed; run: pip install matplotlib\n"
    )
