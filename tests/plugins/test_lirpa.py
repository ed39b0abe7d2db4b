"""Bounds of margins: recorded values, soundness against attacks, and what is left alone."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prunekit_adversarial.attacks import Linf
from prunekit_lirpa import versions
from prunekit_lirpa.bounds import METHODS, Bounds
from prunekit_lirpa.margins import (
    Box,
    allow_rounding,
    compare_classes,
    is_certain,
    robust_cross_entropy,
    surround,
)
from torch import Tensor, nn

from prunekit import UserError
from prunekit.contracts import Clock, Scores
from prunekit.graph.groups import find_groups
from prunekit.pruning.layers import find_prunable
from prunekit.pruning.learning import effective_parameters
from prunekit.pruning.selection import Selection
from prunekit.training.masking import LearnedScores

CLOCK = Clock(0, 10, 0, 2)

RECORDED = Path(__file__).parent.parent / "data/bounds_cifar_small.npz"


def read_recorded() -> dict[str, Tensor]:
    with np.load(RECORDED) as file:
        return {name: torch.from_numpy(file[name]) for name in file}


def make_recorded(recorded: dict[str, Tensor]) -> tuple[nn.Module, LearnedScores]:
    """The recorded network, its zeros made by scores: what they remove is noise underneath."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(2048, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    net.load_state_dict({name: recorded[f"param:{name}"] for name in net.state_dict()})
    torch.manual_seed(0)
    start = {}
    for name, weight in find_prunable(net).items():
        removed = weight == 0
        start[name] = torch.where(removed, 0.1, 1.0) * (0.5 + torch.rand_like(weight))
        with torch.no_grad():
            weight[removed] = torch.randn(int(removed.sum()))
    sparsity = float(recorded["sparsity"])
    return net, LearnedScores(net, Scores(start), Selection(sparsity), {}, "train")


def read_images(recorded: dict[str, Tensor]) -> tuple[Tensor, Tensor, float]:
    x = recorded["x"].permute(0, 3, 1, 2).float() / 255
    return x, recorded["y"], float(recorded["eps"])


@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
def test_bounds_of_a_masked_network_are_the_recorded_ones(method: str) -> None:
    recorded = read_recorded()
    net, trained = make_recorded(recorded)
    x, y, eps = read_images(recorded)
    with trained.effective(CLOCK):
        torch.testing.assert_close(net(x), recorded["logits"], atol=1e-5, rtol=0)
        lower = Bounds(net, (3, 32, 32)).margins(surround(x, eps), y, method)
        robust_cross_entropy(lower).backward()
    expected = recorded[f"{method.replace('-', '_')}_margin_lower"]
    torch.testing.assert_close(lower, expected, atol=1e-5, rtol=0)
    assert all(part.score.grad.any() for part in trained.parts.values())
    assert not any(p.requires_grad for n, p in net.named_parameters() if "score" not in n)


def test_symbolic_bounds_are_the_recorded_ones() -> None:
    recorded = read_recorded()
    net, trained = make_recorded(recorded)
    x, y, eps = read_images(recorded)
    x, y = x[:4], y[:4]
    low, high = (
        recorded[f"symbolic_box_{end}"].float().view(-1, 1, 1, 1) for end in ("min", "max")
    )
    box = Box(torch.maximum(x - eps, low), torch.minimum(x + eps, high))
    with trained.effective(CLOCK):
        lower = Bounds(net, (3, 32, 32), "same-slope").margins(box, y, "crown")
        robust_cross_entropy(lower).backward()
    others = torch.arange(10) != y[:, None]
    expected = -recorded["symbolic_worst_margin"][others].view(4, 9)
    torch.testing.assert_close(lower, expected, atol=1e-5, rtol=0)
    assert all(part.score.grad.any() for part in trained.parts.values())


# By hand


def make_line() -> nn.Module:
    """h = relu(x1 - x2), relu(x1 + x2 - 1); f = (h1 + h2, h1 - h2 + 1/4)."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
        net[1].bias.copy_(torch.tensor([0.0, -1.0]))
        net[3].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        net[3].bias.copy_(torch.tensor([0.0, 0.25]))
    return net


def test_margins_by_hand() -> None:
    """x = (1/2, 1/2), eps 1/4: both h in relu([-1/2, 1/2]) = [0, 1/2]; f_0 - f_1 = 2 h2 - 1/4.

    IBP, the last layer merged: at least -1/4. The slopes of h2: u / (u - l) = 1/2 as the upper
    line, so with one slope h2 >= (x1 + x2 - 1) / 2 >= -1/4, and the margin >= -3/4; with the
    adaptive slope, 0 where u > -l is not, it is -1/4 again.
    """
    x, y = torch.full((1, 1, 1, 2), 0.5), torch.tensor([0])
    box = surround(x, 0.25)
    found = {}
    for relu in ("adaptive", "same-slope"):
        bounds = Bounds(make_line(), (1, 1, 2), relu)
        for method in ("ibp", "crown-ibp", "crown"):
            found[relu, method] = bounds.margins(box, y, method).item()
    assert found["adaptive", "ibp"] == pytest.approx(-0.25)
    assert found["adaptive", "crown-ibp"] == pytest.approx(-0.25)
    assert found["same-slope", "crown"] == pytest.approx(-0.75)
    assert found["same-slope", "ibp"] == pytest.approx(-0.25)


def test_loss_is_that_of_the_worst_logits() -> None:
    """Margins at least (1, -2): logits (0, -1, 2), so log(1 + e^-1 + e^2)."""
    lower = torch.tensor([[1.0, -2.0]])
    expected = np.log(1 + np.exp(-1) + np.exp(2))
    assert robust_cross_entropy(lower).item() == pytest.approx(expected)


def test_the_box_ends_where_pixels_do() -> None:
    box = surround(torch.tensor([0.0, 0.5, 1.0]), 0.25)
    assert box.lower.tolist() == [0, 0.25, 0.75]
    assert box.upper.tolist() == [0.25, 0.75, 1]


def test_certain_is_above_rounding() -> None:
    lower = torch.tensor([[1.0, 2e-5], [1.0, 1e-5], [1.0, -1.0], [1.0, float("nan")]])
    assert is_certain(lower).tolist() == [True, False, False, False]
    assert (
        is_certain(lower, torch.tensor([2.0, 0.0, 0.0, 0.0])).tolist()
        == [False, True] + [False] * 2
    )
    # Ten operations on logits of 1000: ten parts in 2^23; small logits need 1e-5 all the same.
    least = allow_rounding(torch.tensor([[-1000.0, 3.0], [1.0, 2.0]]), 10)
    assert least.tolist() == pytest.approx([10_000 / 2**23, 1e-5])


# Soundness

SHAPE, K = (2, 6, 6), 3


class Block(nn.Module):
    """A residual network with or without batch normalisation, and a pooling."""

    def __init__(self, *, bn: bool, pool: nn.Module) -> None:
        super().__init__()
        norm: Any = nn.BatchNorm2d if bn else (lambda channels: nn.Identity())
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=not bn), norm(4)
        self.second, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), norm(4)
        self.short, self.pool, self.last = nn.Conv2d(4, 4, 1), pool, nn.Linear(36, K)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = (self.norm2(self.second(x)) + self.short(x)).relu()
        x = self.pool(x)
        return self.last(x.view(x.size(0), -1))


class Normalizing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 2, stride=2)
        self.last = nn.Linear(36, K)
        mean = torch.tensor([0.4, 0.6]).view(1, 2, 1, 1)
        self.register_buffer("mean", mean, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / torch.tensor([0.2, 0.3]).view(1, 2, 1, 1)
        return self.last((self.first(x)).relu().flatten(1))


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: Block(bn=False, pool=nn.AvgPool2d(2)),
    "residual-bn": lambda: Block(bn=True, pool=nn.MaxPool2d(2)),
    "mlp-bn": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(),
        nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, K),
    ),
    "pooled-bn": lambda: nn.Sequential(
        nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, K),
    ),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Linear(8, K)),
    "normalizing": Normalizing,
}  # fmt: skip


def make_random(name: str, seed: int) -> nn.Module:
    """In eval mode, with large weights of which 40 % are removed, and statistics of its own."""
    torch.manual_seed(seed)
    net = NETS[name]().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.3, 2)
                module.weight.uniform_(-1, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        for weight in find_prunable(net).values():
            weight.mul_(2 * (torch.rand_like(weight) > 0.4))
        # So that no class is far ahead.
        *_, last = (layer for layer in net.modules() if isinstance(layer, nn.Linear))
        last.bias.sub_(net(make_images()).mean(0))
    return net


def make_images() -> Tensor:
    x = torch.rand(6, *SHAPE)
    x[0, :, 0], x[1, :, 1] = 0.0, 1.0  # at the edge of the box
    return x


def attack_margins(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """The smallest margins (B, K - 1) that PGD on each reaches, from x and a random start."""
    ball, rows = Linf(eps), compare_classes(y, K)
    least = torch.full((len(x), K - 1), torch.inf)
    for start in (x, ball.start(x)):
        for rival in range(K - 1):
            at = start
            for _ in range(10):
                at = at.detach().requires_grad_()
                margins = (rows @ net(at)[:, :, None])[..., 0]
                least = torch.minimum(least, margins.detach())
                (gradient,) = torch.autograd.grad(margins[:, rival].sum(), at)
                at = ball.project(at.detach() - eps / 4 * gradient.sign(), x)
    return least


@pytest.mark.parametrize("name", NETS)
def test_no_bound_is_above_what_an_attack_reaches(name: str) -> None:
    certified = broken = 0
    for seed in range(2):
        net = make_random(name, seed)
        x = make_images()
        y = net(x).argmax(1)
        for eps in (0.01, 0.2):
            reached = attack_margins(net, x, y, eps)
            broken += int((reached < 0).any(1).sum())
            for relu in ("adaptive", "same-slope"):
                bounds = Bounds(net, SHAPE, relu, detached=True)
                for method in ("ibp", "crown-ibp", "crown"):
                    if (name, method) == ("normalizing", "crown"):
                        continue  # more than 0.3 can do; see below
                    with torch.no_grad():
                        lower = bounds.margins(surround(x, eps), y, method)
                    assert (lower <= reached + 1e-4).all(), (seed, eps, relu, method)
                    assert not (is_certain(lower) & (reached < 0).any(1)).any()
                    certified += int(is_certain(lower).sum())
    assert certified > 0
    assert broken > 0


def test_optimised_bounds_are_sound_and_do_not_disturb_the_next_ones() -> None:
    net = make_random("residual", 0)
    x = make_images()
    y = net(x).argmax(1)
    bounds = Bounds(net, SHAPE, detached=True, iterations=3)
    before = bounds.margins(surround(x, 0.05), y, "crown")
    for eps in (0.01, 0.05):
        lower = bounds.margins(surround(x[:4], eps), y[:4], "alpha-crown").detach()
        assert (lower <= attack_margins(net, x[:4], y[:4], eps) + 1e-4).all()
        assert (lower >= bounds.margins(surround(x[:4], eps), y[:4], "crown") - 1e-4).all()
    torch.testing.assert_close(bounds.margins(surround(x, 0.05), y, "crown"), before)


@pytest.mark.parametrize("eps", [0.03, 0.2])
@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_optimised_bounds_are_tighter(
    name: str, eps: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slopes start at 0 and 1 and have to leave them; at 0.2 nearly all neurons are unstable."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 30), nn.ReLU(), nn.Linear(30, 3))
    if name == "convolution":
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 3)
        )
    x = torch.rand(8, 3, 8, 8)
    y = torch.arange(8) % 3
    bounds = Bounds(net, (3, 8, 8), detached=True, iterations=20)
    crown = bounds.margins(surround(x, eps), y, "crown").detach()
    alpha = bounds.margins(surround(x, eps), y, "alpha-crown").detach()
    assert (alpha >= crown - 1e-5).all()
    assert float((alpha - crown).max()) > 1e-3
    assert (alpha <= attack_margins(net, x, y, eps) + 1e-4).all()
    assert capsys.readouterr().out == ""


class Branching(nn.Module):
    """Turns around where no pixel is bright: what a trace of bright images does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(192, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(x.flatten(1))
        return logits if float(x.detach().max()) > 0.5 else -logits


def test_a_branch_on_the_images_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError, match=r"misreads this network: .* a Python if on the images"):
        Bounds(Branching(), (3, 8, 8)).prepare()


@pytest.mark.parametrize("method", METHODS)
def test_bounds_enclose_all_that_a_tiny_network_does(method: str) -> None:
    """Two inputs: a grid of 101 x 101 points of each box."""
    for seed in range(3):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, K)
        )
        with torch.no_grad():
            for weight in find_prunable(net).values():
                weight.mul_(3)
        x, y = torch.rand(4, 1, 1, 2), torch.tensor([0, 1, 2, 0])
        box = surround(x, 0.2)
        lower = Bounds(net, (1, 1, 2), detached=True, iterations=3).margins(box, y, method)
        steps = torch.linspace(0, 1, 101)
        grid = torch.cartesian_prod(steps, steps).view(1, -1, 1, 1, 2)
        points = box.lower[:, None] + grid * (box.upper - box.lower)[:, None]
        logits = net(points.flatten(0, 1)).view(4, -1, K)
        least = (logits @ compare_classes(y, K).mT).amin(1)
        assert (lower.detach() <= least + 1e-5).all()


# Whatever is the case with the network


def make_prunable(*, bn: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, bias=not bn),
        nn.BatchNorm2d(4) if bn else nn.Identity(),
        nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, K),
    )  # fmt: skip


@pytest.mark.parametrize("structure", ["element", "channel"])
@pytest.mark.parametrize("bn", [False, True])
def test_scores_act_on_bounds_as_on_the_network(structure: str, bn: bool) -> None:
    """The bounds are those of a dense network with the effective weights; gradients reach scores.

    What a gate multiplies is the output of a layer, and here its weight and bias.
    """
    net, dense = make_prunable(bn=bn), make_prunable(bn=bn)
    x, y = make_images(), torch.tensor([0, 1, 2, 0, 1, 2])
    net(x)  # moves the statistics
    weights = find_prunable(net, ["6.*"] if structure == "channel" else [])
    groups = find_groups(net, x[:1], weights)[0] if structure == "channel" else []
    start = Scores({name: torch.randn_like(weight) for name, weight in weights.items()})
    selection = Selection(0.5, structure=structure, groups=groups)
    trained = LearnedScores(net, start, selection, {}, "train")
    bounds = Bounds(net, SHAPE)  # built after the scores were attached
    box = surround(x, 0.02)
    with trained.effective(CLOCK):
        values = effective_parameters(net)
        dense.load_state_dict({**dict(net.named_buffers()), **values}, strict=False)
        net.eval(), dense.eval()
        torch.testing.assert_close(dense(x), net(x))
        for method in ("ibp", "crown-ibp", "crown"):
            found = bounds.margins(box, y, method)
            torch.testing.assert_close(found, Bounds(dense, SHAPE).margins(box, y, method))
        robust_cross_entropy(bounds.margins(box, y, "crown-ibp")).backward()
    assert values.keys() == dict(dense.named_parameters()).keys()
    assert all(part.score.grad.any() for part in trained.parts.values())
    for name, parameter in net.named_parameters():
        trains = "score" in name or (bn and name in ("1.weight", "1.bias"))
        assert trains == (parameter.grad is not None), name


def test_the_network_is_traced_once_and_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []
    original = versions.trace
    monkeypatch.setattr(versions, "trace", lambda *a: traces.append(1) or original(*a))
    net = make_random("residual-bn", 0)
    bounds = Bounds(net, SHAPE)
    x = make_images()
    y = net(x).argmax(1)
    seen = []
    for batch in (6, 4, 1):
        with torch.no_grad():
            net.last.bias.add_(torch.tensor([0.1, 0.0, -0.1]))
            net.norm.running_mean.add_(0.1)  # as a training step moves it
            exact = (compare_classes(y, K) @ net(x)[:, :, None])[:batch, :, 0]
            seen.append(bounds.margins(surround(x[:batch], 0.0), y[:batch], "crown-ibp"))
        torch.testing.assert_close(seen[-1], exact, atol=1e-4, rtol=1e-4)
    assert len(traces) == 1


def test_network_modes_and_gradients_are_left_alone() -> None:
    net = make_random("mlp-bn", 0).train()
    net[2].eval()
    net[5].requires_grad_(False)
    modes = [module.training for module in net.modules()]
    needed = [parameter.requires_grad for parameter in net.parameters()]
    before = copy.deepcopy(net.state_dict())
    bounds = Bounds(net, SHAPE)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    for method in METHODS:
        if method != "alpha-crown":
            bounds.margins(surround(make_images(), 0.01), y, method)
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == needed
    assert all(parameter.grad is None for parameter in net.parameters())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_tied_layer_is_bounded_as_used() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[3].weight = net[1].weight
    x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    exact = (compare_classes(y, 4) @ net(x)[:, :, None])[..., 0]
    found = Bounds(net, (1, 2, 2)).margins(surround(x, 0.0), y, "crown")
    torch.testing.assert_close(found, exact)


# What cannot be bounded


def conv(*layers: nn.Module, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), *layers, nn.Flatten(), nn.Linear(out, K))


@pytest.mark.parametrize(
    ("net", "method", "words"),
    [
        (conv(nn.GELU(), out=72), "ibp", r"does not know the operator Erf of layer 1 \(GELU\)"),
        (
            conv(nn.MaxPool2d(3, 2), out=8), "crown-ibp",
            r"cannot bound MaxPool .*stride.* of layer 1 \(MaxPool2d\)",
        ),
        (
            conv(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(2, 2, 2, padding="same"), out=98), "ibp",
            r"auto_LiRPA .* of layer",
        ),
        # Silently wrong in auto_LiRPA 0.3, were they not tried.
        pytest.param(
            conv(nn.ReLU(), nn.AvgPool2d(3, 2, 1), out=18), "crown-ibp", "wrong crown-ibp bounds",
            marks=pytest.mark.skipif(not versions.is_old(), reason="0.7 bounds it"),
        ),
        (
            conv(nn.AvgPool2d(3, 2, 1, count_include_pad=False), out=18), "ibp",
            "misreads this network",
        ),
        (Normalizing(), "crown", "cannot bound Div"),
    ],
    ids=["gelu", "max-pool", "padding", "average-pool", "uncounted-padding", "normalizing"],
)  # fmt: skip
def test_a_network_out_of_reach_is_told_in_one_line(net: Any, method: str, words: str) -> None:
    bounds = Bounds(net.eval(), SHAPE)
    for _ in range(2):  # and told again
        with pytest.raises(UserError, match=words) as raised:
            bounds.margins(surround(make_images(), 0.01), torch.zeros(6, dtype=torch.long), method)
        assert "\n" not in str(raised.value)
        assert "docs/certified.md" in str(raised.value)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_bounds_that_overflow_prove_nothing(method: str) -> None:
    net = make_random("residual", 0)
    x, y = make_images(), torch.zeros(6, dtype=torch.long)
    bounds = Bounds(net, SHAPE, detached=True)
    with torch.no_grad():
        assert bounds.margins(surround(x, 0.1), y, method).isfinite().all()
        net.first.weight.fill_(3e38)
        net.second.weight.zero_()
        assert not is_certain(bounds.margins(surround(x, 0.1), y, method)).any()


# auto_LiRPA's ways


@pytest.mark.slow
def test_importing_it_leaves_the_process_as_it_was() -> None:
    code = (
        "import logging, sys, warnings, torch, numpy, torch.onnx.symbolic_helper as helper\n"
        "before = (logging.getLogger().handlers[:], warnings.filters[:], dir(torch._C.Node),\n"
        "          dir(helper), 'numpy.lib.arraysetops' in sys.modules)\n"
        "from prunekit_lirpa import versions\n"
        "versions.trace(torch.nn.Linear(2, 2).eval(), torch.zeros(1, 2), 'adaptive')\n"
        "after = (logging.getLogger().handlers[:], warnings.filters[:], dir(torch._C.Node),\n"
        "         dir(helper), 'numpy.lib.arraysetops' in sys.modules)\n"
        "assert before == after\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
