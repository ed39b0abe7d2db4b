"""Training losses: benign, PGD adversarial training, TRADES. Attacks run in eval mode."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit import NoOptions
from prunekit.contracts import Clock, Context, Loss
from prunekit_adversarial import PgdAtOptions, TradesOptions
from prunekit_adversarial.attacks import (
    L2,
    Attack,
    is_correct,
    kl_divergence,
    maximize_kl,
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
