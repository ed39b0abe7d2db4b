"""Certified training losses: interval bounds, CROWN-IBP, MixTrain.

The clean forward pass is in train mode and moves the statistics of batch normalisation; bounds are
those of the network in eval mode, with these statistics, which is what will be certified. eps ramps
up in pretraining alone: later stages have the whole eps from their first step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.contracts import Clock, Context, Loss
from prunekit.errors import UserError
from prunekit_lirpa import CrownIbpOptions, IbpOptions, MixTrainOptions
from prunekit_lirpa.bounds import (
    Bounds,
    check_threat,
    is_certain,
    robust_cross_entropy,
    surround,
)


@dataclass(frozen=True)
class Ramp:
    """How far eps has grown: from 0 to 1 over `epochs`, or over the part `share` of the stage."""

    share: float
    epochs: float | None

    def length(self, clock: Clock) -> float:
        """In epochs. Raises `UserError` where the stage ends before it."""
        if self.epochs is None:
            return self.share * clock.epochs
        if self.epochs >= clock.epochs and self.epochs > 0:
            raise UserError(
                f"ramp_epochs = {self.epochs:g} leaves none of the stage's {clock.epochs} epochs "
                "at the whole eps; write less, or ramp = 0.5 for a part of them"
            )
        return self.epochs

    def by_step(self, clock: Clock) -> float:
        """Step by step, from 0 at the first."""
        steps = self.length(clock) * clock.steps / clock.epochs
        return min(1.0, clock.step / steps) if steps else 1.0

    def by_epoch(self, clock: Clock) -> float:
        """Epoch by epoch: 0 in the first, and the same within each."""
        epochs = math.ceil(self.length(clock))
        return min(1.0, clock.epoch / epochs) if epochs else 1.0


NO_RAMP = Ramp(0.0, None)


def choose_ramp(options: IbpOptions | MixTrainOptions, context: Context) -> Ramp:
    """The options' ramp in pretraining, none elsewhere."""
    return Ramp(options.ramp, options.ramp_epochs) if context.stage == "pretrain" else NO_RAMP


def blend(start: float, end: float, done: float) -> float:
    return start + (end - start) * done


@dataclass(frozen=True)
class Ibp:
    """kappa CE(f(x), y) + (1 - kappa) CE(-m, y), m the lower bounds of the margins, 0 at y.

    m = mix * CROWN-IBP + (1 - mix) * IBP over the box of radius t * eps; t, kappa and mix are
    linear in the step of the ramp (Zhang et al., ICLR 2020, section 3; Gowal et al., ICCV 2019,
    section 3, where mix is 0). The terms that are logged are `natural` and `robust`, before kappa.
    """

    model: nn.Module
    bounds: Bounds
    eps: float
    ramp: Ramp
    kappa: tuple[float, float]
    mix: tuple[float, float] = (0.0, 0.0)

    def __call__(self, x: Tensor, y: Tensor, clock: Clock) -> Loss:
        done = self.ramp.by_step(clock)
        kappa = blend(*self.kappa, done)
        with torch.set_grad_enabled(kappa > 0):
            logits = self.model(x).float()
            natural = F.cross_entropy(logits, y)
        lower = self.bound(x, y, done * self.eps, blend(*self.mix, done))
        robust = robust_cross_entropy(lower)
        value = kappa * natural + (1 - kappa) * robust
        terms = {"natural": natural.detach(), "robust": robust.detach()}
        return Loss(value, logits.detach(), terms)

    def bound(self, x: Tensor, y: Tensor, eps: float, mix: float) -> Tensor:
        """Lower bounds of the margins, (B, K - 1)."""
        box = surround(x, eps)
        if mix == 0:
            return self.bounds.margins(box, y, "ibp")
        ibp, crown_ibp = self.bounds.margins_twice(box, y)
        return mix * crown_ibp + (1 - mix) * ibp

    def settled(self, clock: Clock) -> bool:
        return self.ramp.by_step(clock) >= 1

    @torch.no_grad()
    def validate(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        correct = self.model(x).argmax(1) == y
        certain = is_certain(self.bound(x, y, self.eps, self.mix[1]))
        return {"accuracy": correct.float(), "verified_accuracy": (correct & certain).float()}


@dataclass(frozen=True)
class MixTrain:
    """CE(f(x), y) + w CE(-m, y), m the symbolic lower bounds of the margins of k drawn images.

    They are drawn with replacement, and with probability 1 - p none are (Wang et al., 2018, section
    4). w = weight * growth^(epochs since the ramp // every), at most `most`. The symbolic bounds,
    intervals of the input's error terms and a fresh one for each unstable ReLU, are the same as
    backward CROWN with one slope for both sides, which is cheaper. The terms that are logged are
    `natural` and `robust`, with w, 0 where none were drawn; they sum to the loss.
    """

    model: nn.Module
    bounds: Bounds
    eps: float
    ramp: Ramp
    options: MixTrainOptions

    def __call__(self, x: Tensor, y: Tensor, clock: Clock) -> Loss:
        logits = self.model(x).float()
        natural = F.cross_entropy(logits, y)
        robust = torch.zeros_like(natural)
        if float(torch.rand(())) < self.options.probability:
            drawn = torch.randint(len(y), (self.options.images,)).to(y.device)
            box = surround(x[drawn], self.ramp.by_epoch(clock) * self.eps)
            lower = self.bounds.margins(box, y[drawn], "crown")
            robust = self.weight(clock) * robust_cross_entropy(lower)
        terms = {"natural": natural.detach(), "robust": robust.detach()}
        return Loss(natural + robust, logits.detach(), terms)

    def weight(self, clock: Clock) -> float:
        since = max(0, clock.epoch - math.ceil(self.ramp.length(clock)))
        grown = self.options.weight * self.options.growth ** (since // self.options.every)
        return min(grown, self.options.most)

    def settled(self, clock: Clock) -> bool:
        return self.ramp.by_epoch(clock) >= 1

    @torch.no_grad()
    def validate(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        correct = self.model(x).argmax(1) == y
        certain = torch.zeros_like(correct)
        # They are dear in memory and time: of as many at once as in training, if they can count.
        left = correct.nonzero().squeeze(1)
        for part in left.split(self.options.images) if len(left) else ():
            lower = self.bounds.margins(surround(x[part], self.eps), y[part], "crown")
            certain[part] = is_certain(lower)
        return {"accuracy": correct.float(), "verified_accuracy": certain.float()}


def build_ibp(options: IbpOptions, context: Context) -> Ibp:
    return Ibp(
        context.model,
        Bounds(context.model, context.shape),
        check_threat(context.threat, "ibp"),
        choose_ramp(options, context),
        (options.kappa_start, options.kappa_end),
    )


def build_crown_ibp(options: CrownIbpOptions, context: Context) -> Ibp:
    return Ibp(
        context.model,
        Bounds(context.model, context.shape),
        check_threat(context.threat, "crown-ibp"),
        choose_ramp(options, context),
        (options.kappa_start, options.kappa_end),
        (options.mix_start, options.mix_end),
    )


def build_mixtrain(options: MixTrainOptions, context: Context) -> MixTrain:
    return MixTrain(
        context.model,
        Bounds(context.model, context.shape, "same-slope"),
        check_threat(context.threat, "mixtrain"),
        choose_ramp(options, context),
        options,
    )
