"""Every recipe that is delivered: it passes `check`, and all of its stages run."""

from pathlib import Path

import pytest

from prunekit import smoke
from prunekit.cli import plan_recipe
from prunekit.plan import make_plan
from prunekit.recipe import load_recipe
from prunekit.registry import load_registry
from prunekit.running import run_plan

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))


def name_of(path):
    return path.relative_to(ROOT / "recipes").with_suffix("").as_posix()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One for all: recipes that extend each other share stages."""
    return tmp_path_factory.mktemp("stages")


def override(recipe):
    """Settings without which a test would reach for the network."""
    (use,) = {run.dataset for run in make_plan(load_recipe(recipe), load_registry()).runs}
    return ("dataset.download=false",) if hasattr(use.options, "download") else ()


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_recipe_runs(recipe, store, tmp_path, monkeypatch):
    """`prunekit run RECIPE --smoke`, without data; batches are smaller still, for large networks."""
    monkeypatch.setenv("PRUNEKIT_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(smoke, "SMOKE_BATCHES", 1)
    monkeypatch.setattr(smoke, "SMOKE_BATCH_SIZE", 2)
    plan = plan_recipe(recipe, override(recipe), smoke=True)
    folders = run_plan(plan, tmp_path / "out", store, "cpu", force=False, resume="")
    assert [(f.status, f.error) for f in folders] == [("done", None)] * len(folders)
    assert len(folders) >= 2
