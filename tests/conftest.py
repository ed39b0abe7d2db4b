"""Tests use one thread: tiny tensors are fastest so, and bits do not depend on the machine."""

import importlib
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
# What recipes ran is not remembered for the person who runs the tests.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="prunekit-state-")
# Tables would keep to it.
os.environ.pop("COLUMNS", None)

import pytest
from click.testing import CliRunner

from prunekit.cli.group import main
from prunekit.contracts import Metric
from prunekit.store.metrics import write_metrics


def pytest_configure():
    """SIGTERM ends the tests, also while one is inside a run, which takes it for a wish to stop."""
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    parent = os.getppid()

    def end():
        while not (select.select([told], [], [], 1)[0] and os.read(told, 1)[0] == signal.SIGTERM):
            if "PYTEST_XDIST_WORKER" in os.environ and os.getppid() != parent:
                break
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()


@pytest.fixture(autouse=True)
def tracer():
    """What traces the tests, as coverage does, comes back when pyautoattack took it away."""
    before = sys.gettrace()
    yield
    if sys.gettrace() is not before:
        sys.settrace(before)


@pytest.fixture
def make_normed_net():
    """Two linear layers between which there are both kinds of normalisation."""
    import torch
    from torch import nn

    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)
        )

    return make


@pytest.fixture
def evaluate():
    """Makes what an evaluate stage leaves in the record of a run."""

    def evaluate(
        key: str, accuracy: float, sparsity: float, name: str = "evaluate"
    ) -> dict[str, Any]:
        metrics = {
            "clean.accuracy": Metric(
                accuracy, n=360, low=accuracy - 0.02, high=accuracy + 0.01, unit="fraction"
            ),
            "certify.acr": Metric(accuracy / 2),
            "certify.certified@0.25": Metric(accuracy / 4, unit="fraction"),
            "certify.zero_gradient": Metric(0, kind="diagnosis", note="gave no gradient"),
            "certify.note": "not a number",
            "sparsity": Metric(sparsity, unit="sparsity"),
        }
        metrics = write_metrics(metrics)
        return {"name": name, "kind": "evaluate", "key": key, "seconds": 1.0, "metrics": metrics}

    return evaluate


@pytest.fixture
def write_run():
    def write_run(folder: Path, settings: dict[str, Any], *stages: Any, **other: Any) -> Path:
        """Write a run's record; `settings` are those of a sweep, the seed among them."""
        folder.mkdir(parents=True)
        told = {
            "format": 2,
            "name": "quickstart",
            "run": folder.name,
            "status": "done",
            "smoke": False,
            "seed": settings.get("seed", 0),
            "settings": settings,
            "seconds": 12.3,
            "stages": [
                {"name": "pretrain", "kind": "pretrain", "key": "p", "metrics": {}},
                *stages,
            ],
            "sparsity": {"kept": 10, "weights": 100, "layers": {}},
            "error": None,
        }
        (folder / "run.json").write_text(json.dumps(told | other))
        return folder

    return write_run


@pytest.fixture
def write_sweep(evaluate, write_run):
    def write_sweep(root: Path) -> None:
        """Two sparsities, two seeds; the dense evaluation of a seed is shared by its sparsities."""
        accuracy = {(0.9, 0): 0.70, (0.9, 1): 0.74, (0.99, 0): 0.60, (0.99, 1): 0.61}
        for (sparsity, seed), found in accuracy.items():
            write_run(
                root / f"sparsity={sparsity},seed={seed}",
                {"prune.sparsity": sparsity, "seed": seed},
                evaluate(f"dense{seed}", 0.80 + 0.02 * seed, 0.0, name="dense"),
                evaluate(f"{sparsity}-{seed}", found, sparsity),
            )

    return write_sweep


@pytest.fixture(scope="session")
def choose():
    """Makes a selection with the budget of that name."""
    from prunekit import NoOptions
    from prunekit.catalog.registry import load_registry
    from prunekit.contexts import Context
    from prunekit.pruning.selection import Selection
    from prunekit.testing import example_context

    registry = load_registry()

    def choose(sparsity, budget="layer", structure="element"):
        found = registry.find("budget", budget).component
        build = importlib.import_module(found.build.partition(":")[0])
        made = getattr(build, found.build.partition(":")[2])(NoOptions(), example_context(Context))
        return Selection(sparsity, made, structure, found.compares)

    return choose


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


@pytest.fixture
def recipe():
    return RECIPE


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder but for r.toml, and in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRUNEKIT_STORE", raising=False)
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def call(here):
    def call(*arguments, code=0):
        """Run the command; its stdout and stderr."""
        done = CliRunner().invoke(main, [str(a) for a in arguments])
        assert done.exit_code == code, done.output
        if "--debug" not in arguments:
            assert "Traceback" not in done.output
        return done.stdout, done.stderr

    return call


@pytest.fixture
def read(call):
    def read(*arguments, code=0):
        """The same with --json: what stdout says."""
        content = json.loads(call(*arguments, "--json", code=code)[0])
        assert content.pop("schema_version") == 1
        return content

    return read


@pytest.fixture(scope="session")
def finish(tmp_path_factory):
    def finish(recipe):
        """(a folder with the recipe r.toml, which was run there, what that printed)."""
        folder = tmp_path_factory.mktemp("finished")
        (folder / "r.toml").write_text(recipe)
        old = os.getcwd()
        os.chdir(folder)
        try:
            done = CliRunner().invoke(main, ["run", "r.toml", "--device", "cpu"])
        finally:
            os.chdir(old)
        assert done.exit_code == 0, done.output
        return folder, done

    return finish


@pytest.fixture(scope="session")
def finished(finish):
    """A folder with r.toml run into runs/tiny."""
    return finish(RECIPE)


@pytest.fixture
def ran(finished, here, monkeypatch):
    """In a copy of that folder."""
    shutil.copytree(finished[0], here / "copy")
    monkeypatch.chdir(here / "copy")
    return here / "copy"
