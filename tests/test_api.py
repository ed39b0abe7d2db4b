"""From Python: the command's results, the caller's network untouched, nothing shared wrongly."""

import copy
import doctest
import importlib
import json
import random
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from prunekit_arrays.reading import KEYS
from prunekit_python.identity import identify
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer

import prunekit
from prunekit import api
from prunekit.cli.group import main
from prunekit.contracts import Data, Threat
from prunekit.data.batches import Arrays
from prunekit.errors import RunError, UserError


def test_examples_in_the_docstrings():
    """They start with what the module's docstring makes."""
    runner = doctest.DocTestRunner()
    tests = sorted(doctest.DocTestFinder().find(api), key=lambda t: t.name != api.__name__)
    (module, *others) = [t for t in tests if t.examples]
    assert len(others) >= 3
    module.globs = vars(api).copy()
    runner.run(module, clear_globs=False)
    for test in others:
        test.globs = module.globs.copy()
        runner.run(test)
    assert runner.summarize().failed == 0


def test_importing_prunekit_imports_no_torch():
    code = "import sys, prunekit; dir(prunekit); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"run", "load", "evaluate", "make_masks"} <= set(dir(prunekit))
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = prunekit.runn


def test_one_evaluator_needs_no_list():
    net = make_net()
    listed = prunekit.evaluate(net, (X, Y), ["clean"]).metrics
    assert prunekit.evaluate(net, (X, Y), "clean").metrics == listed
    table = {"use": "pgd", "steps": 1, "restarts": 1}
    found = prunekit.evaluate(net, (X, Y), table, threat="8/255").metrics
    assert found["pgd.eps"] == pytest.approx(8 / 255)  # what it was measured with


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.parents = [self]


def test_a_network_that_holds_itself_is_not_followed():
    torch.manual_seed(0)
    one = identify(Holder())
    torch.manual_seed(0)
    assert one == identify(Holder())
    assert "unique" not in one


class Net(nn.Module):
    """A class in a file; it holds a number, as networks do."""

    def __init__(self, width=8):
        super().__init__()
        self.slope = 0.1
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.fc = nn.Linear(64 * width, 3)

    def forward(self, x):
        return self.fc(nn.functional.leaky_relu(self.conv(x), self.slope).flatten(1))


def make_net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options)


def make_images(n=30, seed=0):
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (n, 8, 8), dtype=np.uint8), np.arange(n) % 3


X, Y = make_images()
DATA = (X, Y, X[:10], Y[:10])

STAGES = """
[[stage]]
kind = "pretrain"
epochs = 2
[[stage]]
kind = "prune"
sparsity = 0.5
epochs = 2
[[stage]]
kind = "finetune"
epochs = 1
[[stage]]
kind = "evaluate"
with = ["clean", { use = "pgd", steps = 2, restarts = 1 }]
"""

RECIPE = f"""
name = "mine"
[dataset]
use = "npz"
file = "images.npz"
batch_size = 8
validation = 0.2
[architecture]
use = "python"
file = "net.py"
[threat]
eps = "8/255"
[objective]
use = "benign"
{STAGES}"""

FILE = """
import torch
from torch import nn
from torchvision.models import VisionTransformer

{source}

def make():
    torch.manual_seed(0)
    return Net()
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    import inspect

    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(RECIPE)
    (tmp_path / "net.py").write_text(FILE.replace("{source}", inspect.getsource(Net)))
    np.savez(tmp_path / "images.npz", **dict(zip(KEYS, DATA, strict=True)))
    return tmp_path


def call(*arguments):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def stages_of(folder):
    return [s["reused"] for s in json.loads((folder / "run.json").read_text())["stages"]]


# Runs


def test_a_run_is_that_of_the_command(here):
    """The same network from a file and from Python, the same images from a file and from arrays."""
    call("run", "r.toml", "--out", "cli/r")
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found = prunekit.run("r.toml", model=net, data=DATA, out="py/r", quiet=True)
    assert found.folder == here / "py/r"
    theirs = prunekit.load("cli/r")
    assert found.metrics == theirs.metrics
    assert set(found.metrics) == {"pretrain", "prune", "finetune", "evaluate"}
    for name, value in theirs.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value)
    assert found.masks.keys() == {"conv.weight", "fc.weight"}
    assert int(found.masks["conv.weight"].sum()) == 36
    assert bool((found.model.fc.weight[~found.masks["fc.weight"]] == 0).all())
    assert not found.model.training
    # The caller's network and generators are as they were.
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.array_equal(np.random.get_state()[1], state[2])


def test_what_the_network_freezes_stays_as_it_is_through_every_stage(here):
    """And is told, and left dense."""
    net = make_net()
    net.conv.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    found = prunekit.run("r.toml", model=net, data=DATA, quiet=True)
    assert found.masks.keys() == {"fc.weight"}
    after = found.model.state_dict()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {"conv.weight", "conv.bias"}
    told = json.loads((found.folder / "run.json").read_text())["stages"][0]["notes"]
    assert told == ["frozen by the network, neither trained nor pruned: conv.weight, conv.bias"]
    with pytest.warns(UserWarning, match="frozen by the network, neither"):
        assert prunekit.make_masks(net, 0.5).keys() == {"fc.weight"}
    net.fc.weight.requires_grad_(False)
    with pytest.raises(UserError, match="nothing to prune: the network freezes every weight"):
        prunekit.make_masks(net, 0.5)


class Shared(Net):
    """Two convolutions with one normalization, and a sum of what goes in and comes out."""

    def __init__(self):
        super().__init__()
        self.bn, self.other = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 6, 3, padding=1)
        self.back = nn.Conv2d(6, 8, 3, padding=1)

    def forward(self, x):
        x = self.bn(self.conv(x)).relu()
        x = x + self.bn(self.other(self.bn(x).relu()))
        return self.fc((x + self.back(self.inner(x).relu())).relu().flatten(1))


@pytest.mark.filterwarnings("ignore:(asked for|structure)")
@pytest.mark.parametrize("pruner", ["score", "lwm"])
def test_channels_that_meet_are_removed_together(pruner, here):
    torch.manual_seed(0)
    learned = {"epochs": 2} if pruner == "score" else {}
    prune = {"kind": "prune", "sparsity": 0.5, "pruner": pruner, "structure": "channel", **learned}
    recipe = {
        "dataset": {"use": "given", "batch_size": 8},
        "threat": {"eps": 0.1},
        "objective": "benign",
        "stage": [{"kind": "pretrain", "epochs": 1}, prune, {"kind": "finetune", "epochs": 1}],
    }
    found = prunekit.run(recipe, model=Shared(), data=DATA, quiet=True)
    kept = {name: mask.flatten(1).any(1) if mask.dim() > 1 else mask
            for name, mask in found.masks.items()}  # fmt: skip
    together = ("conv.weight", "conv.bias", "bn.weight", "bn.bias", "other.weight", "back.weight")
    assert all(torch.equal(kept[name], kept["conv.weight"]) for name in together)
    assert int(kept["conv.weight"].sum()) == 4
    assert int(kept["inner.weight"].sum()) == 3
    told = json.loads((found.folder / "run.json").read_text())["stages"][1]["notes"]
    dense = "structure 'channel' leaves dense: fc.weight (the output of the network)"
    assert dense in told
    # What reads removed channels does not matter.
    net, x = found.model.eval(), torch.rand(4, 1, 8, 8)
    before = net(x)
    gone = ~kept["conv.weight"]
    with torch.no_grad():
        for reader in (net.other, net.inner):
            reader.weight[:, gone] = 7.0
        net.back.weight[:, ~kept["inner.weight"]] = 7.0
        net.fc.weight.view(3, 8, 64)[:, gone] = 7.0
    assert torch.equal(net(x), before)


def test_a_run_that_only_judges_holds_the_network_that_it_judged(here):
    stages = [{"kind": "evaluate", "with": ["clean"]}]
    net = make_net().eval()
    for _ in range(2):
        found = prunekit.run({"stage": stages}, model=net, data=DATA, out="j", quiet=True)
        state = found.model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
        assert found.metrics["evaluate"]["clean.accuracy"].n == 10
    assert prunekit.load("j", net).metrics == found.metrics
    recipe = {"architecture": {"use": "python", "file": "net.py"}, "stage": stages}
    assert prunekit.run(recipe, data=DATA, out="p", quiet=True).model.fc.out_features == 3
    weights = torch.full_like(state["fc.weight"], 0.5)
    torch.save({**net.state_dict(), "fc.weight": weights}, "w.pt")
    recipe["architecture"]["init"] = "w.pt"
    for _ in range(2):
        found = prunekit.run(recipe, data=DATA, out="i", quiet=True)
        assert torch.equal(found.model.fc.weight, weights)


def test_the_same_call_finds_its_result_and_another_network_or_image_does_not(here):
    arguments = {"data": DATA, "quiet": True}
    first = prunekit.run("r.toml", model=make_net(), out="runs/a", **arguments)
    again = prunekit.run("r.toml", model=make_net(), out="runs/a", **arguments)
    assert again.metrics == first.metrics
    prunekit.run("r.toml", model=make_net(), out="runs/b", **arguments)
    assert stages_of(here / "runs/b") == [True] * 4
    prunekit.run("r.toml", model=make_net(seed=1), out="runs/c", **arguments)
    assert stages_of(here / "runs/c") == [False] * 4
    with pytest.raises(UserError, match="holds the runs of another recipe"):
        prunekit.run("r.toml", model=make_net(seed=1), out="runs/a", **arguments)
    bright = (np.clip(X, 1, 255), *DATA[1:])
    prunekit.run("r.toml", model=make_net(), data=bright, out="runs/d", quiet=True)
    assert stages_of(here / "runs/d") == [False] * 4


def test_settings_and_tables(here):
    tables = {
        "objective": "benign",
        "dataset": {"use": "cifar10", "batch_size": 8, "validation": 0.2},
        "stage": [{"kind": "pretrain", "epochs": 1}],
    }
    found = prunekit.run(
        tables, model=make_net(), data=DATA, settings={"pretrain.epochs": 2}, out="x", quiet=True
    )
    assert found.metrics["pretrain"]["epoch"] in (1, 2)
    recipe = (here / "x/recipe.toml").read_text()
    assert "epochs = 2" in recipe
    assert 'use = "given"' in recipe
    assert "batch_size = 8" in recipe
    assert tables["dataset"]["use"] == "cifar10"


def test_a_sweep_gives_a_result_each(here):
    (here / "r.toml").write_text(f'{RECIPE}\n[sweep]\n"prune.sparsity" = [0.5, 0.75]\n')
    with pytest.raises(UserError, match=r"sweep of 2 runs; call prunekit\.run_sweep"):
        prunekit.run("r.toml", model=make_net(), data=DATA)
    found = prunekit.run_sweep("r.toml", model=make_net(), data=DATA, quiet=True)
    assert [r.metrics["evaluate"]["sparsity"] for r in found] == [0.5, 0.75]
    assert [stages_of(r.folder)[0] for r in found] == [False, True]


def test_what_is_wrong_is_said(here):
    net = make_net()
    with pytest.raises(UserError, match=r"model must be an nn\.Module, got function"):
        prunekit.run("r.toml", model=make_net, data=DATA)
    with pytest.raises(
        UserError, match=r"data has to be \(x_train, y_train, x_test, y_test\).*tuple of 3"
    ):
        prunekit.run("r.toml", model=net, data=DATA[:3])
    with pytest.raises(UserError, match=r"prune\.sparsty: .* mean 'sparsity'"):
        prunekit.run("r.toml", model=net, data=DATA, settings={"prune.sparsty": 0.5})
    with pytest.raises(RunError, match=r"gives \(2, 3\) for 2 images and 4 classes"):
        prunekit.run("r.toml", model=net, data=(X, np.arange(30) % 4, X, Y), quiet=True)
    with pytest.raises(UserError, match="no training image has label 0: number the classes 0, 1"):
        prunekit.run("r.toml", model=net, data=(X, Y + 1, X, Y + 1), quiet=True)
    with pytest.raises(UserError, match="not multiples of 1/255"):
        prunekit.run("r.toml", model=net, data=(X / 255.5, Y, X / 255, Y))


def test_numbers_of_numpy_and_floats_just_beside_the_range_are_taken():
    net = make_net()
    masks = prunekit.make_masks(net, 0.7)
    for number in (np.float32(0.7), torch.tensor(0.7)):
        found = prunekit.make_masks(net, number)
        assert all(torch.equal(mask, masks[name]) for name, mask in found.items())
    floats = X.astype(np.float32) / 255
    off = floats.copy()
    off[0, 0, 0], off[1, 1, 1], floats[0, 0, 0], floats[1, 1, 1] = 1 + 1e-7, -1e-7, 1, 0
    assert prunekit.evaluate(net, (off, Y)).metrics == prunekit.evaluate(net, (floats, Y)).metrics
    off[0, 0, 0] = 1.0001
    with pytest.raises(UserError, match=r"floats from .* to 1\.0001, but"):
        prunekit.evaluate(net, (off, Y))


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_class_without_training_images_is_counted_by_the_networks_outputs(here, missing):
    there = np.flatnonzero(Y - missing)
    some = (X[there], Y[there])
    found = prunekit.run("r.toml", model=make_net(), data=(*some, *some), quiet=True)
    assert found.masks
    with pytest.warns(UserWarning, match="data: the network has 3 outputs, and the training im"):
        prunekit.evaluate(make_net(), (*some, *some))
    # Without a network that says it, the caller does.
    tables = {"dataset": {"use": "given", "batch_size": 8, "validation": 0.2}}
    tables |= {"architecture": "small-cnn", "objective": "benign"}
    tables |= {"stage": [{"kind": "pretrain", "epochs": 1}]}
    settings = {"dataset.classes": 3}
    if missing < 2:
        with pytest.raises(UserError, match=r'settings=\{"dataset.classes": K\}'):
            prunekit.run(tables, data=(*some, X, Y), quiet=True)
    net = prunekit.run(tables, data=(*some, X, Y), settings=settings, quiet=True, out="s").model
    assert net(torch.zeros(1, 1, 8, 8)).shape == (1, 3)


def test_what_python_made_is_told_apart_on_the_command_line(here):
    prunekit.run("r.toml", model=make_net(), data=DATA, out="x", quiet=True)
    done = CliRunner().invoke(main, ["eval", "x", "--with", "clean"])
    assert done.exit_code == 2
    assert "the images came from a Python program; call prunekit.run there" in done.output
    # Named anew, it is as any other.
    rest = ["--dataset", "npz", "--set", "dataset.file=images.npz", "--model", "python"]
    out = call("eval", "x", "--with", "clean", *rest, "--set", "architecture.file=net.py", "--json")
    found = prunekit.load("x", make_net(seed=5))
    metrics = json.loads(out)["metrics"]
    assert metrics["clean.accuracy"]["value"] == found.metrics["evaluate"]["clean.accuracy"]


# Loading


def test_load(here):
    call("run", "r.toml", "--out", "runs/r")
    state = torch.get_rng_state()
    found = prunekit.load("runs/r")
    assert torch.equal(torch.get_rng_state(), state)
    alone = prunekit.load("runs/r/model.safetensors", make_net(seed=3))
    assert type(found.model).__name__ == "Net"
    for one, other in zip(found.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert {n: int(m.sum()) for n, m in found.masks.items()} == {
        "conv.weight": 36,
        "fc.weight": 768,
    }
    with pytest.raises(UserError, match="does not fit the network"):
        prunekit.load("runs/r", make_net(width=4))
    with pytest.raises(UserError, match="no run folder or file nowhere"):
        prunekit.load("nowhere")
    prunekit.run("r.toml", model=make_net(), data=DATA, out="runs/x", quiet=True)
    with pytest.raises(UserError, match=r"prunekit\.load there with model="):
        prunekit.load("runs/x")


# Judging


def test_judgements_are_those_of_eval(here):
    call("run", "r.toml", "--out", "runs/r")
    out = call("eval", "runs/r", "--with", "clean,pgd", "--set", "pgd.steps=3", "--json")
    found = prunekit.evaluate(
        prunekit.load("runs/r").model,
        DATA,
        ["clean", {"use": "pgd", "steps": 3}],
        threat="8/255",
        batch_size=8,
    )
    told = json.loads(out)["metrics"]
    described = {name: metric.describe() for name, metric in found.metrics.items()}
    assert described == {name: value for name, value in told.items() if "." in name}
    assert found.records["clean.correct"].shape == (10,)
    assert list(found.records["label"]) == list(Y[:10])


@pytest.mark.parametrize(
    "data",
    [
        (torch.from_numpy(X)[:, None], torch.from_numpy(Y)),
        (torch.from_numpy(X)[:, None] / 255, Y),
        [X, Y],
        (X[..., None], Y, X[..., None], Y),
        Data(*[Arrays(torch.from_numpy(X)[:, None], torch.from_numpy(Y))] * 2, (1, 8, 8), 3),
    ],
    ids=["tensors", "floats", "arrays", "four", "data"],
)
def test_images_in_any_form_are_judged_alike(data):
    net = make_net()
    found = prunekit.evaluate(net, data)
    logits = net(torch.from_numpy(X)[:, None] / 255)
    assert found.metrics["clean.accuracy"] == float((logits.argmax(1).numpy() == Y).mean())
    assert net.training


def make_threshold():
    """The class is 1 where the first of four pixels is above 0.5, else 0."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight[:] = torch.tensor([[-1.0, 0, 0, 0], [1.0, 0, 0, 0]])
        net[1].bias[:] = torch.tensor([0.5, -0.5])
    return net


FLOATS = torch.full((4, 1, 2, 2), 0.2)
FLOATS[:, 0, 0, 0] = torch.tensor([0.5001, 0.4999, 0.5001, 0.4999])
"""In levels of 255, these are between 127 and 128."""
LABELS = torch.tensor([1, 0, 0, 0])


@pytest.mark.parametrize(
    "data",
    [
        (FLOATS, LABELS),
        (FLOATS.double(), LABELS),
        (FLOATS.numpy()[:, 0], LABELS.numpy()),
        (FLOATS, LABELS, FLOATS, LABELS),
        DataLoader(TensorDataset(FLOATS, LABELS), 3),
        DataLoader([(x, int(y)) for x, y in zip(FLOATS, LABELS, strict=True)], 2),
    ],
    ids=["tensors", "doubles", "arrays", "four", "loader", "loader of pairs"],
)
def test_floats_between_the_levels_are_judged_as_they_are(data):
    found = prunekit.evaluate(make_threshold(), data)
    assert found.metrics["clean.accuracy"] == 0.75
    assert list(found.records["clean.correct"]) == [True, True, False, True]


def test_a_loader_of_both_kinds_of_pixels_and_of_none():
    """A batch of whole levels, one of all black, one of floats."""
    first = torch.full((2, 1, 2, 2), 128, dtype=torch.uint8) / 255
    x = torch.cat([first, torch.zeros(2, 1, 2, 2), FLOATS])
    labels = torch.cat([torch.tensor([1, 1, 0, 1]), LABELS])
    found = prunekit.evaluate(make_threshold(), DataLoader(TensorDataset(x, labels), 2))
    assert list(found.records["clean.correct"]) == [True] * 3 + [False] + [True, True, False, True]
    net = make_net()
    pixels = torch.from_numpy(X)[:, None] / 255
    loader = DataLoader(TensorDataset(pixels, torch.from_numpy(Y)), 7)
    attack = {"use": "pgd", "steps": 2, "eps": "8/255"}
    assert prunekit.evaluate(net, loader, attack).metrics == (
        prunekit.evaluate(net, (X, Y), attack).metrics
    )
    for wrong, message in (
        (DataLoader(TensorDataset(FLOATS), 2), r"give batches \(x, y\) of tensors; it gave a list"),
        (DataLoader([{"x": 1}], 1), r"give batches \(x, y\) of tensors; it gave a dict"),
        (DataLoader([]), "gives no batch"),
        ([(FLOATS, LABELS)] * 2, r"a list of batches; hand over .* \(torch\.cat\(\[x for x, _ in"),
        ([(FLOATS, LABELS)] * 3, r"a list of batches; hand over .* \(torch\.cat\(\[x for x, _ in"),
        (DataLoader(TensorDataset(FLOATS, LABELS), None), "gives single images; give it a batch"),
        ((torch.zeros(2, 8, 8, 3), LABELS), r"or give x\.permute\(0, 3, 1, 2\) in Python"),
        (DataLoader(TensorDataset(FLOATS * 4 - 1, LABELS), 2), "has floats from -0.199"),
        (DataLoader(TensorDataset(FLOATS, LABELS.float()), 2), "data: y is of type float32"),
    ):
        with pytest.raises(UserError, match=message):
            prunekit.evaluate(make_threshold(), wrong)


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.no_grad])
def test_calls_inside_inference_mode_are_as_outside(inside, tmp_path):
    attack = {"use": "pgd", "steps": 2, "eps": "8/255"}
    stages = [{"kind": "pretrain", "epochs": 1}]
    recipe = {"dataset": {"use": "given"}, "objective": "benign", "stage": stages}

    def call(place):
        net, x = make_net(), torch.from_numpy(X)[:, None]
        masks = prunekit.make_masks(net, 0.5, "snip", data=(x, Y))
        handed = {"model": net, "data": (X, Y, X, Y), "out": tmp_path / place, "quiet": True}
        run = prunekit.run(recipe, **handed, store=tmp_path / f"{place}-store")
        return [prunekit.evaluate(net, (x, Y), attack).metrics, masks, run.model.state_dict()]

    expected = call("outside")
    with inside():
        found = call("inside")
    assert found[0] == expected[0]
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        assert not any(value.is_inference() for value in ours.values())


def test_images_that_a_network_does_not_suit():
    with pytest.raises(UserError, match=r"cannot take images of 1 x 4 x 4: RuntimeError: .*mat1"):
        prunekit.evaluate(make_net(), (X[:, :4, :4], Y))
    with pytest.raises(UserError, match="there is a label 3, and the network has 3 classes"):
        prunekit.evaluate(make_net(), (X, Y + 1))
    with pytest.raises(
        UserError, match=r"data has to be \(x, y\), a DataLoader, or \(x_train, .*; got int"
    ):
        prunekit.evaluate(make_net(), 3)
    with pytest.raises(UserError, match="data: x has floats from -1 to"):
        prunekit.evaluate(make_net(), (X / 127.5 - 1, Y))
    with pytest.raises(UserError, match="data is a list of batches; hand over all images"):
        prunekit.evaluate(make_net(), [(X[:2], Y[:2]), (X[2:], Y[2:])])
    # Floats of few digits are levels no more.
    prunekit.evaluate(make_net(), (torch.from_numpy(X)[:, None].bfloat16() / 255, Y))
    # Classes without an image are classes all the same.
    found = prunekit.evaluate(make_net(), (X[:1], Y[:1]), threat=0.1)
    assert found.metrics["clean.accuracy"].n == 1


@pytest.mark.parametrize("threat", ["8/255", 8 / 255, {"eps": "8/255"}, Threat("linf", 8 / 255)])
def test_threats(threat):
    attack = {"use": "pgd", "steps": 2, "restarts": 1}
    one = prunekit.evaluate(make_net(), (X, Y), [attack], threat=threat)
    other = prunekit.evaluate(make_net(), (X, Y), [{**attack, "eps": "8/255"}])
    assert one.metrics == other.metrics
    with pytest.raises(UserError, match="needs a threat"):
        prunekit.evaluate(make_net(), (X, Y), [attack])


# Masks


def test_masks_are_those_of_a_prune_stage(here):
    masks = prunekit.make_masks(make_net(), 0.75, "random", seed=4)
    stage = [{"kind": "prune", "sparsity": 0.75, "pruner": "random"}]
    found = prunekit.run({"seed": 4, "stage": stage, "dataset": {"use": "given"}},
                         model=make_net(), data=DATA, quiet=True)  # fmt: skip
    assert masks.keys() == found.masks.keys()
    assert all(torch.equal(masks[name], found.masks[name]) for name in masks)


def test_largest_weights_are_kept_by_hand():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    net[1].weight.data = torch.tensor([[0.1, -0.5, 0.2, 0.0], [0.3, 0.4, -0.05, 0.6]])
    masks = prunekit.make_masks(net, sparsity=0.5)
    expected = torch.tensor([[False, True, False, False], [True, True, False, True]])
    assert torch.equal(masks["1.weight"], expected)
    prunekit.apply_masks(net, masks)
    assert int((net[1].weight == 0).sum()) == 4


@pytest.mark.filterwarnings("ignore:(asked for|structure)")
def test_masks_with_images_structures_and_exclusions():
    net = make_net()
    sensitive = prunekit.make_masks(net, 0.5, "snip", data=(X, Y), budget="global")
    assert sum(int(m.sum()) for m in sensitive.values()) == (72 + 1536) // 2
    channels = prunekit.make_masks(net, 0.5, structure="channel", data=(X, Y), exclude=[])
    assert int(channels["conv.weight"].flatten(1).any(1).sum()) == 4
    assert torch.equal(channels["conv.bias"], channels["conv.weight"].flatten(1).any(1))
    assert list(prunekit.make_masks(net, 0.5, exclude=["conv.*"])) == ["fc.weight"]
    net.leave_dense = ("fc.weight",)
    with pytest.warns(
        UserWarning,
        match=r"left dense by the architecture .*: fc\.weight",
    ):
        assert list(prunekit.make_masks(net, 0.5)) == ["conv.weight"]
    with pytest.raises(RunError, match=r"nothing to prune: exclude.* takes all of it: \*; name"):
        prunekit.make_masks(net, 0.5, exclude=["*"])
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    why = r"fits no layer of this network: 1\.weight \(the output of the network\)"
    with pytest.raises(RunError, match=why):
        prunekit.make_masks(head, 0.5, structure="channel", data=(X, Y))
    with pytest.raises(RunError, match=r"1\.weight \(64 inputs make no whole groups\)"):
        prunekit.make_masks(head, structure="2:5", data=(X, Y))
    with pytest.raises(UserError, match=r"give data=\(x, y\)"):
        prunekit.make_masks(make_net(), 0.5, "snip")
    with pytest.raises(UserError, match="is found by sending an image through: give data"):
        prunekit.make_masks(make_net(), structure="2:4")
    with pytest.raises(UserError, match=r"pruner 'score' learns its scores.*prunekit\.run"):
        prunekit.make_masks(make_net(), 0.5, {"use": "score"})
    with pytest.raises(UserError, match="sparsity"):
        prunekit.make_masks(make_net(), 1.5)


# What identifies a network


def content(net):
    return identify(net)["content"]


@pytest.mark.slow
def test_a_network_is_known_again_in_another_process(here, monkeypatch):
    code = "import net; from prunekit_python import identity; print(identity.identify(net.make()))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    monkeypatch.syspath_prepend(here)
    monkeypatch.delitem(sys.modules, "net", raising=False)
    net = importlib.import_module("net").make()
    assert there.stdout == f"{identify(net)}\n", there.stderr


def hold(net):
    net.held = [nn.Linear(1, 1, bias=False).requires_grad_(False), {"p": 0.5, "q": (1, None)}]
    net.held[0].weight.fill_(2)


def scale(self, x):
    return self.fc(self.conv(x).flatten(1))


CHANGES = {
    "slope": lambda net: setattr(net, "slope", 0.2),
    "bias": lambda net: net.conv.bias.data[0].add_(1),
    "stride": lambda net: setattr(net.conv, "stride", (2, 2)),
    "hook": lambda net: net.register_forward_hook(lambda module, inputs, output: output * 2),
    "buffer": lambda net: net.register_buffer("mean", torch.zeros(1), persistent=False),
    "tied": lambda net: setattr(net, "other", net.conv),
    "function": lambda net: setattr(net, "act", torch.relu),
    "forward": lambda net: setattr(net, "forward", types.MethodType(scale, net)),
    "held": hold,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_a_network_changes_its_hash(change):
    one, other = make_net(), make_net()
    assert content(one) == content(other)
    change(other)
    assert content(one) != content(other)
    third = make_net()
    change(third)
    assert content(third) == content(other)
    assert "unique" not in identify(third)


def test_the_mode_changes_nothing():
    assert content(make_net().eval()) == content(make_net())


def test_frozen_is_not_trained_and_a_parameter_is_no_buffer():
    def hold(make):
        net = make_net()
        net.frozen = make(torch.ones(2))
        return content(net)

    trained, frozen = nn.Parameter, lambda value: nn.Parameter(value, requires_grad=False)
    assert len({hold(trained), hold(frozen), hold(torch.clone)}) == 3


def test_tied_weights_are_not_two_equal_ones():
    one, other = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    one[1].weight = one[0].weight
    other[0].weight.data = one[0].weight.data.clone()
    other[1].weight.data = one[0].weight.data.clone()
    for layer, twin in zip(one, other, strict=True):
        twin.bias.data = layer.bias.data.clone()
    assert content(one) != content(other)


def test_what_a_factory_binds_and_a_program_sets_is_part_of_the_hash():
    def make_class(factor):
        class Scaled(nn.Linear):
            bias_too = False

            def forward(self, x):
                return factor * super().forward(x)

        return Scaled

    def make(factor):
        torch.manual_seed(0)
        return make_class(factor)(2, 2)

    assert content(make(2)) == content(make(2)) != content(make(3))
    net = make(2)
    type(net).bias_too = True
    assert content(net) != content(make(2))


def test_source_is_part_of_the_hash(here, monkeypatch):
    """That of the class, and of what its file imports from its folder."""
    (here / "parts.py").write_text("def act(x):\n    return x\n")
    text = "from torch import nn\nfrom parts import act\n\nclass N(nn.Linear):\n    "
    monkeypatch.syspath_prepend(here)
    found = []
    for own, helper in (("pass", "x"), ("pass  # more", "x"), ("pass", "x + 1"), ("pass", "x")):
        (here / "parts.py").write_text(f"def act(x):\n    return {helper}\n")
        (here / "netfile.py").write_text(f"{text}{own}\n")
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, "netfile", raising=False)
        torch.manual_seed(0)
        found.append(content(importlib.import_module("netfile").N(2, 2)))
    assert found[0] == found[3]
    assert len(set(found)) == 3


def test_what_cannot_be_read_is_never_shared(here, capsys):
    """A class without a file (a notebook's), or a value that no text stands for."""
    space = {"__name__": "__main__", "nn": nn, "Net": Net}
    exec("class Typed(Net):\n    pass", space)
    space["Typed"].__module__ = "nowhere"
    torch.manual_seed(0)
    net = space["Typed"]()
    first, second = identify(net), identify(net)
    assert first["unique"] == "the source of Typed is not in a file"
    assert first["content"] != second["content"]
    prunekit.run("r.toml", model=net, data=DATA, out="runs/a", quiet=True)
    prunekit.run("r.toml", model=net, data=DATA, out="runs/b")
    assert stages_of(here / "runs/b") == [False] * 4
    assert "no stored stage can serve this network: the source of Typed" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:(asked for|not to be pruned|structure)")
def test_masks_of_packed_attention():
    torch.manual_seed(0)
    net = VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=3)
    nn.init.normal_(net.heads.head.weight)
    x = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    data = (x, np.arange(6) % 3)
    (name,) = (n for n, _ in net.named_parameters() if n.endswith("in_proj_weight"))
    with pytest.warns(UserWarning, match=r"by the kind of their layer: encoder\.pos_embedding"):
        masks = prunekit.make_masks(net, 0.5, "snip", data=data)
    assert int(masks[name].sum()) == 48 * 16 // 2
    masks = prunekit.make_masks(net, structure="2:4", data=data)
    assert bool((masks[name].unflatten(1, (-1, 4)).sum(2) == 2).all())
    # torch calls no layer for its projections, so that channels have nowhere to be closed.
    with pytest.warns(UserWarning, match=r"'channel' leaves dense: .*out_proj.*in_proj_weight"):
        masks = prunekit.make_masks(net, 0.5, structure="channel", data=data)
    assert name not in masks
    assert any("mlp" in n for n in masks)
