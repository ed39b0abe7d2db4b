"""Gradient attacks: the ball of a norm, one step of ascent, and the attacks built from them.

Attacks differentiate with respect to the images only. They never call `backward()`, so they leave
the parameters' gradients untouched, and also the graph of the effective weights, which the
surrounding training step still needs.
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
from prunekit.errors import RunError, UserError
from prunekit.evaluation import frozen

START_NOISE = 0.001
"""Standard deviation of the starting noise of TRADES and MART: at x itself the KL is flat."""


BLIND = (
    "the network lets no gradient through to its images (no_grad, detach, numpy, argmax, "
    "quantization), which attacks by gradient need; take one without gradients: "
    '{ use = "autoattack", attacks = ["square"] }'
)


class Ball(Protocol):
    """All images in [0, 1] within `eps` of x; images are (B, C, H, W), lengths in pixel units."""

    @property
    def eps(self) -> float:
        """The radius."""
        ...

    def start(self, x: Tensor) -> Tensor:
        """Draw uniformly from the ball around x, then clamp to [0, 1]; (B, C, H, W)."""
        ...

    def direction(self, gradient: Tensor) -> Tensor:
        """The step of length one along which the loss grows fastest; (B, C, H, W)."""
        ...

    def project(self, adversarial: Tensor, x: Tensor) -> Tensor:
        """Project images onto the ball around x and onto [0, 1]; (B, C, H, W)."""
        ...


@dataclass(frozen=True)
class Linf:
    """The L-infinity ball: max |adversarial - x| <= eps."""

    eps: float

    def start(self, x: Tensor) -> Tensor:
        """x plus uniform noise from [-eps, eps], clamped to [0, 1]."""
        return (x + torch.empty_like(x).uniform_(-self.eps, self.eps)).clamp_(0, 1)

    def direction(self, gradient: Tensor) -> Tensor:
        """The sign of the gradient."""
        return gradient.sign()

    def project(self, adversarial: Tensor, x: Tensor) -> Tensor:
        """Clamp to [x - eps, x + eps], then to [0, 1]."""
        return adversarial.clamp(x - self.eps, x + self.eps).clamp_(0, 1)


@dataclass(frozen=True)
class L2:
    """The L2 ball: ||adversarial - x||_2 <= eps for each image."""

    eps: float

    def start(self, x: Tensor) -> Tensor:
        """x plus a uniform direction times eps * U^(1 / dimensions), clamped to [0, 1]."""
        along = torch.randn_like(x).flatten(1)
        radius = self.eps * torch.rand_like(along[:, :1]) ** (1 / along.shape[1])
        return (x + (F.normalize(along) * radius).view_as(x)).clamp_(0, 1)

    def direction(self, gradient: Tensor) -> Tensor:
        """gradient / ||gradient||_2; where that is 0 / 0, an N(0, 1) draw (not normalized)."""
        largest = gradient.abs().amax((1, 2, 3), keepdim=True)
        # Scale first: confident networks have tiny gradients, whose squares would underflow.
        scaled = gradient / largest
        unit = scaled / scaled.square().sum((1, 2, 3), keepdim=True).sqrt()
        return torch.where(largest > 0, unit, torch.randn_like(gradient))

    def project(self, adversarial: Tensor, x: Tensor) -> Tensor:
        """Clamp to [0, 1], then shorten the difference to x to eps at most."""
        # The box [0, 1] comes first: x lies in it, so shortening the difference cannot leave it.
        return (x + (adversarial.clamp(0, 1) - x).renorm(2, 0, self.eps)).clamp_(0, 1)


@dataclass(frozen=True)
class Attack:
    """An attack's settings: the ball, the number of steps, and the step size in pixel units."""

    ball: Ball
    steps: int
    step_size: float


def check_threat(threat: Threat | None) -> Threat:
    """Return the threat; raises `UserError` if there is none."""
    if threat is None:
        raise UserError(
            'an attack needs a radius; write [threat] with norm = "linf", eps = "8/255"'
        )
    return threat


def plan_attack(threat: Threat | None, steps: int, step_size: float | None = None) -> Attack:
    """The attack for a threat; `step_size` (pixel units) defaults to eps / 4.

    Steps that shrink as their number grows (2 eps / steps) would be too short in L2 to move away
    from the random start: PGD-50 then finds markedly fewer adversarial images.

    Raises `UserError` if there is no threat.

    >>> plan_attack(Threat("l2", 0.5), steps=10).step_size
    0.125
    """
    threat = check_threat(threat)
    ball: Ball = Linf(threat.eps) if threat.norm == "linf" else L2(threat.eps)
    return Attack(ball, steps, threat.eps / 4 if step_size is None else step_size)


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (B, K) of images (B, C, H, W), in float32 or wider.

    In bfloat16, a softmax would lose small differences. Raises `RunError` where the network cannot
    take images with a gradient.
    """
    try:
        logits: Tensor = model(x)
    except RuntimeError as error:
        # "Can't call numpy() on Tensor that requires grad."
        if x.requires_grad and "requires grad" in str(error):
            raise RunError(BLIND) from error
        raise
    if logits.is_inference():  # of a network that computes in inference mode: attacks change it
        logits = logits.clone()
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def is_correct(logits: Tensor, y: Tensor) -> Tensor:
    """Whether logits (B, K) are largest at labels y (B,): booleans (B,); NaN never is."""
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


def kl_divergences(logits: Tensor, adversarial: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(adversarial)) of each image, (B,); both inputs are (B, K)."""
    return F.kl_div(
        F.log_softmax(adversarial, 1), F.log_softmax(logits, 1), reduction="none", log_target=True
    ).sum(1)


def kl_divergence(logits: Tensor, adversarial: Tensor) -> Tensor:
    """The sum of `kl_divergences` over the batch, a scalar."""
    return kl_divergences(logits, adversarial).sum()


def differentiate(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The logits (B, K) and the gradient of loss(logits) at images x (B, C, H, W); zero for NaN.

    Raises `RunError` where the network lets no gradient through to its images.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = predict(model, x)
        value = loss(logits)
        if not value.requires_grad:
            raise RunError(BLIND)
        (gradient,) = torch.autograd.grad(value, x, allow_unused=True)
    if gradient is None:
        raise RunError(BLIND)
    return logits.detach(), gradient.nan_to_num(0.0)


def climb(
    model: nn.Module,
    x: Tensor,
    adversarial: Tensor,
    loss: Callable[[Tensor], Tensor],
    attack: Attack,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step: project(adversarial + step_size * direction(gradient of loss(logits))).

    `x` are the clean images and `adversarial` the current ones, both (B, C, H, W) in [0, 1]. `loss`
    sums over the batch, so that no image's gradient depends on the other images. Returns the next
    images, and the logits (B, K) and the gradient (B, C, H, W) at the current ones.

    Raises `RunError` as `differentiate` does.
    """
    logits, gradient = differentiate(model, adversarial, loss)
    step = attack.step_size * attack.ball.direction(gradient)
    return attack.ball.project(adversarial.detach() + step, x), logits, gradient


def pgd(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, start: Tensor | None = None
) -> Tensor:
    """PGD on the cross-entropy in eval mode: the last iterate (B, C, H, W) in [0, 1].

    x_{t+1} = project(x_t + step_size * direction(grad CE(f(x_t), y))) (Madry et al., ICLR 2018,
    section 2.1), from `start` (B, C, H, W), by default a uniform draw from the ball around x.
    """
    loss = partial(F.cross_entropy, target=y, reduction="sum")
    adversarial = attack.ball.start(x) if start is None else start
    with frozen(model) as network:
        for _ in range(attack.steps):
            adversarial, _, _ = climb(network, x, adversarial, loss, attack)
    return adversarial


def near(x: Tensor) -> Tensor:
    """x + 0.001 * N(0, 1), the start of the attacks of TRADES and MART; (B, C, H, W)."""
    return x + START_NOISE * torch.randn_like(x)


def maximize_kl(
    model: nn.Module, x: Tensor, attack: Attack, reference: Tensor | None = None
) -> Tensor:
    """The attack of TRADES: PGD on KL(p(x) || p(x')) in eval mode from x + 0.001 * N(0, 1).

    Returns the last iterate (B, C, H, W) in [0, 1] (Zhang et al., ICML 2019, algorithm 1; in L2 the
    steps and projections of the authors' code, which `L2` implements). p(x) is the softmax of
    `reference` (B, K) if that is given, as by a teacher, instead of f(x).
    """
    adversarial = near(x)
    with frozen(model) as network:
        # Not under no_grad: weights cached there by parametrize.cached() or autocast (pytorch issue
        # 112583) would have no gradient in the loss that follows.
        if reference is None:
            reference = predict(network, x).detach()
        loss = partial(kl_divergence, reference)
        for _ in range(attack.steps):
            adversarial, _, _ = climb(network, x, adversarial, loss, attack)
    return adversarial
