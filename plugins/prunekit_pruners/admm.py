"""Weights that a penalty draws to the nearest sparse ones (ADMM)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunekit import LearnedWeights, select_masks
from prunekit.contexts import PrunerContext
from prunekit.contracts import Clock, Scores
from prunekit.steps import Pruner
from prunekit_pruners import RadmmOptions


class Admm(LearnedWeights):
    """W trains on the objective + sum of rho / 2 ||W - Z + U||^2 (Ye et al., ICCV 2019).

    At first Z = P(W) and U = 0. After each round but the last, Z = P(W + U), U = U + W - Z and
    rho = growth * rho, where the projection P sets to zero what the stage's budget removes of its
    argument. Buffers of the parts: `target` (Z) and `dual` (U). The first part has `rho`, too, and
    `round`, the number of rounds done.
    """

    def __init__(self, *given: Any, options: RadmmOptions, **more: Any) -> None:
        super().__init__(*given, **more)
        self._options = options
        weights = {name: self.whole(name) for name in self.parts}
        targets = self._project(weights, Clock(0, 1, 0, 1))
        for name, part in self.parts.items():
            part.register_buffer("target", targets[name])
            part.register_buffer("dual", torch.zeros_like(weights[name]))
        part = next(iter(self.parts.values()))
        part.register_buffer("rho", part.get_buffer("dual").new_tensor(options.rho))
        part.register_buffer("round", torch.tensor(0))
        self._rho, self._round = part.get_buffer("rho"), part.get_buffer("round")

    def _project(self, weights: dict[str, Tensor], clock: Clock) -> dict[str, Tensor]:
        factor = 1.0 if self.schedule is None else self.schedule(clock)
        selection = replace(self.selection, sparsity=self.selection.sparsity * factor)
        magnitudes = Scores({name: weight.abs() for name, weight in weights.items()})
        masks = select_masks(magnitudes, selection, self.alive)
        return {name: weight.masked_fill(~masks[name], 0) for name, weight in weights.items()}

    def prepare(self, clock: Clock) -> None:
        """Move Z, U and rho where a round is over."""
        done = clock.step * self._options.rounds // clock.steps
        if int(self._round) >= done:
            return
        sums = {n: self.whole(n) + part.get_buffer("dual") for n, part in self.parts.items()}
        for name, target in self._project(sums, clock).items():
            self.parts[name].get_buffer("target").copy_(target)
            self.parts[name].get_buffer("dual").copy_(sums[name] - target)
        self._rho.mul_(self._options.growth)
        self._round.fill_(done)

    def penalty(self, clock: Clock) -> dict[str, Tensor]:
        """The augmented Lagrangian's: what is added to the loss."""
        far = []
        for name, part in self.parts.items():
            gap = self.trained[name] - part.get_buffer("target") + part.get_buffer("dual")
            far.append(self._rho / 2 * gap.square().sum())
        return {"admm": torch.stack(far).sum()}


def build(options: RadmmOptions, context: PrunerContext) -> Pruner:
    """Build the pruner `radmm`."""

    def prune(context: PrunerContext) -> Scores:
        start = Scores({name: weight.abs() for name, weight in context.weights.items()})
        return context.train(context.attach(start, Admm, options=options))

    return prune
