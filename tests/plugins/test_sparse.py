"""Sparse execution: layers and whole networks against torch's dense ones in double precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prunekit_sparse.index import Geometry, Index
from prunekit_sparse.layers import Convolution
from prunekit_sparse.running import Running
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("numba")


def close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    """Equal to rounding, on the scale of the largest number."""
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    assert found.shape == wanted.shape
    assert float((found.double() - wanted.double()).abs().max()) <= tolerance * max(scale, 0.05)


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
