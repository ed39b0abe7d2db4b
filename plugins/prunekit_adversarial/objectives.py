"""Training losses: benign, PGD training, TRADES, MART, free. Attacks run in eval mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit import NoOptions
from prunekit.contracts import Clock, Context, Loss
from prunekit.errors import UserError
from prunekit_adversarial import FreeAdvOptions, MartOptions, PgdAtOptions, TradesOptions
from prunekit_adversarial.attacks import (
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
    """CE(f(x), y)."""

    model: nn.Module

    def __call__(self, x: Tensor, y: Tensor, clock: Clock) -> Loss:
        logits = predict(self.model, x)
        return Loss(F.cross_entropy(logits, y), logits.detach())


@dataclass(frozen=True)
class PgdAt:
    """CE(f(x'), y) with x' by PGD (Madry et al., ICLR 2018, equation 2.1); logits are those at x'.

    `validation` is the attack of the robust accuracy that chooses the best epoch.
    """

    model: nn.Module
    attack: Attack
    validation: Attack

    def __call__(self, x: Tensor, y: Tensor, clock: Clock) -> Loss:
        logits = predict(self.model, pgd(self.model, x, y, self.attack))
        return Loss(F.cross_entropy(logits, y), logits.detach())

    def validate(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return judge(self.model, x, y, self.validation)


@dataclass(frozen=True)
class Trades:
    """CE(f(x), y) + beta * KL(p(x) || p(x')) (Zhang et al., ICML 2019, equation 5).

    x' maximises that KL; gradients flow through both of its arguments. The terms that are logged
    are `natural` and, before beta, `robust`.
    """

    model: nn.Module
    beta: float
    attack: Attack
    validation: Attack

    def __call__(self, x: Tensor, y: Tensor, clock: Clock) -> Loss:
        adversarial = maximize_kl(self.model, x, self.attack)
        # Two forward passes, not one of both: batch statistics of clean and attacked images differ.
        logits = predict(self.model, x)
        natural = F.cross_entropy(logits, y)
        robust = kl_divergence(logits, predict(self.model, adversarial)) / len(x)
        terms = {"natural": natural.detach(), "robust": robust.detach()}
        return Loss(natural + self.beta * robust, logits.detach(), terms)

    def validate(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return judge(self.model, x, y, self.validation)


@dataclass(frozen=True)
class Mart:
    """Boosted CE at x' + beta * KL weighted by doubt (Wang et al., ICLR 2020, equation 11).

    With p = softmax f(x) and p' = softmax f(x'), the mean over the batch of
    -log p'_y - log(1.0001 - max_{j != y} p'_j + 1e-12) + beta * KL(p || p') * (1.0000001 - p_y);
    nothing is detached. x' climbs the cross-entropy from x + 0.001 * N(0, 1). The terms that are
    logged are `boosted` and, before beta, `robust`; logits are those at x.
    """

    model: nn.Module
    beta: float
    attack: Attack
    validation: Attack

    def __call__(self, x: Tensor, y: Tensor, clock: Clock) -> Loss:
        adversarial = pgd(self.model, x, y, self.attack, near(x))
        logits = predict(self.model, x)
        attacked = predict(self.model, adversarial)
        label = y[:, None]
        wrong = attacked.softmax(1).scatter(1, label, 0).amax(1)
        boosted = F.cross_entropy(attacked, y) - (1.0001 - wrong + 1e-12).log().mean()
        doubt = 1.0000001 - logits.softmax(1).gather(1, label).squeeze(1)
        robust = (kl_divergences(logits, attacked) * doubt).mean()
        terms = {"boosted": boosted.detach(), "robust": robust.detach()}
        return Loss(boosted + self.beta * robust, logits.detach(), terms)

    def validate(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return judge(self.model, x, y, self.validation)


@dataclass
class FreeAdv:
    """CE(f(clamp(x + noise, 0, 1)), y), every batch `replays` times, an optimiser step each.

    After each, noise += eps * sign(gradient), clamped to [-eps, eps], with the gradient at the
    noise of the backward that trained the weights (Shafahi et al., NeurIPS 2019, algorithm 1). The
    noise (B, C, H, W) starts at zero and passes from batch to batch; a shorter batch uses, and
    moves, its first part. With `reset` "epoch" every epoch starts at zero, as in HYDRA's code.
    """

    model: nn.Module
    eps: float
    reset: Literal["never", "epoch"]
    validation: Attack
    noise: Tensor | None = None
    _used: Tensor | None = None
    """The noise of the present step; the backward gives it a gradient."""

    def __call__(self, x: Tensor, y: Tensor, clock: Clock) -> Loss:
        if self.reset == "epoch" and clock.step % (clock.steps // clock.epochs) == 0:
            self.noise = None
        self._used = torch.zeros_like(x)
        if self.noise is not None:
            self._used[: len(self.noise)] = self.noise[: len(x)]
        self._used.requires_grad_()
        moved = x + self._used
        # clamp(0, 1), but pixels at 0 and 1 must have a gradient: since torch 2.15 clamp gives
        # them none, and black and white pixels would never leave their noise of zero.
        inside = (moved >= 0) & (moved <= 1)
        logits = predict(self.model, torch.where(inside, moved, moved.detach().clamp(0, 1)))
        return Loss(F.cross_entropy(logits, y), logits.detach())

    def after_step(self) -> None:
        """Move the noise by the gradient that the step's backward left at it."""
        used, self._used = self._used, None
        if used is None or used.grad is None:
            raise RuntimeError("free-adv: after_step() without a step and its backward()")
        moved = (used.detach() + self.eps * used.grad.sign()).clamp_(-self.eps, self.eps)
        if self.noise is None or len(self.noise) < len(moved):
            self.noise = moved
        else:
            self.noise[: len(moved)] = moved

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.noise is None else {"noise": self.noise}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.noise = state["noise"].clone() if "noise" in state else None

    def validate(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return judge(self.model, x, y, self.validation)


def judge(model: nn.Module, x: Tensor, y: Tensor, attack: Attack) -> dict[str, Tensor]:
    """Accuracy and robust accuracy, (B,) zeros and ones; robust = correct at x and after PGD."""
    adversarial = pgd(model, x, y, attack)
    with torch.no_grad():
        correct = is_correct(predict(model, x), y)
        robust = correct & is_correct(predict(model, adversarial), y)
    return {"accuracy": correct.float(), "robust_accuracy": robust.float()}


def build_benign(options: NoOptions, context: Context) -> Benign:
    return Benign(context.model)


def build_pgd_at(options: PgdAtOptions, context: Context) -> PgdAt:
    attack = plan_attack(context.threat, options.steps, options.step_size)
    return PgdAt(context.model, attack, plan_attack(context.threat, options.validation_steps))


def build_trades(options: TradesOptions, context: Context) -> Trades:
    attack = plan_attack(context.threat, options.steps, options.step_size)
    if options.step_size is None and isinstance(attack.ball, L2):
        # The authors' rule: from next to x, the steps reach twice as far as the ball's edge.
        attack = replace(attack, step_size=2 * attack.ball.eps / options.steps)
    validation = plan_attack(context.threat, options.validation_steps)
    return Trades(context.model, options.beta, attack, validation)


def build_mart(options: MartOptions, context: Context) -> Mart:
    attack = plan_attack(context.threat, options.steps, options.step_size)
    validation = plan_attack(context.threat, options.validation_steps)
    return Mart(context.model, options.beta, attack, validation)


def build_free_adv(options: FreeAdvOptions, context: Context) -> FreeAdv:
    threat = check_threat(context.threat)
    if threat.norm != "linf":
        raise UserError(
            f'free-adv moves its noise by signs, which norm = "{threat.norm}" does not allow; '
            'write norm = "linf" and an eps for it, or use pgd-at'
        )
    validation = plan_attack(threat, options.validation_steps)
    return FreeAdv(context.model, threat.eps, options.reset, validation)
