"""Training objectives: benign, PGD, TRADES, MART, free. All attacks run in eval mode.

CE with `smoothing` s is that to labels of probability (1 - s) + s / K, and s / K for other classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.contexts import ObjectiveContext
from prunekit.contracts import Clock, Loss
from prunekit.errors import RunError
from prunekit_adversarial import (
    FreeAdvOptions,
    LabelOptions,
    MartOptions,
    PgdAtOptions,
    TradesOptions,
    TrainingOptions,
)
from prunekit_adversarial.attacks import (
    BLIND,
    L2,
    Attack,
    check_threat,
    is_correct,
    kl_divergence,
    kl_divergences,
    maximize_kl,
    near,
    pgd,
    plan_attack,
    predict,
)


@dataclass(frozen=True)
class Benign:
    """Cross-entropy on clean images: CE(f(x), y)."""

    model: nn.Module
    smoothing: float = 0.0

    def __call__(self, x: Tensor, y: Tensor, clock: Clock) -> Loss:
        logits = predict(self.model, x)
        value = F.cross_entropy(logits, y, label_smoothing=self.smoothing)
        return Loss(value, logits.detach())


@dataclass(frozen=True)
class Attacked:
    """Images x and attacked ones, (B, C, H, W), with labels y (B,)."""

    x: Tensor
    y: Tensor
    adversarial: Tensor


@dataclass(frozen=True)
class Adversarial(ABC):
    """What the objectives below share: the network, and the attacks of training and validation."""

    model: nn.Module
    attack: Attack
    validation: Attack

    @abstractmethod
    def prepare(self, x: Tensor, y: Tensor, clock: Clock) -> Attacked:
        """The attack."""

    @abstractmethod
    def loss(self, prepared: Any, clock: Clock) -> Loss:
        """The loss after it."""

    def __call__(self, x: Tensor, y: Tensor, clock: Clock) -> Loss:
        """The attack, and the loss after it."""
        return self.loss(self.prepare(x, y, clock), clock)

    def validate(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Accuracy and robust accuracy of each image; see `judge`."""
        return judge(self.model, x, y, self.validation)


@dataclass(frozen=True)
class PgdAt(Adversarial):
    """CE(f(x'), y) with x' found by PGD (Madry et al., ICLR 2018, equation 2.1).

    The logits of the loss are those at x'.
    """

    smoothing: float = 0.0

    def prepare(self, x: Tensor, y: Tensor, clock: Clock) -> Attacked:
        """Images attacked by PGD from a uniform start."""
        return Attacked(x, y, pgd(self.model, x, y, self.attack))

    def loss(self, prepared: Attacked, clock: Clock) -> Loss:
        """The cross-entropy at the attacked images."""
        logits = predict(self.model, prepared.adversarial)
        value = F.cross_entropy(logits, prepared.y, label_smoothing=self.smoothing)
        return Loss(value, logits.detach())


@dataclass(frozen=True)
class Trades(Adversarial):
    """CE(f(x), y) + beta * KL(p(x) || p(x')) (Zhang et al., ICML 2019, equation 5).

    x' maximizes that KL; gradients flow through both of its arguments. The logged terms are
    `natural` and `robust` (the KL, without beta); the logits are those at x.
    """

    beta: float
    smoothing: float = 0.0

    def prepare(self, x: Tensor, y: Tensor, clock: Clock) -> Attacked:
        """Images attacked on the KL."""
        return Attacked(x, y, maximize_kl(self.model, x, self.attack))

    def loss(self, prepared: Attacked, clock: Clock) -> Loss:
        """The loss at clean and attacked images."""
        x = prepared.x
        # Two forward passes rather than one over both: clean and attacked images have different
        # batch statistics.
        logits = predict(self.model, x)
        natural = F.cross_entropy(logits, prepared.y, label_smoothing=self.smoothing)
        robust = kl_divergence(logits, predict(self.model, prepared.adversarial)) / len(x)
        terms = {"natural": natural.detach(), "robust": robust.detach()}
        return Loss(natural + self.beta * robust, logits.detach(), terms)


@dataclass(frozen=True)
class Mart(Adversarial):
    """Boosted CE at x' + beta * KL weighted by 1 - p_y (Wang et al., ICLR 2020, equation 11).

    With p = softmax f(x) and p' = softmax f(x'), the mean over the batch of
    -log p'_y - log(1.0001 - max_{j != y} p'_j + 1e-12) + beta * KL(p || p') * (1.0000001 - p_y);
    nothing is detached. x' is found by PGD from x + 0.001 * N(0, 1). The logged terms are `boosted`
    and `robust` (without beta); the logits are those at x.
    """

    beta: float
    smoothing: float = 0.0

    def prepare(self, x: Tensor, y: Tensor, clock: Clock) -> Attacked:
        """Images attacked by PGD from close to themselves."""
        return Attacked(x, y, pgd(self.model, x, y, self.attack, near(x)))

    def loss(self, prepared: Attacked, clock: Clock) -> Loss:
        """The loss at clean and attacked images."""
        y = prepared.y
        logits = predict(self.model, prepared.x)
        attacked = predict(self.model, prepared.adversarial)
        label = y[:, None]
        wrong = attacked.softmax(1).scatter(1, label, 0).amax(1)
        boosted = F.cross_entropy(attacked, y, label_smoothing=self.smoothing)
        boosted = boosted - (1.0001 - wrong + 1e-12).log().mean()
        doubt = 1.0000001 - logits.softmax(1).gather(1, label).squeeze(1)
        robust = (kl_divergences(logits, attacked) * doubt).mean()
        terms = {"boosted": boosted.detach(), "robust": robust.detach()}
        return Loss(boosted + self.beta * robust, logits.detach(), terms)


@dataclass
class FreeAdv:
    """CE(f(clamp(x + noise, 0, 1)), y), with `replays` optimizer steps on every batch.

    After each step, noise += eps * sign(gradient), clamped to [-eps, eps]; the gradient with
    respect to the noise comes from the backward pass that trained the weights (Shafahi et al.,
    NeurIPS 2019, algorithm 1). The noise (B, C, H, W) in pixel units starts at zero and is passed
    on from batch to batch; a shorter batch uses and updates its first images only. With `reset`
    "epoch" it starts at zero in every epoch, as in HYDRA's code.
    """

    model: nn.Module
    eps: float
    reset: Literal["never", "epoch"]
    validation: Attack
    smoothing: float = 0.0
    noise: Tensor | None = None
    _used: Tensor | None = None
    """The noise of the current step; `backward()` leaves its gradient here."""

    def __call__(self, x: Tensor, y: Tensor, clock: Clock) -> Loss:
        if self.reset == "epoch" and clock.step % (clock.steps // clock.epochs) == 0:
            self.noise = None
        self._used = torch.zeros_like(x)
        if self.noise is not None:
            self._used[: len(self.noise)] = self.noise[: len(x)]
        self._used.requires_grad_()
        moved = x + self._used
        # clamp(0, 1), but with a gradient for pixels at exactly 0 and 1: clamp itself gives them
        # none since torch 2.15, and the noise of black and white pixels would stay zero forever.
        inside = (moved >= 0) & (moved <= 1)
        logits = predict(self.model, torch.where(inside, moved, moved.detach().clamp(0, 1)))
        value = F.cross_entropy(logits, y, label_smoothing=self.smoothing)
        return Loss(value, logits.detach())

    def after_step(self) -> None:
        """Update the noise with the gradient that the step's backward pass computed for it."""
        used, self._used = self._used, None
        if used is None:
            raise RuntimeError("free-adv: after_step() called without a step and its backward()")
        if used.grad is None:
            raise RunError(BLIND)
        moved = (used.detach() + self.eps * used.grad.sign()).clamp_(-self.eps, self.eps)
        if self.noise is None or len(self.noise) < len(moved):
            self.noise = moved
        else:
            self.noise[: len(moved)] = moved

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run has to restore: `noise`, if there is any yet."""
        return {} if self.noise is None else {"noise": self.noise}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.noise = state["noise"].clone() if "noise" in state else None

    def validate(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Accuracy and robust accuracy of each image; see `judge`."""
        return judge(self.model, x, y, self.validation)


def judge(model: nn.Module, x: Tensor, y: Tensor, attack: Attack) -> dict[str, Tensor]:
    """`accuracy` and `robust_accuracy` of each image, (B,) zeros and ones.

    Images x are (B, C, H, W) in [0, 1], labels y (B,). Robust means correct both at x and after the
    PGD attack.
    """
    adversarial = pgd(model, x, y, attack)
    with torch.no_grad():
        correct = is_correct(predict(model, x), y)
        robust = correct & is_correct(predict(model, adversarial), y)
    return {"accuracy": correct.float(), "robust_accuracy": robust.float()}


def plan(options: TrainingOptions, context: ObjectiveContext) -> tuple[nn.Module, Attack, Attack]:
    """The fields of `Adversarial`; raises `UserError` if there is no threat."""
    attack = plan_attack(context.threat, options.steps, options.step_size)
    return context.model, attack, plan_attack(context.threat, options.validation_steps)


def build_benign(options: LabelOptions, context: ObjectiveContext) -> Benign:
    """Build the objective `benign`."""
    return Benign(context.model, options.label_smoothing)


def build_pgd_at(options: PgdAtOptions, context: ObjectiveContext) -> PgdAt:
    """Build the objective `pgd-at`; raises `UserError` if there is no threat."""
    return PgdAt(*plan(options, context), options.label_smoothing)


def build_trades(options: TradesOptions, context: ObjectiveContext) -> Trades:
    """Build the objective `trades`; raises `UserError` if there is no threat."""
    model, attack, validation = plan(options, context)
    if options.step_size is None and isinstance(attack.ball, L2):
        # As in the authors' code: all steps together are twice as long as the radius.
        attack = replace(attack, step_size=2 * attack.ball.eps / options.steps)
    return Trades(model, attack, validation, options.beta, options.label_smoothing)


def build_mart(options: MartOptions, context: ObjectiveContext) -> Mart:
    """Build the objective `mart`; raises `UserError` if there is no threat."""
    return Mart(*plan(options, context), options.beta, options.label_smoothing)


def build_free_adv(options: FreeAdvOptions, context: ObjectiveContext) -> FreeAdv:
    """Build the objective `free-adv`; raises `UserError` if there is no threat."""
    threat = check_threat(context.threat)
    validation = plan_attack(threat, options.validation_steps)
    own = (threat.eps, options.reset, validation, options.label_smoothing)
    return FreeAdv(context.model, *own)
