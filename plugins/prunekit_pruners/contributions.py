"""What each weight contributes to a lower loss, by gradients (movement, FaShapley)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, count, islice

import torch
from torch import Tensor
from torch.nn import functional as F

from prunekit.contexts import PrunerContext
from prunekit.contracts import Clock, Scores
from prunekit.evaluation import Standing
from prunekit.steps import Pruner
from prunekit_pruners import FaShapleyOptions, MovementOptions

# Of a long training, after all that grows over its first epochs.
END = Clock(10**6, 10**6, 10**6, 10**6)


def measure_contributions(
    context: PrunerContext, scales: Sequence[float], batches: int | None
) -> dict[str, Tensor]:
    """-dL/dw(t w) * w of every prunable weight: the mean over scales t, summed over batches.

    L is the stage's objective as it is at the end of a training, or the cross-entropy on clean
    images where the stage has none. Without `batches` there is an epoch of them. The result has the
    keys and shapes of `context.weights`. Weights, gradients, buffers and modes of the network are
    afterwards as they were.
    """
    model, named = context.model, dict(context.model.named_parameters())
    weights = [named[name] for name in context.weights]
    before, standing = list(context.weights.values()), Standing(model)
    found = [torch.zeros_like(weight) for weight in before]
    try:
        for x, y in context.batches() if batches is None else _take(context, batches):
            for scale in scales:
                for weight, start in zip(weights, before, strict=True):
                    weight.data.copy_(start * scale)
                if context.objective is None:
                    loss = F.cross_entropy(model(x), y)
                else:
                    loss = context.objective(x, y, END).value
                gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
                for total, gradient, start in zip(found, gradients, before, strict=True):
                    total.sub_(gradient * start / len(scales))
    finally:
        standing.restore()
    return dict(zip(context.weights, found, strict=True))


def _take(context: PrunerContext, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """So many batches, of as many epochs as they take."""
    return islice(chain.from_iterable(context.batches() for _ in count()), batches)


def build_fashapley(options: FaShapleyOptions, context: PrunerContext) -> Pruner:
    """The size of the integral of -dL/dw(t w) w over t in (0, 1], at t = 1/steps, 2/steps, ..., 1.

    The integral approximates a weight's Shapley value for the loss (Kang et al., SaTML 2023):
    summed over all weights, it is what they lower the loss by.
    """
    scales = [(step + 1) / options.steps for step in range(options.steps)]

    def score(context: PrunerContext) -> Scores:
        found = measure_contributions(context, scales, options.batches)
        return Scores({name: value.abs() for name, value in found.items()})

    return score


def build_movement(options: MovementOptions, context: PrunerContext) -> Pruner:
    """-sum of dL/dw w over batches (Sanh et al., NeurIPS 2020, section 4, at fixed weights).

    Positive where a step down the gradient moves a weight away from zero.
    """
    return lambda context: Scores(measure_contributions(context, [1.0], options.batches))
