"""A folder with images, a recipe and a store, and a plugin that does what a test tells it to."""

import importlib

import numpy as np
import pytest

from prunekit.catalog.kinds import KINDS
from prunekit.catalog.registry import Entry, Registry, load_registry
from prunekit.engine.engine import Engine
from prunekit.engine.keys import make_keys
from prunekit.engine.work import Inputs
from prunekit.recipe.plan import make_plan
from prunekit.recipe.toml.document import load_recipe
from prunekit.store.keys import hash_source
from prunekit.store.stages import Store
from prunekit.training.compute import open_compute

RECIPE = """
seed = 0
[dataset]
use = "npz"
file = "images.npz"
batch_size = 8
validation = 0.25
augment = ["flip"]
[architecture]
use = "small-cnn"
[threat]
eps = 0.1
[objective]
use = "benign"
[[stage]]
kind = "pretrain"
epochs = 2
[[stage]]
kind = "prune"
sparsity = 0.5
pruner = "lwm"
[[stage]]
kind = "finetune"
epochs = 2
[[stage]]
kind = "evaluate"
with = ["clean"]
"""

LEARNED = 'kind = "prune"\npruner = "score"\nepochs = 2\nbudget = "global"'

SCORED = RECIPE.replace('kind = "prune"', LEARNED).replace('pruner = "lwm"\n', "")

PARTS = '''
"""A plugin that does what a test tells it to."""
import numpy as np
import torch
from prunekit.contracts import Data, Loss, Result, Scores

act = {}
seen = []


def tell(what):
    seen.append(what)
    act.get(what, lambda: None)()


def build_pruner(options, context):
    def score(context):
        tell("pruner")
        act.get("look", lambda context: None)(context)
        return Scores({name: w.abs() for name, w in context.weights.items()})

    return score


def build_evaluator(options, context):
    def evaluate(model, batches):
        tell("evaluator")
        act.get("judge", lambda context: None)(context)
        n = sum(len(y) for _, y in batches)
        return Result({"value": act.get("value", 0.5)}, {"correct": np.zeros(n, bool)})

    return evaluate


def build_objective(options, context):
    act.get("learn", lambda context: None)(context)

    def step(x, y, clock):
        tell("objective")
        logits = context.model(x)
        loss = torch.nn.functional.cross_entropy(logits, y)
        return Loss(loss, logits, {"odd": loss.detach() * float("nan")})

    return step


class Recorded:
    def __init__(self, name, n):
        self.name, self.n = name, n

    @property
    def labels(self):
        tell(self.name)
        return torch.arange(self.n) % 3

    def batches(self, indices):
        tell(self.name)
        for index in indices:
            yield torch.zeros(len(index), 1, 8, 8, dtype=torch.uint8) + index[:, None, None, None]


def build_dataset(options, context):
    return Data(Recorded("train", 24), Recorded("test", 10), (1, 8, 8), 3, (), "recorded")
'''


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """The plugin above, afresh."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "told_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(folder)
    hash_source.cache_clear()
    monkeypatch.delitem(importlib.sys.modules, "told_parts", raising=False)
    return importlib.import_module("told_parts")


@pytest.fixture
def fail():
    """Makes an act of the plugin that raises."""

    def fail(error):
        def act():
            raise error

        return act

    return fail


def find_registry():
    told = [
        Entry(KINDS[kind](name="told", summary="Told", build=f"told_parts:build_{kind}"),
              "told", "told-dist 1.2")
        for kind in ("pruner", "evaluator", "objective", "dataset")
    ]  # fmt: skip
    installed = load_registry()
    return Registry((*installed.entries, *told))


class Bench:
    """A folder with a recipe, a store and a device."""

    recipe, scored = RECIPE, SCORED
    registry = staticmethod(find_registry)

    def __init__(self, folder):
        self.folder, self.events, self.compute = folder, [], open_compute("cpu")
        self.write_images(0)

    def write_images(self, seed):
        draw = np.random.default_rng(seed)
        images = draw.integers(0, 256, (30, 8, 8), dtype=np.uint8)
        labels = np.arange(30) % 3
        np.savez(self.folder / "images.npz", x_train=images[:20], y_train=labels[:20],
                 x_test=images[20:], y_test=labels[20:])  # fmt: skip

    def plan(self, *settings, recipe=RECIPE):
        path = self.folder / "r.toml"
        path.write_text(recipe)
        return make_plan(load_recipe(path, settings), find_registry())

    def engine(self, store="store", report=None):
        return Engine(Store(self.folder / store), self.compute, report or self.events.append)

    def run(self, *settings, recipe=RECIPE, out="out", store="store", report=None):
        return self.engine(store, report).run(self.plan(*settings, recipe=recipe),
                                              self.folder / out)  # fmt: skip

    def keys(self, *settings, recipe=RECIPE):
        (run,) = self.plan(*settings, recipe=recipe).runs
        return self.make_keys(run)

    def make_keys(self, run):
        loaded = Inputs(self.compute, self.events.append).load(run)
        return [made.key for made in make_keys(run, loaded, self.compute)]

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)
