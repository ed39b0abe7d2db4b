"""Structures: which weights are kept or removed together."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.contracts import read_ratio


def keep_n_of_m(values: Tensor, n: int, m: int) -> Tensor:
    """Bool mask of the n largest of every m values along the input dimension (dimension 1).

    Groups are consecutive inputs of the same output and kernel position: weights (O, I, kh, kw)
    give O * I / m * kh * kw groups.
    """
    groups = values.unflatten(1, (-1, m))
    chosen = torch.topk(groups, n, dim=2).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, chosen, True).flatten(1, 2)


def fits(weight: Tensor, structure: str) -> bool:
    """Whether the structure divides a weight: n:m wants inputs in whole groups of m."""
    ratio = read_ratio(structure)
    return ratio is None or weight.shape[1] % ratio[1] == 0


def score_channels(values: Tensor, alive: Tensor | None = None) -> Tensor:
    """Importance (O,) of the output channels: the mean over their weights that are alive."""
    if alive is None:
        return values.flatten(1).mean(1)
    counts = alive.flatten(1).sum(1).clamp_min(1)
    return values.masked_fill(~alive, 0).flatten(1).sum(1) / counts
