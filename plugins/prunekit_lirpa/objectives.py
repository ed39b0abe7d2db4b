"""Certified training losses: interval bounds, CROWN-IBP, MixTrain.

The clean forward pass runs in train mode and updates the statistics of batch normalization. Bounds
are those of the network in eval mode with these statistics, because that is what will be certified.
eps ramps up in pretraining only: later stages use the full eps from their first step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit import exact
from prunekit.contexts import ObjectiveContext
from prunekit.contracts import Clock, Loss
from prunekit.errors import UserError
from prunekit_lirpa import CrownIbpOptions, IbpOptions, MixTrainOptions
from prunekit_lirpa.bounds import Bounds
from prunekit_lirpa.margins import check_threat, is_certain, robust_cross_entropy, surround


@dataclass(frozen=True)
class Ramp:
    """The growth of eps: a factor from 0 to 1 over `epochs`, or over a `share` of the stage."""

    share: float
    epochs: float | None

    def length(self, clock: Clock) -> float:
        """The ramp's length in epochs; raises `UserError` if the stage ends before the ramp."""
        if self.epochs is None:
            return float(exact(self.share) * clock.epochs)
        if self.epochs >= clock.epochs and self.epochs > 0:
            raise UserError(
                f"ramp_epochs = {self.epochs:g} leaves none of the stage's {clock.epochs} epochs "
                "for training at the full eps; write a smaller number, or use ramp, a fraction of "
                "the stage"
            )
        return self.epochs

    def by_step(self, clock: Clock) -> float:
        """The factor, growing with every step from 0 at the first."""
        steps = self.length(clock) * clock.steps / clock.epochs
        return min(1.0, clock.step / steps) if steps else 1.0

    def by_epoch(self, clock: Clock) -> float:
        """The factor, growing with every epoch from 0 in the first."""
        epochs = math.ceil(self.length(clock))
        return min(1.0, clock.epoch / epochs) if epochs else 1.0


NO_RAMP = Ramp(0.0, None)


def choose_ramp(options: IbpOptions | MixTrainOptions, context: ObjectiveContext) -> Ramp:
    """The ramp of the options in pretraining, and no ramp in other stages."""
    return Ramp(options.ramp, options.ramp_epochs) if context.stage == "pretrain" else NO_RAMP


def blend(start: float, end: float, done: float) -> float:
    """Linear interpolation from `start` (`done` = 0) to `end` (`done` = 1)."""
    return start + (end - start) * done


@dataclass(frozen=True)
class Ibp:
    """kappa CE(f(x), y) + (1 - kappa) CE(-m, y), where m are lower bounds of the margins, 0 at y.

    m = mix * CROWN-IBP + (1 - mix) * IBP over the box of radius t * eps (pixel units). t, kappa and
    mix change linearly with the steps of the ramp (Zhang et al., ICLR 2020, section 3; Gowal et
    al., ICCV 2019, section 3, has mix = 0). The logged terms are `natural` and `robust`, the two
    cross-entropies without their weights.
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
        lower = self._bound(x, y, done * self.eps, blend(*self.mix, done))
        robust = robust_cross_entropy(lower)
        value = kappa * natural + (1 - kappa) * robust
        terms = {"natural": natural.detach(), "robust": robust.detach()}
        return Loss(value, logits.detach(), terms)

    def _bound(self, x: Tensor, y: Tensor, eps: float, mix: float) -> Tensor:
        """Lower bounds (B, K - 1) of the margins of x (B, C, H, W); `mix` as in the class."""
        box = surround(x, eps)
        if mix == 0:
            return self.bounds.margins(box, y, "ibp")
        ibp, crown_ibp = self.bounds.margins_twice(box, y)
        return mix * crown_ibp + (1 - mix) * ibp

    def settled(self, clock: Clock) -> bool:
        """Whether the ramp is over; no earlier epoch can be the best one."""
        return self.ramp.by_step(clock) >= 1

    @torch.no_grad()
    def validate(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """`accuracy` and `verified_accuracy` at the full eps, (B,) zeros and ones each."""
        correct = self.model(x).argmax(1) == y
        certain = is_certain(self._bound(x, y, self.eps, self.mix[1]))
        return {"accuracy": correct.float(), "verified_accuracy": (correct & certain).float()}


@dataclass(frozen=True)
class MixTrain:
    """CE(f(x), y) + w CE(-m, y), where m are symbolic lower bounds of the margins of a few images.

    `options.images` images are drawn with replacement, or none with probability 1 -
    `options.probability` (Wang et al., 2018, section 4). w = weight * growth^(epochs since the ramp
    // every), at most `most`. The paper's symbolic bounds (intervals over error terms of the input
    and a new one for each unstable ReLU) equal backward CROWN with one slope for both sides, which
    is cheaper and used here. The logged terms are `natural` and `robust` (with w; 0 if no images
    were drawn), which sum to the loss.
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
            robust = self._weight(clock) * robust_cross_entropy(lower)
        terms = {"natural": natural.detach(), "robust": robust.detach()}
        return Loss(natural + robust, logits.detach(), terms)

    def _weight(self, clock: Clock) -> float:
        """The weight w of the robust loss."""
        since = max(0, clock.epoch - math.ceil(self.ramp.length(clock)))
        grown = self.options.weight * self.options.growth ** (since // self.options.every)
        return min(grown, self.options.most)

    def settled(self, clock: Clock) -> bool:
        """Whether the ramp is over; no earlier epoch can be the best one."""
        return self.ramp.by_epoch(clock) >= 1

    @torch.no_grad()
    def validate(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """`accuracy` and `verified_accuracy` at the full eps, (B,) zeros and ones each."""
        correct = self.model(x).argmax(1) == y
        certain = torch.zeros_like(correct)
        # The bounds are costly in memory and time: compute them for as many images at once as in
        # training, and only for correctly classified ones.
        left = correct.nonzero().squeeze(1)
        for part in left.split(self.options.images) if len(left) else ():
            lower = self.bounds.margins(surround(x[part], self.eps), y[part], "crown")
            certain[part] = is_certain(lower)
        return {"accuracy": correct.float(), "verified_accuracy": certain.float()}


def build_ibp(options: IbpOptions, context: ObjectiveContext) -> Ibp:
    """Build the objective `ibp`; raises `UserError` if there is no threat."""
    return Ibp(
        context.model,
        Bounds(context.model, context.shape),
        check_threat(context.threat, "ibp"),
        choose_ramp(options, context),
        (options.kappa_start, options.kappa_end),
    )


def build_crown_ibp(options: CrownIbpOptions, context: ObjectiveContext) -> Ibp:
    """Build the objective `crown-ibp`; raises `UserError` if there is no threat."""
    return Ibp(
        context.model,
        Bounds(context.model, context.shape),
        check_threat(context.threat, "crown-ibp"),
        choose_ramp(options, context),
        (options.kappa_start, options.kappa_end),
        (options.mix_start, options.mix_end),
    )


def build_mixtrain(options: MixTrainOptions, context: ObjectiveContext) -> MixTrain:
    """Build the objective `mixtrain`; raises `UserError` if there is no threat."""
    return MixTrain(
        context.model,
        Bounds(context.model, context.shape, "same-slope"),
        check_threat(context.threat, "mixtrain"),
        choose_ramp(options, context),
        options,
    )
