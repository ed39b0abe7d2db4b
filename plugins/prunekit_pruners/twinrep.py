"""Weights as products of twins, which weight decay drives apart into large and small ones."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import ceil, inf, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import LearnedWeights, count_units, exact, select_masks
from prunekit.contexts import PrunerContext
from prunekit.contracts import Clock, Masks, Scores
from prunekit.steps import Layers, ParamGroup, Pruner
from prunekit_pruners import TwinRepOptions
from prunekit_pruners.starts import draw


class Twins(LearnedWeights):
    """w_eff = w * a * m (Li et al., AAAI 2023), folded into w at the end.

    L2 on both factors acts on the product as L1 would: min |w|^2 + |a|^2 at a fixed w a is 2 |w a|.
    """

    def __init__(self, *given: Any, options: TwinRepOptions, **more: Any) -> None:
        super().__init__(*given, **more)
        self._options = options
        part = next(iter(self.parts.values()))
        part.register_buffer("chosen", torch.zeros((), dtype=torch.bool))
        self._chosen = part.get_buffer("chosen")

    def parameters(self) -> list[ParamGroup]:
        """The twins with a weight decay of their own, and the others."""
        (every,) = super().parameters()
        twins = {*self.trained.values(), *(part.factor for part in self.parts.values())}
        own = [p for p in every.parameters if p in twins]
        others = [p for p in every.parameters if p not in twins]
        return [ParamGroup(own, decay=self._options.decay), ParamGroup(others)]

    def prepare(self, clock: Clock) -> None:
        """Set the masks for good, where the stage has come so far."""
        if clock.fraction >= self._options.select and not self._chosen:
            for name, mask in self._choose().items():
                self.parts[name].mask.copy_(mask)
            self._chosen.fill_(True)

    def _choose(self) -> Masks:
        """One threshold for all layers on |w a|, or on the L2 norms of filters."""
        values = super().scores().values
        if self.selection.structure == "channel":
            values = {n: _norms(value) for n, value in values.items()}
        return select_masks(Scores(values), replace(self.selection, budget=self._lift), self.alive)

    def _lift(self, layers: Layers) -> dict[str, Tensor]:
        """The scores, with the best of each layer before all others: as many as its floor."""
        size = sum(score.numel() for score in layers.scores.values())
        floor = exact(self._options.floor) * layers.total / size
        lifted = {}
        for name, score in layers.scores.items():
            least = ceil(floor * score.numel())
            best = score.flatten().topk(least).indices
            lifted[name] = score.flatten().index_fill(0, best, inf).view_as(score)
        return lifted

    def scores(self) -> Scores:
        """1 for what is kept, 0 for what is not."""
        masks = {n: part.mask for n, part in self.parts.items()} if self._chosen else self._choose()
        count, groups = count_units(masks, self.selection), self.selection.group(masks)
        # Coupled layers have the count of their group.
        keep = {name: count[group.name] for group in groups for name in group.weights}
        return Scores({name: mask.float() for name, mask in masks.items()}, keep=keep)

    def settled(self, clock: Clock) -> bool:
        """Once the masks are set."""
        return bool(self._chosen)


def _norms(weight: Tensor) -> Tensor:
    """The L2 norm of each filter, at all its weights."""
    norms: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return norms.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)


def build(options: TwinRepOptions, context: PrunerContext) -> Pruner:
    """Build the pruner `twinrep`."""

    def prune(context: PrunerContext) -> Scores:
        start = {name: torch.ones_like(weight) for name, weight in context.weights.items()}
        if options.start == "kaiming-uniform":
            how = partial(nn.init.kaiming_uniform_, a=sqrt(5))  # uniform within 1 / sqrt(fan_in)
            start = {n: draw(how, w, context.generator) for n, w in context.weights.items()}
        factors = {name: nn.Parameter(value) for name, value in start.items()}
        return context.train(context.attach(Scores(start), Twins, factors=factors, options=options))

    return prune
