"""From an empty environment's point of view: the built wheel, beside a third party's package."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "prunekit-signs"
version = "2.5"

[project.entry-points.prunekit]
signs = "prunekit_signs"

[tool.hatch.build.targets.wheel]
packages = ["prunekit_signs"]
"""

DECLARATION = """
from prunekit import PrunerComponent, hookimpl


@hookimpl
def prunekit_pruners():
    yield PrunerComponent(
        name="largest-first",
        summary="Keeps the most positive weights",
        build="prunekit_signs.pruner:build",
    )
"""

IMPLEMENTATION = """
from prunekit.contracts import Scores


def build(options, context):
    return lambda context: Scores({n: w.clone() for n, w in context.weights.items()})
"""

RECIPE = """
[dataset]
use = "digits"
[architecture]
use = "small-cnn"
[objective]
use = "benign"
[[stage]]
kind = "pretrain"
epochs = 1
[[stage]]
kind = "prune"
sparsity = 0.5
pruner = "largest-first"
[[stage]]
kind = "evaluate"
with = ["clean"]
"""


def build_wheel(project: Path, into: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(into)],
        cwd=project, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A fresh environment with the two wheels; only what they depend on comes from this one."""
    folder = tmp_path_factory.mktemp("fresh")
    third = folder / "third"
    (third / "prunekit_signs").mkdir(parents=True)
    (third / "pyproject.toml").write_text(PYPROJECT)
    (third / "prunekit_signs/__init__.py").write_text(DECLARATION)
    (third / "prunekit_signs/pruner.py").write_text(IMPLEMENTATION)
    wheels = [build_wheel(ROOT, folder / "ours"), build_wheel(third, folder / "theirs")]
    venv.create(folder / "env", with_pip=True)
    python = folder / "env/bin/python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *wheels],
        check=True, capture_output=True,
    )  # fmt: skip
    # Behind the environment's own packages, and without the editable install of this one: a path
    # in a .pth file is searched, its own .pth files are not.
    import torch

    here = Path(torch.__file__).parent.parent
    (site,) = (folder / "env/lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(str(here))
    (folder / "r.toml").write_text(RECIPE)
    return folder


def prunekit(environment: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [environment / "env/bin/prunekit", *arguments],
        cwd=environment, env=clean, capture_output=True, text=True,
    )  # fmt: skip


def test_the_wheel_is_what_runs(environment):
    code = "import prunekit, prunekit_pruners; print(prunekit.__file__, prunekit_pruners.__file__)"
    done = subprocess.run(
        [environment / "env/bin/python", "-c", code],
        cwd=environment,
        capture_output=True,
        text=True,
    )
    assert all(str(environment) in path for path in done.stdout.split()), done.stdout + done.stderr


def test_the_wheel_holds_packages_and_nothing_else(environment):
    (site,) = (environment / "env/lib").glob("python*/site-packages")
    ours = {
        p.name for p in site.iterdir() if "prunekit" in p.name or p.name in ("plugins", "tests")
    }
    expected = {p.name for p in (ROOT / "plugins").iterdir() if p.name.startswith("prunekit_")}
    assert ours - {"prunekit", "prunekit_signs"} - expected == {
        n for n in ours if n.endswith(".dist-info")
    }
    assert (site / "prunekit_arrays/digits.npz").exists()


def test_the_third_party_is_listed_beside_ours(environment):
    done = prunekit(environment, "list", "pruners", "--json")
    assert done.returncode == 0, done.stderr
    listed = {c["name"]: c["distribution"] for c in json.loads(done.stdout)["components"]}
    assert listed["largest-first"] == "prunekit-signs 2.5"
    assert listed["score"].startswith("prunekit ")


def test_the_third_party_runs_in_a_recipe(environment):
    done = prunekit(environment, "run", "r.toml", "--smoke", "--json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert len(content["rows"]) == 1
    record = json.loads((environment / "runs/r-smoke/run.json").read_text())
    assert record["status"] == "done"
    assert abs(record["stages"][-1]["metrics"]["sparsity"]["value"] - 0.5) < 0.01


def test_a_broken_third_party_is_contained(environment):
    (site,) = (environment / "env/lib").glob("python*/site-packages")
    declaration = site / "prunekit_signs/__init__.py"
    good = declaration.read_text()
    declaration.write_text("raise RuntimeError('broken on purpose')\n")
    try:
        listing = prunekit(environment, "list")
        assert listing.returncode == 0
        assert "broken: RuntimeError: broken on purpose" in listing.stdout
        assert "prunekit-signs 2.5" in listing.stdout
        checked = prunekit(environment, "check", "r.toml")
        assert checked.returncode == 2
        assert "unknown pruner 'largest-first'" in checked.stderr
        assert "signs (prunekit-signs 2.5)" in checked.stderr
    finally:
        declaration.write_text(good)


FRESH_RECIPE = """
name = "fresh"
dataset = "digits"
architecture = "small-cnn"
objective = "acme-fresh"
[[stage]]
kind = "pretrain"
epochs = 1
[[stage]]
kind = "evaluate"
with = ["clean", "acme-fresh"]
"""


def pip(environment: Path, *arguments: str | Path) -> None:
    command = [environment / "env/bin/python", "-m", "pip", *arguments]
    subprocess.run(command, check=True, capture_output=True)


def test_a_plugin_that_new_wrote_from_its_installation_to_its_removal(environment):
    kinds = ("--kind", "objective", "--kind", "evaluator")
    made = prunekit(environment, "new", "plugin", "acme-fresh", *kinds)
    assert (made.returncode, made.stdout) == (0, "acme-fresh\n"), made.stderr
    wheel = build_wheel(environment / "acme-fresh", environment / "fresh-wheel")
    pip(environment, "install", "--no-index", "--no-deps", wheel)
    listed = prunekit(environment, "list", "objectives")
    assert "acme-fresh 0.1.0" in listed.stdout
    assert "label-noise" not in listed.stdout

    # Broken where only a run gets to, then mended: the run goes on.
    (environment / "fresh.toml").write_text(FRESH_RECIPE)
    (site,) = (environment / "env/lib").glob("python*/site-packages")
    loss = site / "acme_fresh/loss.py"
    good = loss.read_text()
    loss.write_text(good.replace("logits = ", "raise ValueError('on purpose')\n        logits = "))
    failed = prunekit(environment, "run", "fresh.toml", "--smoke")
    assert failed.returncode == 1
    assert "plugin acme-fresh (acme-fresh 0.1.0) failed: ValueError: on purpose" in failed.stderr
    loss.write_text(good)
    done = prunekit(environment, "run", "fresh.toml", "--smoke")
    assert done.returncode == 0, done.stderr

    # Written for another prunekit.
    declaration = site / "acme_fresh/__init__.py"
    text = declaration.read_text()
    declaration.write_text(text.replace("PRUNEKIT_API = 3", "PRUNEKIT_API = 4"))
    listed = prunekit(environment, "list")
    assert listed.returncode == 0
    assert "broken: written for plugin API 4, this prunekit has 3; update prunekit" in listed.stdout
    declaration.write_text(text)

    pip(environment, "uninstall", "--yes", "acme-fresh")
    assert "acme-fresh" not in prunekit(environment, "list").stdout
    checked = prunekit(environment, "check", "fresh.toml")
    assert checked.returncode == 2
    assert "unknown objective 'acme-fresh'" in checked.stderr
    # What it found is told still.
    told = prunekit(environment, "results", "runs/fresh-smoke")
    assert (told.returncode, told.stdout) == (0, done.stdout)
