"""Attacks on images for which a network gives no gradient: another backward pass, and none.

Where all ReLUs that an image reaches are closed, or outputs are rounded, or a softmax is certain to
the last bit, attacks by gradient stand still and leave an image correct that is not robust.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from prunekit.contracts import Metric
from prunekit_adversarial.attacks import L2, Attack, climb, is_correct, predict

LEAK = 0.1
"""The slope in place of zero, as in a leaky ReLU."""

LEAKING: set[Any] = {
    *(F.relu, F.relu6, F.hardtanh, F.threshold, F.hardshrink, F.softshrink, F.hardsigmoid),
    *(torch.relu, torch.threshold, torch.clamp, torch.clamp_min, torch.clamp_max, torch.clip),
    *(torch.sign, torch.sgn, torch.round, torch.floor, torch.ceil, torch.trunc, torch.heaviside),
    *(Tensor.relu, Tensor.clamp, Tensor.clamp_min, Tensor.clamp_max, Tensor.clip, Tensor.sign),
    *(Tensor.sgn, Tensor.round, Tensor.floor, Tensor.ceil, Tensor.trunc, Tensor.heaviside),
    *(F.relu_, F.hardtanh_, torch.threshold_, torch.clamp_, torch.clamp_min_, torch.clamp_max_),
    *(torch.clip_, torch.round_, torch.floor_, torch.ceil_, torch.trunc_, Tensor.relu_),
    *(Tensor.clamp_, Tensor.clamp_min_, Tensor.clamp_max_, Tensor.clip_, Tensor.sign_),
    *(Tensor.sgn_, Tensor.round_, Tensor.floor_, Tensor.ceil_, Tensor.trunc_, Tensor.heaviside_),
}
"""Functions of single numbers whose slope is zero over whole intervals; "_" works in place."""

SIZE = 0.8
"""The part of an image that the first squares of Square cover."""
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""The parts of its queries after which it halves (Andriushchenko et al., ECCV 2020)."""


def is_flat(gradient: Tensor, logits: Tensor, y: Tensor, eps: float) -> Tensor:
    """Whether gradients (B, C, H, W) of the cross-entropy say nothing, (B,) bool.

    They do not where no move of any pixel by up to `eps` would, to first order, change logits
    (B, K) by more than they are rounded by; labels y are (B,). In L2, where pixels share `eps`, the
    moves looked at are longer than an attack's, so that fewer gradients count as flat.
    """
    numbers = torch.finfo(logits.dtype)
    off = (logits.softmax(1) - F.one_hot(y, logits.shape[1])).abs().sum(1)
    rounding = numbers.eps * logits.abs().amax(1) * off
    return ~(gradient.abs().flatten(1).sum(1) * eps > rounding.clamp(min=numbers.tiny))


def count_flat(flat: np.ndarray, attacked: np.ndarray) -> Metric:
    """The metric `zero_gradient`, of records (N,) bool."""
    return Metric(
        int(flat.sum()),
        n=max(int(attacked.sum()), 1),
        kind="diagnosis",
        note="gave no gradient; its accuracy may be overestimated, try another attack",
    )


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """The largest other logit less that of the label, (B,): positive where the network is wrong."""
    own = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(own, -torch.inf).amax(1) - logits[own]


class Leak(Function):
    """A value, with the gradient that it would have if it leaked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(torch.where(value == x, 1.0, LEAK))
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradient * slope.to(gradient), None


class Finite(Function):
    """Images as they are; NaN in their gradient, which would make NaN of them, is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.nan_to_num(0.0)


class Leaking(TorchFunctionMode):
    """Inside, functions that stop gradients let a part of them through; values stay the same."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in LEAKING and args and isinstance(args[0], Tensor) and args[0].requires_grad:
            own = args[0].detach().clone()
            with torch.no_grad():
                value = func(own, *args[1:], **(kwargs or {}))
            leaking = Leak.apply(args[0], value)
            # In place, as `inplace=True` says too: the network may go on with what it gave.
            return args[0].copy_(leaking) if value is own else leaking
        return func(*args, **(kwargs or {}))


def attack_again(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, queries: int
) -> tuple[Tensor, Tensor]:
    """Which of the images x (B, C, H, W) with labels y (B,) are fooled, (B,) bool twice.

    First by ascent on the margin with a backward pass that leaks, where every iterate counts; then
    by that or, on those that are left, by Square.
    """
    leaking = _climb(model, x, y, attack)
    left = (~leaking).nonzero().squeeze(1)
    either = leaking.clone()
    if queries and len(left):
        either[left] = square(model, x[left], y[left], attack, queries)
    return leaking, either


def _climb(model: nn.Module, x: Tensor, y: Tensor, attack: Attack) -> Tensor:
    def loss(logits: Tensor) -> Tensor:
        return margins(logits, y).sum()

    adversarial = attack.ball.start(x)
    fooled = torch.zeros_like(y, dtype=torch.bool)
    for step in range(attack.steps + 1):
        with torch.no_grad():  # of the network as it is
            fooled |= ~is_correct(predict(model, adversarial), y)
        if fooled.all() or step == attack.steps:
            break
        with Leaking():
            adversarial, _, _ = climb(model, x, adversarial, loss, attack)
    return fooled


@torch.no_grad()
def square(model: nn.Module, x: Tensor, y: Tensor, attack: Attack, queries: int) -> Tensor:
    """Which images x (B, C, H, W) with labels y (B,) a random search fools, (B,) bool.

    Squares of the change are drawn anew, smaller and smaller, and kept if the margin shrinks
    (Andriushchenko et al., ECCV 2020; in L2 with squares of one color in place of their pyramids).
    """
    n, channels, height, width = x.shape

    def reach(pixels: int) -> float:
        """How far each of so many pixels goes."""
        far = attack.ball.eps
        return far / math.sqrt(channels * pixels) if isinstance(attack.ball, L2) else far

    def signs(*shape: int) -> Tensor:
        return torch.randint(0, 2, shape, device=x.device).to(x) * 2 - 1

    change = signs(n, channels, 1, width).expand_as(x) * reach(height * width)
    best = attack.ball.project(x + change, x)
    score = _score(model, best, y)
    rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
    for query in range(queries):
        left = (score <= 0).nonzero().squeeze(1)
        if not len(left):
            break
        part = SIZE / 2 ** sum(query > share * queries for share in HALVINGS)
        side = min(max(round(math.sqrt(part * height * width)), 1), height, width)
        top, start = (
            torch.randint(0, size - side + 1, (len(left), 1), device=x.device)
            for size in (height, width)
        )
        inside = ((rows >= top) & (rows < top + side))[:, None, :, None]
        inside = inside & ((columns >= start) & (columns < start + side))[:, None, None, :]
        drawn = x[left] + signs(len(left), channels, 1, 1) * reach(side * side)
        tried = attack.ball.project(torch.where(inside, drawn, best[left]), x[left])
        found = _score(model, tried, y[left])
        better = found > score[left]
        best[left[better]], score[left[better]] = tried[better], found[better]
    return score > 0


def _score(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Margins (B,), positive where the network is wrong; infinite where it gives no numbers."""
    logits = predict(model, x)
    found = margins(logits, y).nan_to_num(torch.inf)
    fooled = ~is_correct(logits, y)
    # Of equal logits the first counts, which may be another's.
    return torch.where(fooled, found.clamp(min=torch.finfo(found.dtype).tiny), found.clamp(max=0))
