"""Sharpness-aware learning of scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from prunekit import UserError
from prunekit.contexts import NetworkContext
from prunekit.contracts import Loss
from prunekit.steps import Now
from prunekit_wrappers import S2apOptions


@dataclass(frozen=True)
class S2ap:
    """The gradient at the masks of s + z, with z = gamma * ||s|| * g / ||g|| for each layer.

    g is the gradient of the step's loss at the scores s; the attack is that of the masks of s
    (arXiv 2510.18381).
    """

    options: S2apOptions

    def around(self, go: Callable[[], Loss], now: Now) -> Loss:
        """Two passes, the second at the perturbed scores, which are then restored by copy."""
        if not now.scores:
            raise UserError("s2ap needs learned scores, and this pruner has none; remove it")
        if now.clock.epoch < self.options.start:
            return go()
        go()
        before = {name: score.detach().clone() for name, score in now.scores.items()}
        with torch.no_grad():
            for name, score in now.scores.items():
                if (gradient := score.grad) is not None:
                    length = self.options.gamma * before[name].norm() / (gradient.norm() + 1e-20)
                    score.add_(gradient * length)
        try:
            return go()
        finally:
            with torch.no_grad():
                for name, score in now.scores.items():
                    score.copy_(before[name])


def build(options: S2apOptions, context: NetworkContext) -> S2ap:
    """Build the wrapper `s2ap`."""
    return S2ap(options)
