"""Adversarial training with a single step of attack, FGSM-RS and N-FGSM; attacks in eval mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunekit.contexts import ObjectiveContext
from prunekit.contracts import Clock
from prunekit.evaluation import frozen
from prunekit_adversarial import FgsmRsOptions, NFgsmOptions, SingleStepOptions
from prunekit_adversarial.attacks import Attack, Linf, check_threat, differentiate, plan_attack
from prunekit_adversarial.objectives import Attacked, PgdAt

ROBUST = "validation.robust_accuracy"


@dataclass(frozen=True, kw_only=True)
class SingleStep(PgdAt):
    """CE(f(x'), y), with `smoothing`, at an image x' that one step of the attack has made.

    x' = clamp(s + step * sign(grad CE(f(s), y)), 0, 1) from s = clamp(x + u, 0, 1), where u is
    uniform in [-reach, reach], and with `inside` x' is clamped to [x - eps, x + eps] as well. All
    three lengths, in pixels, grow linearly from 0 over the first `ramp` epochs. The logits of the
    loss are those at x'.
    """

    reach: float
    inside: bool
    ramp: float
    drop: float

    def prepare(self, x: Tensor, y: Tensor, clock: Clock) -> Attacked:
        """The attacked images."""
        grown = self._grow(clock)
        reach, ball = grown * self.reach, Linf(grown * self.attack.ball.eps)
        start = (x + torch.empty_like(x).uniform_(-reach, reach)).clamp_(0, 1)
        loss = partial(F.cross_entropy, target=y, reduction="sum")
        with frozen(self.model) as network:
            _, gradient = differentiate(network, start, loss)
        ahead = start + grown * self.attack.step_size * ball.direction(gradient)
        return Attacked(x, y, ball.project(ahead, x) if self.inside else ahead.clamp_(0, 1))

    def _grow(self, clock: Clock) -> float:
        """The part of eps that holds at a step."""
        steps = self.ramp * clock.steps / clock.epochs
        return min(1.0, clock.step / steps) if steps else 1.0

    def settled(self, clock: Clock) -> bool:
        """Whether the ramp is over; no earlier epoch can be the best one."""
        return self._grow(clock) == 1

    def halts(self, history: Sequence[Mapping[str, Any]]) -> str:
        """Catastrophic overfitting, if the last epoch shows it (Wong et al., ICLR 2020).

        Accuracy under PGD on validation images is more than `drop` below that of the epoch before,
        while accuracy on training images, under the single step, is above. A slower fall is the
        overfitting of every adversarial training.
        """
        rows = [row for row in history[-2:] if ROBUST in row]
        if len(rows) < 2:
            return ""
        before, now = rows
        fell = before[ROBUST] - now[ROBUST] > self.drop + 1e-9  # 0.55 - 0.5 > 0.05
        if not fell or now["accuracy"] <= before["accuracy"]:
            return ""
        return (
            f"catastrophic overfitting: robust accuracy fell from {before[ROBUST]:.1%} to "
            f"{now[ROBUST]:.1%} on validation images, and rose from {before['accuracy']:.1%} to "
            f"{now['accuracy']:.1%} under the single step of training; lower the optimizer's lr, "
            "or use n-fgsm or pgd-at"
        )


def _build(
    options: SingleStepOptions, context: ObjectiveContext, step: float, reach: float, inside: bool
) -> SingleStep:
    """`step` and `reach` are in multiples of eps."""
    eps = check_threat(context.threat).eps
    return SingleStep(
        context.model,
        Attack(Linf(eps), 1, step * eps),
        plan_attack(context.threat, options.validation_steps),
        options.label_smoothing,
        reach=reach * eps,
        inside=inside,
        ramp=options.ramp,
        drop=options.drop,
    )


def build_fgsm_rs(options: FgsmRsOptions, context: ObjectiveContext) -> SingleStep:
    """Build the objective `fgsm-rs`; raises `UserError` if there is no threat."""
    return _build(options, context, options.step, 1.0, inside=True)


def build_n_fgsm(options: NFgsmOptions, context: ObjectiveContext) -> SingleStep:
    """Build the objective `n-fgsm`; raises `UserError` if there is no threat."""
    return _build(options, context, 1.0, options.noise, inside=False)
