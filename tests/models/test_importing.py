"""Networks of other code become runs that evaluate and finetune."""

import io
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from prunekit_nets import NetOptions
from prunekit_nets.linear import lin_1
from prunekit_nets.vgg import build_vgg
from prunekit_python import PythonOptions
from prunekit_python.loading import build_python
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune

from prunekit import load
from prunekit.cli.group import main
from prunekit.contexts import ArchitectureContext
from prunekit.errors import UserError
from prunekit.store.tensors.checkpoint import read_checkpoint, read_masks
from prunekit.testing import example_context

pytestmark = pytest.mark.usefixtures("here")


def call(*arguments, code=0):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.stdout, done.stderr


def take(kind, *arguments, model="lin-1", code=0):
    """Import the file x.pt into runs/x."""
    return call("import", kind, "x.pt", "--model", model, "--dataset", "digits", *arguments,
                code=code)  # fmt: skip


def make_net(seed=0):
    torch.manual_seed(seed)
    return lin_1(NetOptions(), example_context(ArchitectureContext, shape=(1, 8, 8), classes=10))


def write_hydra(net, path="x.pt", prefix="module.", extra=None, write=torch.save):
    """A file as HYDRA writes it after an epoch of its cosine schedule, random scores; the scores.

    The learning rate of the schedule is a numpy number; weights are in parallel on devices, and
    momentum is there for every parameter.
    """
    state, scores = dict(net.state_dict()), {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            scores[name] = torch.randn_like(module.weight)
            state[f"{name}.popup_scores"] = scores[name]
    state = {f"{prefix}{name}": value for name, value in {**state, **(extra or {})}.items()}
    trained = [nn.Parameter(value.clone()) for value in scores.values()]
    optimizer = torch.optim.SGD(trained, 0.1, momentum=0.9, weight_decay=1e-4)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * 0.5 * (1 + np.cos((3 - 1) / 20 * np.pi))
    write({"epoch": 3, "arch": "x", "state_dict": OrderedDict(state),
           "best_prec1": torch.tensor(4.0), "optimizer": optimizer.state_dict()}, path)  # fmt: skip
    return scores


def write_old(content, path):
    """As torch before 1.6 and numpy before 2 wrote it."""
    held = io.BytesIO()
    torch.save(content, held, _use_new_zipfile_serialization=False)
    written = held.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in written
    Path(path).write_bytes(written)


def find_masks(folder="runs/x"):
    path = Path(folder) / "model.safetensors"
    return read_masks(*read_checkpoint(path), path)


# HYDRA


@pytest.mark.parametrize(("sparsity", "keep_ratio"), [(0.9, 0.1), (0.95, 0.05), (0.1, 0.9)])
def test_the_masks_are_those_of_the_scores(sparsity, keep_ratio):
    torch.manual_seed(0)
    net = build_vgg(
        2,
        NetOptions(),
        example_context(ArchitectureContext, shape=(1, 8, 8), classes=10),
        batch_norm=True,
    )
    scores = write_hydra(net)
    take("hydra", "--sparsity", sparsity, model="vgg2-bn")
    masks = find_masks()
    assert masks.keys() == {f"{layer}.weight" for layer in scores}
    weights = load_file("runs/x/model.safetensors")
    assert weights.keys() == net.state_dict().keys()
    for layer, score in scores.items():
        flat = score.abs().flatten().tolist()
        removed = sorted(range(len(flat)), key=flat.__getitem__)[
            : int((1 - keep_ratio) * len(flat))
        ]
        expected = torch.ones(len(flat), dtype=torch.bool)
        expected[removed] = False
        assert torch.equal(masks[f"{layer}.weight"].flatten(), expected)
        plain = net.state_dict()[f"{layer}.weight"]
        assert torch.equal(weights[f"{layer}.weight"], plain * expected.view_as(plain))
    told = json.loads(Path("runs/x/run.json").read_text())
    assert told["status"] == "done"
    assert [stage["kind"] for stage in told["stages"]] == ["import"]
    assert call("results")[1] == ""  # its files are what it wrote


@pytest.mark.parametrize("write", [torch.save, write_old])
@pytest.mark.parametrize("kind", ["hydra", "harp"])
def test_the_function_is_that_of_the_file(kind, write):
    """The logits of HYDRA's own forward pass: each weight is multiplied by a mask of its scores."""
    net = make_net()
    (layer,) = [m for m in net.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        layer.bias.normal_()
    rate = {"1.k_score": torch.tensor(-30.0)} if kind == "harp" else {}
    (score,) = write_hydra(net, extra=rate, write=write).values()
    # HARP: a rate that far down keeps the least, here a tenth of what HYDRA keeps.
    take(kind, "--sparsity", 0.9, *(["--alpha", 1.0] if kind == "harp" else []))
    order = score.abs().flatten().argsort()
    mask = torch.ones(640)
    mask[order[: int((1 - 0.1) * 640)]] = 0
    x = torch.rand(3, 1, 8, 8)
    expected = x.flatten(1) @ (layer.weight * mask.view(10, 64)).T + layer.bias
    found = load("runs/x").model(x)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[0], found[1], atol=0.01)


def test_a_network_of_hydra_that_is_not_pruned_starts_a_run():
    """Its dense checkpoints hold scores as well, which nothing used."""
    net = make_net()
    write_hydra(net)
    take("hydra", "--sparsity", 0)
    (mask,) = find_masks().values()
    assert mask.all()
    assert torch.equal(load_file("runs/x/model.safetensors")["1.weight"], net[1].weight)


def test_a_kept_weight_of_zero_stays_kept():
    net = make_net()
    with torch.no_grad():
        next(net.parameters())[0] = 0.0
    write_hydra(net)
    take("hydra", "--sparsity", 0.5)
    (mask,) = find_masks().values()
    assert int(mask.sum()) == 320


def test_the_unused_block_is_dropped_by_name_alone():
    extra = {"sub_block1.layer.0.conv1.weight": torch.ones(2),
             "sub_block1.layer.0.conv1.popup_scores": torch.ones(2)}  # fmt: skip
    write_hydra(make_net(), extra=extra)
    take("hydra", "--sparsity", 0.9)
    write_hydra(make_net(), prefix="", extra={"sub_block2.weight": torch.ones(2)})
    error = take("hydra", "--sparsity", 0.9, "--out", "runs/y", code=2)[1]
    assert "x.pt does not fit the network: not in the network: sub_block2.weight" in error
    assert not os.path.exists("runs/y")


def test_every_layer_of_hydra_has_scores_and_harp_may_leave_some_dense():
    torch.manual_seed(0)
    net = build_vgg(
        2, NetOptions(), example_context(ArchitectureContext, shape=(1, 8, 8), classes=10)
    )
    layers = write_hydra(net)
    rates = {f"{layer}.k_score": torch.tensor(0.0) for layer in layers}
    write_hydra(net, prefix="", extra=rates)
    content = torch.load("x.pt", weights_only=False)
    for name in ("popup_scores", "k_score"):
        del content["state_dict"][f"classifier.4.{name}"]
    torch.save(content, "x.pt")
    told = take("harp", "--sparsity", 0.9, model="vgg2")[1]
    assert "note: x.pt: without popup_scores, so left dense: classifier.4.weight" in told
    assert "classifier.4.weight" not in find_masks()
    assert "classifier.2.weight" in find_masks()
    state = {n: v for n, v in content["state_dict"].items() if not n.endswith("k_score")}
    torch.save({"state_dict": state}, "x.pt")
    error = take("hydra", "--sparsity", 0.9, "--out", "runs/y", model="vgg2", code=2)[1]
    assert "x.pt lacks the popup_scores of classifier.4" in error


def test_values_that_are_no_numbers_are_refused():
    net = make_net()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter[3] = float("nan")
    torch.save(net.state_dict(), "x.pt")
    assert "holds NaN or infinity in " in take("dense", code=2)[1]
    assert not os.path.exists("runs/x")


def test_a_layer_of_which_nothing_is_left_is_told():
    net = make_net()
    (layer,) = [m for m in net.modules() if isinstance(m, nn.Linear)]
    prune.custom_from_mask(layer, "weight", torch.zeros_like(layer.weight))
    torch.save(net.state_dict(), "x.pt")
    assert "note: x.pt: no weight of " in take("torch-prune")[1]
    (stage,) = json.loads(Path("runs/x/run.json").read_text())["stages"]
    assert stage["notes"][1].startswith("no weight of ")


def test_only_pairs_are_of_torch_prune(here):
    """A network may have names of its own that end in _mask and _orig."""
    (here / "net.py").write_text(
        "import torch\nfrom torch import nn\nclass Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a = nn.utils.spectral_norm(nn.Linear(64, 32))\n"
        "        self.b = nn.Linear(32, 10)\n"
        "        self.register_buffer('keep_mask', torch.ones(32))\n"
        "        self.register_buffer('x_orig', torch.ones(1, 32))\n"
        "    def forward(self, x):\n"
        "        return self.b(torch.relu(self.a(x.flatten(1))) * self.keep_mask * self.x_orig)\n"
    )
    options = PythonOptions(here / "net.py", "Net", {})
    net = build_python(options, example_context(ArchitectureContext, shape=(1, 8, 8), classes=10))
    prune.l1_unstructured(net.b, "weight", 0.5)
    net.keep_mask[:4] = 0
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, "x.pt")
    take("torch-prune", "--set", "architecture.file=net.py", "--set", "architecture.build=Net",
         model="python")  # fmt: skip
    masks = find_masks()
    assert masks.keys() == {"b.weight"}
    assert torch.equal(masks["b.weight"], net.b.weight_mask.bool())
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(load("runs/x").model(x), net.eval()(x))


def test_a_file_of_masks_is_no_network():
    torch.save({n: (v > 0).float() for n, v in make_net().state_dict().items()}, "x.pt")
    assert "holds no weights: all of them are 0 or 1" in take("dense", code=2)[1]


def test_averaged_weights_are_taken_by_name():
    plain, averaged = make_net(0).state_dict(), make_net(1).state_dict()
    torch.save({"state_dict": plain, "state_dict_ema": averaged}, "x.pt")
    told = take("dense")[1]
    assert "note: x.pt: took state_dict; there is also state_dict_ema" in told
    (stage,) = json.loads(Path("runs/x/run.json").read_text())["stages"]
    assert stage["notes"][1].startswith("took state_dict;")
    take("dense", "--entry", "state_dict_ema", "--out", "runs/y")
    for run, state in (("x", plain), ("y", averaged)):
        found = load_file(f"runs/{run}/model.safetensors")
        assert all(torch.equal(found[name], value) for name, value in state.items())


def test_masks_that_scale_are_refused():
    net = make_net()
    (layer,) = [m for m in net.modules() if isinstance(m, nn.Linear)]
    prune.identity(layer, "weight")
    layer.weight_mask.mul_(0.5)
    torch.save(net.state_dict(), "x.pt")
    assert "holds values other than 0 and 1 in 1.weight_mask" in take("torch-prune", code=2)[1]


def test_mistakes_of_the_command_line_are_placed_there():
    write_hydra(make_net())
    error = take("hydra", "--sparsity", 0.5, "--eps", "8", model="lin-9", code=2)[1]
    assert "--model lin-9: unknown architecture" in error
    assert "--eps 8: eps is a radius" in error


def test_what_cannot_be_imported_is_told():
    assert "there is no file x.pt" in take("hydra", code=2)[1]
    write_hydra(make_net())
    assert "give --sparsity" in take("hydra", code=2)[1]
    assert "not in the range" in take("hydra", "--sparsity", 1, code=2)[1]
    assert (
        "unknown architecture 'lin-9'" in take("hydra", "--sparsity", 0.5, model="lin-9", code=2)[1]
    )
    torch.save(make_net().state_dict(), "x.pt")
    assert "prunekit import dense" in take("hydra", "--sparsity", 0.5, code=2)[1]
    assert "holds no weight_orig" in take("torch-prune", code=2)[1]
    write_hydra(make_net(), prefix="", extra={"lost.popup_scores": torch.ones(3)})
    assert (
        "lost.popup_scores (3,) that fit no weight" in take("hydra", "--sparsity", 0.5, code=2)[1]
    )
    os.makedirs("runs/x")
    Path("runs/x/mine").write_text("")
    assert "runs/x exists already" in take("hydra", "--sparsity", 0.5, code=2)[1]


class Malice:
    def __reduce__(self):
        return os.mkdir, ("broken-in",)


@pytest.mark.parametrize("kind", ["hydra", "harp", "torch-prune", "dense"])
@pytest.mark.parametrize("bare", [True, False])
def test_malice_is_refused(kind, bare):
    content = {"state_dict": make_net().state_dict(), "lr": np.float64(0.1), "optimizer": Malice()}
    if bare:
        Path("x.pt").write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, "x.pt")
    error = take(kind, "--sparsity", 0.5, code=2)[1]
    assert "x.pt is a pickle that asks for " in error
    # A bare pickle has torch's old way to write a tensor first.
    asked = "torch.storage._load_from_bytes" if bare else "mkdir"
    assert f"{asked}, and only tensors are read; save a plain state dict" in error
    assert not os.path.exists("broken-in")
    assert not os.path.exists("runs/x")


# HARP, torch.nn.utils.prune, plain weights


def test_harp_layers_have_their_own_keep_ratio():
    torch.manual_seed(0)
    net = build_vgg(
        2, NetOptions(), example_context(ArchitectureContext, shape=(1, 8, 8), classes=10)
    )
    rates = {"features.0": 0.0, "classifier.0": 2.0, "classifier.2": -20.0}
    scores = write_hydra(net)
    extra = {f"{layer}.k_score": torch.tensor(rates.get(layer, 0.0)) for layer in scores}
    scores = write_hydra(net, extra=extra)
    take("harp", "--sparsity", 0.9, model="vgg2")
    masks = find_masks()
    # The least is 0.1 of 0.1: sigmoid(0) = 0.5 gives 0.505, and 576 - int(0.495 * 576) = 291.
    assert int(masks["features.0.weight"].sum()) == 291
    # 65536 - int(0.99 * 65536).
    assert int(masks["classifier.2.weight"].sum()) == 656
    # sigmoid(2) = 0.880797 gives 0.881989, and 65536 - int(0.118011 * 65536) = 57803.
    assert int(masks["classifier.0.weight"].sum()) == 57803
    for layer, score in scores.items():
        mask = masks[f"{layer}.weight"]
        assert score.abs()[mask].min() > score.abs()[~mask].max()


def test_a_harp_file_needs_its_rates():
    write_hydra(make_net())
    assert "k_score of a harp file" in take("harp", "--sparsity", 0.5, code=2)[1]


def test_masks_of_torch_come_along():
    net = make_net()
    (layer,) = [m for m in net.modules() if isinstance(m, nn.Linear)]
    prune.l1_unstructured(layer, "weight", amount=0.75)
    prune.random_unstructured(layer, "bias", amount=0.5)
    torch.save({f"module.{k}": v for k, v in net.state_dict().items()}, "x.pt")
    take("torch-prune")
    masks = find_masks()
    found = load_file("runs/x/model.safetensors")
    for name in ("weight", "bias"):
        (key,) = [k for k in masks if k.endswith(name)]
        assert torch.equal(masks[key], getattr(layer, f"{name}_mask").bool())
        assert torch.equal(found[key], getattr(layer, name).detach())


def test_zeros_of_plain_weights_are_the_mask():
    net = make_net()
    (layer,) = [m for m in net.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        layer.weight[:5] = 0.0
        layer.bias.zero_()
    torch.save(net.state_dict(), "x.pt")
    take("dense")
    ((name, mask),) = find_masks().items()
    assert name.endswith("weight")
    assert torch.equal(mask, layer.weight != 0)


# Going on


def test_an_imported_run_evaluates_and_finetunes():
    write_hydra(make_net())
    take("hydra", "--sparsity", 0.9, "--eps", "0.1", "--set", "dataset.fraction=0.1")
    call("check", "runs/x/recipe.toml")
    Path("go.toml").write_text(
        'extends = "runs/x/recipe.toml"\nname = "go"\nobjective = "benign"\n'
        '[[stage]]\nkind = "finetune"\nepochs = 2\n[[stage]]\nkind = "evaluate"\nwith = ["clean"]\n'
    )
    call("run", "go.toml", "--device", "cpu")
    assert find_masks("runs/go").keys() == find_masks().keys()
    before, after = find_masks(), find_masks("runs/go")
    assert all(torch.equal(before[name], after[name]) for name in before)
    (name,) = before
    old, new = (load_file(f"runs/{run}/model.safetensors")[name] for run in ("x", "go"))
    assert not new[~before[name]].any()
    assert not torch.equal(old, new)
    header = read_checkpoint(Path("runs/go/model.safetensors"))[1]
    assert header["sparsity"] == pytest.approx(0.9)
    told = json.loads(Path("runs/go/run.json").read_text())
    assert told["stages"][-1]["metrics"]["sparsity"]["value"] == pytest.approx(0.9)


def test_a_header_that_does_not_fit_is_told(here):
    state = {"a": torch.ones(3)}
    for header in (
        {"masked": ["b"], "kept_zeros": {}},
        {"masked": ["a"], "kept_zeros": {"a": [7]}},
        {"masked": 5},
        {"masked": ["a"]},
    ):
        with pytest.raises(UserError, match="damaged"):
            read_masks(state, header, here / "m.safetensors")


def test_masks_of_changed_kernels_are_no_promise():
    """The file's zeros are loaded; they are not counted, and the layer is named."""
    Path("net.py").write_text(
        "import torch.nn.functional as F\nfrom torch import nn\n"
        "class Centred(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return F.linear(x, self.weight - self.weight.mean(), self.bias)\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), Centred(64, 8), nn.Linear(8, 10))\n"
    )
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 10))
    for layer in (layers[1], layers[2]):
        prune.l1_unstructured(layer, "weight", 0.5)
    torch.save(layers.state_dict(), "x.pt")
    told = take("torch-prune", "--set", "architecture.file=net.py", model="python")[1]
    assert "left dense although they have masks: 1.weight (changed before it multiplies)" in told
    assert list(find_masks()) == ["2.weight"]
