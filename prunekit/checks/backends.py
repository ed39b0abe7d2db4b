"""What backends must do: what torch does, to rounding, wherever they are entered."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.catalog.component import Use
from prunekit.checks.methods import build
from prunekit.contexts import BackendContext
from prunekit.steps import Backend


def check_backend(use: Use[Any], context: BackendContext) -> None:
    """Logits and gradients of a small network are torch's: in training, where removed weights get
    no gradient, and in an attack inside of it."""
    backend: Backend = build(use, context)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2),
        nn.Flatten(),
        nn.Linear(72, 4),
    ).to(context.device)
    weights = {n: p for n, p in net.named_parameters() if p.dim() > 1}
    masks = {n: torch.rand_like(p) < 0.1 for n, p in weights.items()}
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].masked_fill_(~mask, 0)
    x = torch.rand(5, 3, 8, 8, device=context.device)
    twin = copy.deepcopy(net)
    wanted, found = _measure(twin, x, None, {}), _measure(net, x, backend, masks)
    for name, value in wanted.items():
        mask = masks.get(name, torch.ones_like(value, dtype=torch.bool))
        ours, theirs = found[name] * mask, value * mask
        assert torch.allclose(ours, theirs, 1e-4, 1e-5), f"{name} differs from torch's"
    for (name, ours), theirs in zip(net.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(ours, theirs, 1e-4, 1e-5), f"buffer {name} differs from torch's"
    chosen = backend.chosen()
    assert chosen.keys() <= masks.keys(), "chosen() names something that is no weight"
    assert not backend.chosen(), "chosen() names layers again that did not run since"


def _measure(
    net: nn.Module, x: Tensor, backend: Backend | None, masks: dict[str, Tensor]
) -> dict[str, Tensor]:
    def inside(*, still: bool) -> Any:
        return nullcontext() if backend is None else backend.around(net, masks, still=still)

    y = torch.arange(len(x), device=x.device) % 4
    net.train()
    with inside(still=False):
        net.eval()
        with inside(still=True):
            moved = x.clone().requires_grad_()
            judged = net(moved)
            (attacked,) = torch.autograd.grad(F.cross_entropy(judged, y), moved)
            judged = judged.detach() * 1
        net.train()
        logits = net(x)
        loss = F.cross_entropy(logits, y)
    loss.backward()
    gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    found = {"logits": logits.detach() * 1, "logits in evaluation": judged}
    return {**found, "input gradient": attacked, **gradients}
