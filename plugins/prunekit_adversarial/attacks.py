"""Gradient attacks: the ball of a norm, one step of ascent, and the attacks made of them.

Attacks differentiate with respect to the images alone. They never call `backward()` and leave the
parameters' gradients, and a graph that effective weights share with the step around them, alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.contracts import Threat
from prunekit.errors import UserError
from prunekit.evaluation import eval_mode

START_NOISE = 0.001
"""Standard deviation of the noise that TRADES and MART start from: at x itself KL is flat."""


class Ball(Protocol):
    """All images within `eps` of x, inside [0, 1]; images (B, C, H, W), lengths in pixel units."""

    def start(self, x: Tensor) -> Tensor:
        """Draw from the uniform distribution on the ball, then clamp to [0, 1]."""
        ...

    def direction(self, gradient: Tensor) -> Tensor:
        """The step of length one that climbs fastest."""
        ...

    def project(self, adversarial: Tensor, x: Tensor) -> Tensor:
        """Bring images back into the ball around x and into [0, 1]."""
        ...


@dataclass(frozen=True)
class Linf:
    """max |adversarial - x| <= eps."""

    eps: float

    def start(self, x: Tensor) -> Tensor:
        return (x + torch.empty_like(x).uniform_(-self.eps, self.eps)).clamp_(0, 1)

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def project(self, adversarial: Tensor, x: Tensor) -> Tensor:
        return adversarial.clamp(x - self.eps, x + self.eps).clamp_(0, 1)


@dataclass(frozen=True)
class L2:
    """||adversarial - x||_2 <= eps for each image."""

    eps: float

    def start(self, x: Tensor) -> Tensor:
        """A direction from the sphere times a radius eps * U^(1 / dimensions)."""
        along = torch.randn_like(x).flatten(1)
        radius = self.eps * torch.rand_like(along[:, :1]) ** (1 / along.shape[1])
        return (x + (F.normalize(along) * radius).view_as(x)).clamp_(0, 1)

    def direction(self, gradient: Tensor) -> Tensor:
        """gradient / ||gradient||_2, and an N(0, 1) draw (not normalised) where that is 0 / 0."""
        largest = gradient.abs().amax((1, 2, 3), keepdim=True)
        # Scaled first: the square of a small gradient, of a confident network, would underflow.
        scaled = gradient / largest
        unit = scaled / scaled.square().sum((1, 2, 3), keepdim=True).sqrt()
        return torch.where(largest > 0, unit, torch.randn_like(gradient))

    def project(self, adversarial: Tensor, x: Tensor) -> Tensor:
        # The box first: x is in it, so that shortening the difference does not leave it again.
        return (x + (adversarial.clamp(0, 1) - x).renorm(2, 0, self.eps)).clamp_(0, 1)


@dataclass(frozen=True)
class Attack:
    """How far and how fast to climb: the ball, the number of steps, the length of one."""

    ball: Ball
    steps: int
    step_size: float


def check_threat(threat: Threat | None) -> Threat:
    """The threat; raises `UserError` without one."""
    if threat is None:
        raise UserError(
            'an attack needs a radius; write [threat] with norm = "linf", eps = "8/255"'
        )
    return threat


def plan_attack(threat: Threat | None, steps: int, step_size: float | None = None) -> Attack:
    """The attack for a threat; `step_size` defaults to eps / 4.

    In L2, steps that shrink with their number (2 eps / steps) never turn the random start all the
    way to the gradient: PGD-50 then finds markedly fewer adversarial images.

    Raises `UserError` without a threat.

    >>> plan_attack(Threat("l2", 0.5), steps=10).step_size
    0.125
    """
    threat = check_threat(threat)
    ball: Ball = Linf(threat.eps) if threat.norm == "linf" else L2(threat.eps)
    return Attack(ball, steps, threat.eps / 4 if step_size is None else step_size)


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (B, K), in float32 at least: in bfloat16 a softmax loses small differences."""
    logits = model(x)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def is_correct(logits: Tensor, y: Tensor) -> Tensor:
    """(B,) booleans; an output that is not a number is never correct."""
    return (logits.argmax(1) == y) & ~logits.isnan().any(1)


def kl_divergences(logits: Tensor, adversarial: Tensor) -> Tensor:
    """KL(softmax logits || softmax adversarial) of each image, (B,); both are (B, K)."""
    return F.kl_div(
        F.log_softmax(adversarial, 1), F.log_softmax(logits, 1), reduction="none", log_target=True
    ).sum(1)


def kl_divergence(logits: Tensor, adversarial: Tensor) -> Tensor:
    """Its sum over the batch."""
    return kl_divergences(logits, adversarial).sum()


def climb(
    model: nn.Module,
    x: Tensor,
    adversarial: Tensor,
    loss: Callable[[Tensor], Tensor],
    attack: Attack,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step: project(adversarial + step_size * direction(gradient of loss(logits))).

    `loss` is a sum over the batch, so that no image's gradient depends on the others. Returns the
    next images, and the logits (B, K) and gradient (B, C, H, W) at the given ones.
    """
    with torch.enable_grad():
        adversarial = adversarial.detach().requires_grad_()
        logits = predict(model, adversarial)
        (gradient,) = torch.autograd.grad(loss(logits), adversarial)
    step = attack.step_size * attack.ball.direction(gradient)
    return attack.ball.project(adversarial.detach() + step, x), logits.detach(), gradient


def pgd(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, start: Tensor | None = None
) -> Tensor:
    """PGD on the cross-entropy in eval mode: the last iterate (B, C, H, W).

    From `start`, by default uniform in the ball, x_{t+1} = project(x_t + step_size *
    direction(grad CE(f(x_t), y))) (Madry et al., ICLR 2018, section 2.1).
    """
    loss = partial(F.cross_entropy, target=y, reduction="sum")
    adversarial = attack.ball.start(x) if start is None else start
    with eval_mode(model):
        for _ in range(attack.steps):
            adversarial, _, _ = climb(model, x, adversarial, loss, attack)
    return adversarial


def near(x: Tensor) -> Tensor:
    """x + 0.001 * N(0, 1), where the attacks of TRADES and MART start."""
    return x + START_NOISE * torch.randn_like(x)


def maximize_kl(model: nn.Module, x: Tensor, attack: Attack) -> Tensor:
    """The attack of TRADES: PGD on KL(p(x) || p(x')) in eval mode from x + 0.001 * N(0, 1).

    Returns the last iterate (B, C, H, W) (Zhang et al., ICML 2019, algorithm 1, and the authors'
    rules for L2, which are those of the ball).
    """
    adversarial = near(x)
    with eval_mode(model):
        # Not under no_grad: a weight that is cached there, by parametrize.cached() or by autocast
        # (pytorch issue 112583), would have no gradient in the loss that follows.
        loss = partial(kl_divergence, predict(model, x).detach())
        for _ in range(attack.steps):
            adversarial, _, _ = climb(model, x, adversarial, loss, attack)
    return adversarial
