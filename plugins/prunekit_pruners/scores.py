"""The pruners: each says how much every weight matters."""

from __future__ import annotations

from math import prod, sqrt

import torch
from torch import Tensor

from prunekit import NoOptions
from prunekit.contracts import Context, Pruner, Scores


def scaled_start(weight: Tensor) -> Tensor:
    """sqrt(6 / fan_in) w / max|w|: scores that start in the order of the weights.

    HYDRA, section 3 ("scaled initialisation"); fan_in is the number of inputs of an output unit.
    A layer of zeros starts at zero.
    """
    fan_in = prod(weight.shape[1:])
    largest = weight.detach().abs().max()
    return sqrt(6 / fan_in) * weight.detach() / largest.clamp_min(torch.finfo(weight.dtype).tiny)


def build_score(options: NoOptions, context: Context) -> Pruner:
    """Scores trained on the stage's objective from the scaled start."""

    def score(context: Context) -> Scores:
        start = {name: scaled_start(weight) for name, weight in context.weights.items()}
        return context.learn(Scores(start, layerwise=True))

    return score


def build_lwm(options: NoOptions, context: Context) -> Pruner:
    """|w|."""
    return lambda context: Scores({n: w.detach().abs() for n, w in context.weights.items()})


def build_random(options: NoOptions, context: Context) -> Pruner:
    """Uniform on [0, 1)."""

    def score(context: Context) -> Scores:
        return Scores(
            {
                name: torch.rand(weight.shape, generator=context.generator).to(weight.device)
                for name, weight in context.weights.items()
            }
        )

    return score
