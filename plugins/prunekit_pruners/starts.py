"""The initial values of learned scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod, sqrt

import torch
from torch import Tensor, nn

from prunekit.contexts import PrunerContext
from prunekit_pruners import Start
from prunekit_pruners.sensitivity import measure_sensitivity

Draw = Callable[..., Tensor]

DRAWS: dict[str, Draw] = {
    "kaiming-normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "kaiming-uniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
    "xavier-normal": partial(nn.init.xavier_normal_, gain=sqrt(2)),
    "xavier-uniform": partial(nn.init.xavier_uniform_, gain=sqrt(2)),
}
"""Random starts, drawn in place, with variance 2 / fan_in (Xavier: 4 / (fan_in + fan_out))."""


def start_scores(start: Start, context: PrunerContext) -> dict[str, Tensor]:
    """Initial scores with the keys and shapes of `context.weights`.

    Random scores are drawn from the context's generator.
    """
    if start == "scaled":
        return {name: scale(weight) for name, weight in context.weights.items()}
    if start == "snip":
        return {name: scale(value) for name, value in measure_sensitivity(context).items()}
    return {
        name: draw(DRAWS[start], weight, context.generator)
        for name, weight in context.weights.items()
    }


def scale(values: Tensor) -> Tensor:
    """sqrt(6 / fan_in) v / max|v|: scores in the order of the values v, which have any shape.

    This is HYDRA's "scaled initialization" (section 3) if v are weights; fan_in is the number of
    inputs of an output unit. A layer of zeros gets scores of zero.
    """
    fan_in = prod(values.shape[1:])
    largest = values.detach().abs().max()
    return sqrt(6 / fan_in) * values.detach() / largest.clamp_min(torch.finfo(values.dtype).tiny)


def draw(how: Draw, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Random scores for a weight, drawn on the CPU so that they are the same on every device."""
    return how(torch.empty(weight.shape, dtype=weight.dtype), generator=generator).to(weight.device)
