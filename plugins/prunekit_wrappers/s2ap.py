"""Sharpness-aware learning of scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prunekit import UserError
from prunekit.contexts import NetworkContext
from prunekit.contracts import Loss
from prunekit.steps import Now
from prunekit_wrappers import S2apOptions
from prunekit_wrappers.awp import go_nearby


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
        gradients = {n: s.grad for n, s in now.scores.items() if s.grad is not None}
        return go_nearby(go, self.options.gamma, now.scores, gradients, {})


def build(options: S2apOptions, context: NetworkContext) -> S2ap:
    """Build the wrapper `s2ap`."""
    return S2ap(options)
