"""Sparse execution: layers and whole networks against torch's dense ones in double precision."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from prunekit_sparse.costs import Costs, calibrate, read_costs
from prunekit_sparse.index import Geometry, Index
from prunekit_sparse.layers import Convolution
from prunekit_sparse.memory import empty
from prunekit_sparse.running import Running
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.catalog import registry
from prunekit.cli.group import main
from prunekit.errors import RunError, UserError
from prunekit.evaluation import eval_mode, plainly

pytest.importorskip("numba")


def close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    """Equal to rounding, on the scale of the largest number."""
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    assert found.shape == wanted.shape
    found, wanted = found.detach().double(), wanted.detach().double()
    assert float((found - wanted).abs().max()) <= tolerance * max(scale, 0.5)


def thin(weight: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """The mask of a few weights; others are set to zero."""
    mask = torch.rand(weight.shape, generator=generator) < density
    weight.data *= mask
    return mask


def masked(net: nn.Module, density: float = 0.1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {n: thin(p, density, generator) for n, p in net.named_parameters() if p.dim() > 1}


def gradients(
    net: nn.Module, x: Tensor, y: Tensor, masks: dict[str, Tensor] | None, *, still: bool
) -> dict[str, Tensor]:
    """Logits, and the gradients of a loss: at the images, and unless `still` at all parameters.

    On kernels where `masks` are given, dense otherwise.
    """
    x = x.detach().clone().requires_grad_()
    net.train(not still)
    net.zero_grad()
    if masks is None:
        logits = net(x)
        loss = F.cross_entropy(logits, y)
    else:
        running = Running(None)
        with running.around(net, masks, still=still):
            logits = net(x)
            loss = F.cross_entropy(logits, y)
        assert "sparse" in running.chosen().values()
    if still:
        return {"logits": logits.detach() * 1, "x": torch.autograd.grad(loss, x)[0]}
    loss.backward()
    found = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return {"logits": logits.detach() * 1, "x": x.grad, **found}  # type: ignore[dict-item]


def compare(net: nn.Module, shape: tuple[int, ...] = (9, 3, 8, 8), density: float = 0.1) -> None:
    """In evaluation and in training: logits, gradients and running statistics are those of torch in
    double precision; removed weights get no gradient."""
    torch.manual_seed(0)
    x, y = torch.rand(shape), torch.randint(0, 3, (shape[0],))
    masks = masked(net, density)
    with torch.no_grad():
        net.train()
        for _ in range(3):
            net(x)
    exact = copy.deepcopy(net).double()
    for still in (True, False):
        wanted = gradients(exact, x.double(), y, None, still=still)
        found = gradients(net, x, y, masks, still=still)
        assert wanted.keys() == found.keys()
        for name, value in wanted.items():
            kept = masks.get(name, torch.tensor(1))  # layers that stay dense have them all
            close(found[name] * kept, value * kept)
    for name, buffer in exact.named_buffers():
        close(dict(net.named_buffers())[name], buffer)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_layers_are_those_of_torch(data: Any) -> None:
    """Any size, kernel, stride, padding, dilation and batch: output and all gradients."""
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    n, c, o, h, w = draw(1, 9), draw(1, 5), draw(1, 6), draw(1, 9), draw(1, 9)
    kernel, dilation = (draw(1, 4), draw(1, 4)), (draw(1, 2), draw(1, 2))
    stride, padding = draw(1, 3), (draw(0, 3), draw(0, 3))
    geometry = Geometry(c, h, w, o, kernel, stride, padding, dilation)
    if min(geometry.out) < 1:
        return
    torch.manual_seed(draw(0, 1000))
    weight = torch.randn(o, c, *kernel)
    mask = thin(weight, data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), torch.default_generator)
    x, bias = torch.randn(n, c, h, w), torch.randn(o)
    residual = torch.randn(n, o, *geometry.out) if data.draw(st.booleans()) else None
    scale = torch.rand(o) if data.draw(st.booleans()) else None
    relu, kept_only = data.draw(st.booleans()), data.draw(st.booleans())

    def measure(double: bool) -> list[Tensor]:
        parts = [None if p is None else p.clone() for p in (x, weight, bias, residual)]
        parts = [p if p is None else (p.double() if double else p).requires_grad_() for p in parts]
        own, w, b, r = parts
        if double:
            factor = 1 if scale is None else scale.double().view(-1, 1, 1, 1)
            y = F.conv2d(own, w * factor, b, stride, padding, dilation)
            y = y if r is None else y + r
            y = y.relu() if relu else y
        else:
            index = Index(mask.flatten().nonzero().flatten().numpy(), geometry)
            index.read(weight, 0)
            y = Convolution.apply(own, w, b, r, scale, index, relu, kept_only)
        weights = torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()
        (y * weights).sum().backward()
        return [y.detach(), *(p.grad for p in parts if p is not None)]

    wanted, found = measure(True), measure(False)
    if kept_only:
        assert not found[2][~mask].any()
        wanted[2] = wanted[2] * mask
    for one, other in zip(found, wanted, strict=True):
        close(one, other)


def call(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def conv(i: int, o: int, *args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, *args, padding=1, **kwargs)


class Residual(nn.Module):
    """Sums, before and after activations, in place and not."""

    def __init__(self, *, inplace: bool, first: bool) -> None:
        super().__init__()
        self.stem, self.norm0 = conv(3, 8), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = conv(8, 8, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = conv(8, 8, bias=False), nn.BatchNorm2d(8)
        self.down, self.norm3 = nn.Conv2d(8, 8, 1, 2, bias=False), nn.BatchNorm2d(8)
        self.conv3 = conv(8, 8, 2)
        self.relu, self.head = nn.ReLU(inplace=inplace), nn.Linear(8, 3)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm0(self.stem(x)))
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        if self.first:
            out = x + out
        else:
            out += x
        x = self.relu(out)
        x = self.relu(self.conv3(x) + self.norm3(self.down(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Twice(nn.Module):
    """What is pending is read twice, with and without a ReLU; its input changes meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = conv(3, 6), nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        inner = self.norm(self.conv(x))
        both = inner.relu() * 0.5 + inner
        raw = self.conv(both[:, :3])
        with torch.no_grad():
            both.mul_(2) if not both.requires_grad else None
        return self.head((raw * 2 - inner.sigmoid()).mean((2, 3)))


def small(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: small(conv(3, 7), nn.ReLU(), conv(7, 5, 2), nn.ReLU()),
    "inplace": lambda: small(conv(3, 7), nn.BatchNorm2d(7), nn.ReLU(inplace=True), conv(7, 4)),
    "pooled": lambda: small(
        conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), conv(6, 6), nn.MaxPool2d(3, 2, 1)
    ),
    "averaged": lambda: small(conv(3, 6), nn.AvgPool2d(2), conv(6, 6), nn.GELU(), conv(6, 4)),
    "residual": lambda: Residual(inplace=False, first=True),
    "residual in place": lambda: Residual(inplace=True, first=False),
    "twice": Twice,
    "grouped": lambda: small(conv(3, 6), conv(6, 6, groups=2), nn.BatchNorm2d(6), conv(6, 4)),
    "odd": lambda: small(nn.Conv2d(3, 6, (1, 3), (2, 1)), nn.Conv2d(6, 6, 2, 3, padding=2)),
    "reflecting": lambda: small(conv(3, 6, padding_mode="reflect"), conv(6, 4)),
    "same": lambda: small(conv(3, 6), nn.Conv2d(6, 6, 3, padding="same"), conv(6, 4)),
    "normalized": lambda: small(conv(3, 6), nn.GroupNorm(2, 6), nn.ReLU(), conv(6, 6), nn.SiLU()),
    "linear": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3)
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch", [1, 9])
def test_networks_are_those_of_torch(name: str, batch: int) -> None:
    net = NETWORKS[name]()
    net(torch.rand(2, 3, 8, 8))
    if batch == 1:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.2
    compare(net, (batch, 3, 8, 8), 0.2)


def test_a_step_with_an_attack_inside() -> None:
    """The attack stands still, and the step around it has the gradients that it has without it."""
    torch.manual_seed(0)
    net = small(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 6))
    x, y = torch.rand(9, 3, 8, 8), torch.randint(0, 3, (9,))
    net(x)
    masks = masked(net)
    wanted = gradients(net, x, y, masks, still=False)
    running = Running(None)
    with running.around(net, masks, still=False):
        with running.around(net, {}, still=True), eval_mode(net):
            moved = x.clone().requires_grad_()
            torch.autograd.grad(net(moved).sum(), moved)
        net.zero_grad()
        net.train()
        F.cross_entropy(net(x), y).backward()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter.grad, wanted[name])


def test_learned_scores_get_whole_gradients() -> None:
    """A weight that is made in the pass, such as one under a mask of scores."""
    torch.manual_seed(0)
    x, frozen_weight = torch.rand(9, 3, 8, 8), torch.randn(6, 3, 3, 3)
    mask = (torch.rand(6, 3, 3, 3) < 0.1).float()
    found = []
    for running in (Running(None), None):
        soft = mask.clone().requires_grad_()
        net = nn.Conv2d(3, 6, 3, bias=False)
        with nullcontext() if running is None else running.around(net, {}, still=False):
            F.conv2d(x, frozen_weight * soft, padding=1).square().sum().backward()
        assert soft.grad is not None
        found.append(soft.grad)
    close(found[0], found[1])
    assert found[0][mask == 0].abs().min() > 0


def test_the_index_follows_masks_that_move() -> None:
    net = small(conv(3, 6), conv(6, 4))
    x = torch.rand(9, 3, 8, 8)
    net(x)
    masks = masked(net, 0.2)
    running = Running(None)
    for _ in range(3):
        with running.around(net, masks, still=False):
            found = net(x) * 1
        close(found, net(x))
        for mask in masks.values():
            mask.copy_(mask.flip(0))
        for name, weight in net.named_parameters():
            if name in masks:
                weight.data = torch.randn_like(weight) * masks[name]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    net = small(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), conv(6, 4))
    x = torch.rand(9, 3, 8, 8)
    net(x)
    net.eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        if parameter.dim() > 1:
            thin(parameter, 0.5, generator)
    x[4] = value
    with Running(None).around(net, {}, still=True):
        found = net(x) * 1
    assert found.isfinite().all(1).tolist() == [i != 4 for i in range(9)]


def test_threads_do_not_change_bits() -> None:
    net = small(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8, 2))
    x = torch.rand(32, 3, 24, 24)
    net(x)
    masks = masked(net)
    state = copy.deepcopy(net.state_dict())
    found = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        net.load_state_dict(state)
        with Running(None).around(net, masks, still=False):
            features = net[:-2](x)
        features.square().sum().backward()
        found.append([features.detach(), *(p.grad for p in net[:-2].parameters())])
        net.zero_grad(set_to_none=True)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_gradient_of_a_gradient_is_torchs() -> None:
    torch.manual_seed(0)
    net = small(conv(3, 6), nn.BatchNorm2d(6), nn.Softplus(), nn.MaxPool2d(2), conv(6, 4))
    images = torch.rand(9, 3, 8, 8)
    net(images)
    masks, found = masked(net, 0.5), []
    for running in (Running(None), None):
        x = images.clone().requires_grad_()
        with nullcontext() if running is None else running.around(net, masks, still=False):
            (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(g.square().sum(), x)[0])
    close(found[0], found[1], 1e-4)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 2


def test_a_gradient_that_would_be_lost_is_told() -> None:
    """An autograd Function of the network gets no activation: its gradient would go nowhere."""

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Doubled.apply(x)

    net = small(conv(3, 6), Own(), conv(6, 4))
    x = torch.rand(9, 3, 8, 8)
    net(x)
    masks = masked(net, 0.5)
    with Running(None).around(net, masks, still=False), pytest.raises(RunError, match="sparse ="):
        net(x).sum().backward()


def test_bounds_are_computed_plainly() -> None:
    net = small(conv(3, 6), conv(6, 4))
    x = torch.rand(9, 3, 8, 8)
    net(x)
    masked(net)
    running = Running(None)
    with running.around(net, {}, still=True):
        with plainly():
            plain = net(x)
        assert not running.chosen()
        net(x)
    assert torch.equal(plain, net(x))
    assert running.chosen()


def test_what_is_written_into_data_is_seen() -> None:
    layer, x = conv(3, 6), torch.rand(9, 3, 8, 8)
    masked(layer)
    running = Running(None)
    for density in (0.1, 0.3):
        layer.weight.data.copy_(torch.randn_like(layer.weight))
        layer.weight.data.mul_(torch.rand_like(layer.weight) < density)
        with running.around(layer, {}, still=True):
            found = layer(x) * 1
        close(found, layer(x))


def test_what_was_chosen_is_told_once() -> None:
    net = nn.Sequential(conv(3, 6), nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(6, 6, 1, (1, 2)))
    masked(net)
    running = Running(None)
    with running.around(net, {}, still=True):
        net(torch.rand(9, 3, 8, 8))
    chosen = {"0.weight": "sparse", "1.weight": "2 groups", "2.weight": "stride (1, 2)"}
    assert running.chosen() == chosen
    assert running.chosen() == {}


def test_costs_decide() -> None:
    costs = Costs(dense=1, single=1, sparse=2, visit=0, output=0, layout=0, call=0)
    layer = Geometry(10, 4, 4, 10, (3, 3), padding=(1, 1))
    assert costs.pays(layer, 449, 8, whole=False)
    assert not costs.pays(layer, 451, 8, whole=False)
    # A row of 4 pixels times 8 images is visited once: 32 multiplications of 2, and 100.
    slow = dataclasses.replace(costs, visit=100)
    assert slow.pays(layer, 175, 8, whole=False)
    assert not slow.pays(layer, 176, 8, whole=False)
    # A dense layer has to bring its 1,280 outputs into the other layout.
    turned = dataclasses.replace(costs, layout=1)
    assert turned.pays(layer, 454, 8, whole=False)
    called = dataclasses.replace(costs, call=1600)
    assert called.pays(layer, 443, 8, whole=False)
    assert not called.pays(layer, 444, 8, whole=False)
    assert not turned.pays(layer, 456, 8, whole=False)


def test_costs_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(calibrate())
    assert all(value >= 0 for value in vars(read_costs(file)).values())
    assert read_costs(None) == Costs()
    for text in ("{}", "[1]", "no", '{"dense": "fast"}', file.read_text().replace(":", ": -", 1)):
        file.write_text(text)
        with pytest.raises(UserError, match="calibrate"):
            read_costs(file)


def test_memory_is_used_again() -> None:
    first = empty((2, 3, 4, 5))
    place = first.data_ptr()
    del first
    assert empty((2, 3, 4, 5)).data_ptr() == place


RECIPE = """
name = "thin"
[dataset]
use = "digits"
[architecture]
use = "cifar-small"
[threat]
eps = 0.1
[objective]
use = "pgd-at"
[[stage]]
kind = "prune"
sparsity = 0.95
epochs = 1
[[stage]]
kind = "finetune"
epochs = 1
[[stage]]
kind = "evaluate"
with = ["clean", "pgd"]
"""


def test_a_recipe_runs_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages say which layers were sparse; another setting is another result."""
    monkeypatch.chdir(tmp_path)
    Path("r.toml").write_text(RECIPE)
    keys = []
    for mode in ("on", "off"):
        assert not call("run", "r.toml", "--smoke", "--sparse", mode, "--out", mode).exit_code
        stages = json.loads(Path(mode, "run.json").read_text())["stages"]
        keys.append({stage["key"] for stage in stages})
        told = [stage["compute"].get("sparse_layers", []) for stage in stages]
        assert all("0.weight" in names for names in told) if mode == "on" else told == [[], [], []]
    assert not keys[0] & keys[1]


def test_without_numba_it_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.toml").write_text(RECIPE)
    found = registry._is_installed
    monkeypatch.setattr(registry, "_is_installed", lambda name: name != "numba" and found(name))
    assert not call("run", "r.toml", "--smoke", "--out", "auto").exit_code
    assert not call("run", "r.toml", "--smoke", "--sparse", "off", "--out", "off").exit_code
    one, other = (
        [s["key"] for s in json.loads(Path(name, "run.json").read_text())["stages"]]
        for name in ("auto", "off")
    )
    assert one == other
    refused = call("check", "r.toml", "--set", "compute.sparse=on")
    assert refused.exit_code == 2
    assert 'pip install "prunekit[sparse]"' in refused.output
