"""Where learned scores start."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod, sqrt

import torch
from torch import Tensor, nn

from prunekit.contracts import Context
from prunekit_pruners import Start
from prunekit_pruners.sensitivity import measure_sensitivity

Draw = Callable[..., Tensor]

DRAWS: dict[str, Draw] = {
    "kaiming-normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "kaiming-uniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
    "xavier-normal": partial(nn.init.xavier_normal_, gain=sqrt(2)),
    "xavier-uniform": partial(nn.init.xavier_uniform_, gain=sqrt(2)),
}
"""Random starts, each in place; variances 2 / fan_in, and 4 / (fan_in + fan_out) of Xavier's."""


def start_scores(start: Start, context: Context) -> dict[str, Tensor]:
    """The first score of every prunable weight; random ones come from the context's generator."""
    if start == "scaled":
        return {name: scale(weight) for name, weight in context.weights.items()}
    if start == "snip":
        return {name: scale(value) for name, value in measure_sensitivity(context).items()}
    return {
        name: draw(DRAWS[start], weight, context.generator)
        for name, weight in context.weights.items()
    }


def scale(values: Tensor) -> Tensor:
    """sqrt(6 / fan_in) v / max|v|: scores that start in the order of the values.

    HYDRA, section 3 ("scaled initialisation"), where the values are the weights; fan_in is the
    number of inputs of an output unit. A layer of zeros starts at zero.
    """
    fan_in = prod(values.shape[1:])
    largest = values.detach().abs().max()
    return sqrt(6 / fan_in) * values.detach() / largest.clamp_min(torch.finfo(values.dtype).tiny)


def draw(how: Draw, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Random scores for a weight, drawn on the CPU, so that they are the same on every device."""
    return how(torch.empty(weight.shape, dtype=weight.dtype), generator=generator).to(weight.device)
