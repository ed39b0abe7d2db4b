"""Zeros that a network starts with, and zeros that a layer would not keep, in whole runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekit

NET = """
import torch.nn.functional as F
from torch import nn


class Centred(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Centred(1, 4, 3)
        self.fc = nn.Linear(144, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.fc(self.conv(x).relu().flatten(1)).relu()
        return F.linear(hidden, self.head.weight.clamp(-1, 1), self.head.bias)


def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 3))
"""
draw = np.random.default_rng(0)
X, Y = draw.integers(0, 256, (30, 8, 8), dtype=np.uint8), np.arange(30) % 3


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    return tmp_path


def run(*stages, out="r", **handed):
    recipe = {
        "dataset": {"use": "given", "batch_size": 8, "validation": 0.2},
        "objective": "benign",
        "stage": [*stages, {"kind": "evaluate", "with": ["clean"]}],
    }
    if "model" not in handed:
        recipe["architecture"] = {"use": "python", "file": "net.py", **handed.pop("architecture")}
    data = (X, Y, X[:10], Y[:10])
    return prunekit.run(recipe, data=data, out=out, quiet=True, store=out + "-store", **handed)


def notes(out="r"):
    stages = json.loads(Path(out, "run.json").read_text())["stages"]
    return " ".join(text for stage in stages for text in stage["notes"])


def make_pruned():
    """80 % of the first layer are zero, and half of the second."""
    space = {}
    exec(NET, space)
    torch.manual_seed(0)
    net = space["plain"]()
    for layer, kept in ((net[1], 256), (net[3], 30)):
        weight = layer.weight.data
        weight[weight.abs() < weight.abs().flatten().topk(kept).values.min()] = 0
    return net


def zeros(net):
    return [int((net[i].weight == 0).sum()) for i in (1, 3)]


@pytest.mark.parametrize("how", ["file", "safetensors", "network"])
def test_zeros_stay_zero_in_finetuning_and_pruning(how):
    net = make_pruned()
    handed = {"model": net}
    if how != "network":
        torch.save(net.state_dict(), "pruned.pth")
        name = "pruned.pth"
        if how == "safetensors":
            from safetensors.torch import save_file

            name = "pruned.safetensors"
            save_file(net.state_dict(), name)
        handed = {"architecture": {"build": "plain", "init": name}}
    finetune = {"kind": "finetune", "epochs": 1}
    done = run(finetune, **handed)
    assert zeros(done.model) == [1024, 30]
    assert not torch.equal(done.model[1].weight, net[1].weight)
    assert done.metrics["finetune"]["sparsity"] == pytest.approx(1054 / 1340)
    assert "without masks, and 78.7% of its weights are zero: taken as removed" in notes()
    # What is pruned after it starts from there: 10 % of each layer are left, none of them revived.
    prune = {"kind": "prune", "sparsity": 0.9, "pruner": "random"}
    done = run(prune, {**finetune, "name": "again"}, out="s", **handed)
    assert zeros(done.model) == [1152, 54]
    before = net[1].weight != 0
    assert not (done.masks["1.weight"] & ~before).any()
    # A training of all weights fills them, and says so.
    done = run({"kind": "pretrain", "epochs": 1}, out="t", **handed)
    assert zeros(done.model)[0] < 1024
    assert done.metrics["pretrain"]["sparsity"] == 0
    assert "of its weights are zero: pretrain trains them" in notes("t")


def test_masks_of_a_network_with_zeros_revive_none():
    net = make_pruned()
    with pytest.warns(UserWarning, match="taken as removed"):
        masks = prunekit.make_masks(net, 0.9, "random")
    assert not (masks["1.weight"] & (net[1].weight == 0)).any()


PRUNE = {"kind": "prune", "sparsity": 0.75}


@pytest.mark.parametrize(
    "stage",
    [
        {**PRUNE, "pruner": "lwm"},
        {"kind": "prune", "pruner": "lwm", "structure": "2:4"},
        {**PRUNE, "epochs": 1, "budget": "global"},
    ],
)
def test_a_changed_kernel_stays_dense_and_is_named(stage):
    done = run(stage, architecture={"build": "Net"})
    assert not any(name.startswith("conv") for name in done.masks)
    assert (done.model.conv.weight == 0).sum() == 0
    assert "conv.weight (changed before it multiplies)" in notes()
    # The clamped weight of the head keeps its zeros, which are those that multiply.
    if "structure" not in stage:
        # 882 of 1176 weights are removed, and the 36 of conv count as well.
        assert done.metrics["prune"]["sparsity"] == pytest.approx(882 / 1212)
        assert {"fc.weight", "head.weight"} <= done.masks.keys()


class Parts(nn.Module):
    """Plain layers, whose weights the network uses in its own way."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.fc = nn.Linear(72, 4)
        self.spare = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.conv2d(x, self.conv.weight - self.conv.weight.mean()).flatten(1)
        return self.head(self.fc(x).relu())


@pytest.mark.parametrize("data", [None, (X, Y)])
def test_how_a_network_uses_its_layers_decides(data):
    told = r"conv\.weight \(changed before it multiplies\), spare\.weight \(reaches no product\)"
    # 150 of 334 weights: 288 of fc, 12 of head, and 18 and 16 that stay dense.
    got = "got 0.4491 of the weights of all Conv2d, Linear and attention layers, left dense or not"
    with pytest.warns(UserWarning, match=told), pytest.warns(UserWarning, match=got):
        masks = prunekit.make_masks(Parts(), 0.5, data=data)
    assert list(masks) == ["fc.weight", "head.weight"]


def test_without_images_a_network_of_odd_size_is_looked_at_layer_by_layer():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 9 * 11, 3))
    with pytest.warns(UserWarning, match=r"each layer alone; data=\(x, y\) shows"):
        assert len(prunekit.make_masks(net, 0.5)) == 2


def test_a_network_of_changed_kernels_alone_trains_and_has_nothing_to_prune():
    space = {}
    exec(NET, space)
    net = nn.Sequential(space["Centred"](1, 3, 8), nn.Flatten())
    done = run({"kind": "pretrain", "epochs": 1}, model=net)
    assert done.metrics["evaluate"]["sparsity"] == 0
    assert list(json.loads((done.folder / "run.json").read_text())["sparsity"]["layers"]) == [
        "0.weight"
    ]
    with pytest.raises(prunekit.RunError, match=r"nothing to prune: .*left dense: 0\.weight"):
        run({**PRUNE, "pruner": "lwm"}, {"kind": "finetune", "epochs": 1}, model=net, out="s")


def test_a_structure_that_fits_nothing_names_changed_kernels_too():
    space = {}
    exec(NET, space)
    net = nn.Sequential(space["Centred"](1, 3, 8), nn.Flatten(), nn.Linear(3, 3))
    why = r"2\.weight \(the output of the network\); 0\.weight \(changed before it multiplies\)"
    with pytest.raises(prunekit.RunError, match=why):
        prunekit.make_masks(net, 0.5, structure="channel", data=(X, Y))
