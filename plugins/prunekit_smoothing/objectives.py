"""Training objectives for randomized smoothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.contexts import ObjectiveContext
from prunekit.contracts import Clock, Loss
from prunekit_smoothing import SmoothingOptions


@dataclass(frozen=True)
class Smoothing:
    """What both losses share: the noise, and the validation.

    `sigma` is in pixel units; noisy images are not clamped. `draws` is the number of noisy copies
    of each validation image; `smoothing` is that of the labels in the cross-entropy.
    """

    model: nn.Module
    sigma: float
    draws: int
    smoothing: float

    def _add_noise(self, x: Tensor) -> Tensor:
        """x + N(0, sigma^2), both (B, C, H, W)."""
        return x + self.sigma * torch.randn_like(x)

    def _predict(self, x: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W), in float32 or wider.

        In bfloat16, a softmax would lose small differences.
        """
        logits: Tensor = self.model(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, label_smoothing=self.smoothing)

    @torch.no_grad()
    def validate(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """`accuracy`, and `noisy_accuracy`, the fraction of correct noisy copies; (B,) each.

        Images x are (B, C, H, W), labels y (B,).
        """
        noisy = torch.stack(
            [self._predict(self._add_noise(x)).argmax(1) == y for _ in range(self.draws)]
        )
        accuracy = (self._predict(x).argmax(1) == y).float()
        return {"accuracy": accuracy, "noisy_accuracy": noisy.float().mean(0)}


@dataclass(frozen=True)
class Stability(Smoothing):
    """CE(f(x), y) + beta * KL(p(x) || p(x + noise)) (Carmon et al., NeurIPS 2019, section 3.2).

    Gradients flow through both arguments of the KL. The logged terms are `natural` and `stability`
    (the KL, without beta); the logits are those at x.
    """

    beta: float

    def __call__(self, x: Tensor, y: Tensor, clock: Clock) -> Loss:
        # Two forward passes rather than one over both: clean and noisy images have different batch
        # statistics.
        logits = self._predict(x)
        noisy = self._predict(self._add_noise(x))
        natural = self._cross_entropy(logits, y)
        stability = F.kl_div(
            noisy.log_softmax(1), logits.log_softmax(1), reduction="batchmean", log_target=True
        )
        terms = {"natural": natural.detach(), "stability": stability.detach()}
        return Loss(natural + self.beta * stability, logits.detach(), terms)


@dataclass(frozen=True)
class NoiseTraining(Smoothing):
    """CE(f(x + noise), y) (Cohen et al., ICML 2019, section 3.3); logits are those at x + noise."""

    def __call__(self, x: Tensor, y: Tensor, clock: Clock) -> Loss:
        logits = self._predict(self._add_noise(x))
        return Loss(self._cross_entropy(logits, y), logits.detach())


def build_smoothing(options: SmoothingOptions, context: ObjectiveContext) -> Smoothing:
    """Build the objective `smoothing`, with the loss in the options."""
    common = (context.model, options.sigma, options.validation_draws, options.label_smoothing)
    if options.beta is None:
        return NoiseTraining(*common)
    return Stability(*common, options.beta)
