"""Dropping and growing, exactly as many of each as asked for; SET, RigL and Flying Bird."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil, cos, pi

import torch
from torch import Tensor

from prunekit import exact
from prunekit.contexts import NetworkContext
from prunekit.contracts import Clock, Scores
from prunekit.steps import Moment, Rewirer
from prunekit_rewirers import FlyingBirdOptions, RiglOptions, SetOptions


def drop_and_grow(
    moment: Moment, changes: Mapping[str, tuple[int, int]], growth: str
) -> dict[str, Tensor]:
    """Scores by weight, above 0 for what is kept from now on and 0 elsewhere.

    `changes` has for each layer how many weights are dropped, and how many are grown. The smallest
    |w| of the mask go; of all that are then free, those just dropped included, the ones with the
    largest |gradient| come, or those that a random permutation puts first. Ties go by position.

    What is new has the highest scores, the others have |w|.
    """
    top = 1 + max(float(weight.abs().max()) for weight in moment.weights.values())
    values = {}
    for name, weight in moment.weights.items():
        dropped, grown = changes[name]
        size, inside = weight.abs().flatten(), moment.masks[name].flatten()
        order = size.masked_fill(~inside, float("inf")).argsort(stable=True)
        stay = order[dropped : int(inside.sum())]
        free = torch.ones_like(inside).index_fill_(0, stay, False)
        if growth == "gradient":
            wanted = moment.gradients[name].abs().flatten()
        else:
            wanted = torch.randperm(size.numel(), generator=moment.generator).to(size.device)
        order = wanted.masked_fill(~free, -1).argsort(descending=True, stable=True)
        new = order[: min(grown, int(free.sum()))]
        scores = measure(weight, ~free.view_as(weight)).flatten()
        values[name] = scores.index_fill_(0, new, top).view_as(weight)
    return values


def measure(weight: Tensor, mask: Tensor) -> Tensor:
    """|w|, above 0 for what the mask keeps, also where w is 0, and 0 elsewhere."""
    return weight.abs().clamp_min(torch.finfo(weight.dtype).tiny).masked_fill(~mask, 0)


def choose_first(moment: Moment, start: str | None) -> Scores:
    """|w|, or random numbers of which those that an earlier stage kept are the largest."""
    values = {}
    for name, weight in moment.weights.items():
        drawn = torch.rand(weight.shape, generator=moment.generator).to(weight.device)
        trained = moment.trained if start is None else start == "magnitude"
        values[name] = weight.abs() if trained else moment.masks[name] + drawn
    return Scores(values)


def anneal(first: float, last: float, done: float) -> float:
    """last + (first - last) (1 + cos(pi done)) / 2, for `done` in [0, 1]."""
    return last + (first - last) / 2 * (1 + cos(pi * min(1.0, done)))


@dataclass(frozen=True)
class Exchange:
    """Every so many steps each layer drops and grows the same number of weights.

    Where the sparsity rises, the smallest |w| go first, down to what the step keeps, and of that a
    part is exchanged (GraNet, Liu et al., NeurIPS 2021, section 4.1): among what is free then are
    the weights that went first, as there.
    """

    every: Callable[[Clock], int]
    count: Callable[[Clock, int], int]
    """Clock and number of kept weights -> how many of them are exchanged."""
    growth: str
    start: str | None
    until: float = 1.0

    def due(self, clock: Clock) -> bool:
        """Whether to rewire in this step."""
        return clock.step % self.every(clock) == 0 and clock.fraction < self.until

    def __call__(self, moment: Moment) -> Scores:
        """The next masks; the last step of a stage grows nothing that could not be trained."""
        if moment.first:
            return choose_first(moment, self.start)
        before = {n: measure(weight, moment.masks[n]) for n, weight in moment.weights.items()}
        left, changes = {}, {}
        for name, mask in moment.select(Scores(before)).items():
            left[name] = mask & moment.masks[name]
            kept = int(left[name].sum())
            n = 0 if moment.final else self.count(moment.clock, kept)
            changes[name] = (n, n + int(mask.sum()) - kept)  # budgets may ask for more than before
        return Scores(drop_and_grow(replace(moment, masks=left), changes, self.growth))


def build_set(options: SetOptions, context: NetworkContext) -> Rewirer:
    """Drop zeta of the weights, grow as many at random (Mocanu et al. 2018, algorithm 1)."""
    return Exchange(
        every=lambda clock: options.every or max(2, clock.steps // clock.epochs),
        count=lambda clock, kept: int(exact(options.fraction) * kept),
        growth="random",
        start=options.start,
    )


def build_rigl(options: RiglOptions, context: NetworkContext) -> Rewirer:
    """Evci et al. 2020, algorithm 1: of every n kept weights f_t n are exchanged, rounded down,
    f_t = fraction / 2 (1 + cos(pi t / T_end)), for the largest |gradient|."""

    def count(clock: Clock, kept: int) -> int:
        return int(anneal(options.fraction, 0, clock.fraction / options.until) * kept)

    return Exchange(lambda clock: options.every, count, "gradient", options.start, options.until)


def build_flyingbird(options: FlyingBirdOptions, context: NetworkContext) -> Rewirer:
    """Chen et al., ICLR 2022: a part p_t of the weights is exchanged, rounded up; see `anneal`."""

    def count(clock: Clock, kept: int) -> int:
        return ceil(anneal(options.fraction, options.last, clock.fraction) * kept)

    return Exchange(lambda clock: options.every, count, options.growth, options.start)
