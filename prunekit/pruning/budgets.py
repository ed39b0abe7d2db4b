"""Budgets: how much each layer keeps."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from prunekit.errors import RunError


def lamp(values: Tensor, alive: Tensor | None = None) -> Tensor:
    """LAMP scores: s_u^2 / sum of s_v^2 over all v of the layer with |s_v| >= |s_u|, u included.

    Lee et al., ICLR 2021, equation 4. They compare across layers; what is not alive counts 0.

    Raises `RunError` for negative scores: their squares would be kept first.
    """
    if values.min() < 0:
        raise RunError("budget 'lamp' wants scores from 0 on, some are negative; choose another")
    flat = (values if alive is None else values.masked_fill(~alive, 0)).flatten().double()
    order = flat.abs().argsort()
    squares = flat[order].square()
    left = squares.flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(torch.float64).tiny)
    scores = torch.empty_like(flat)
    scores[order] = squares / left
    return scores.view_as(values)


def spread_erk(shapes: Mapping[str, torch.Size], keep: float) -> dict[str, float]:
    """Density of each layer under Erdos-Renyi-Kernel: c (in + out + kh + kw) / (in out kh kw).

    c is solved so that the kept total is `keep` times all weights; layers that would be above 1
    are dense and c is solved again (Evci et al., ICML 2020, appendix).
    """
    weights = {name: prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        budget = keep * sum(weights.values()) - sum(weights[name] for name in dense)
        sparse = [name for name in shapes if name not in dense]
        share = sum(raw[name] * weights[name] for name in sparse)
        c = budget / share if sparse else 0.0
        above = {name for name in sparse if c * raw[name] > 1}
        if not above:
            return {name: 1.0 if name in dense else c * raw[name] for name in shapes}
        dense |= above


def share_out(
    densities: Mapping[str, float], sizes: Mapping[str, int], total: int
) -> dict[str, int]:
    """Kept weights of each layer: whole numbers that follow the densities and sum to `total`."""
    exact = {name: densities[name] * sizes[name] for name in sizes}
    kept = {name: min(int(value + 1e-9), sizes[name]) for name, value in exact.items()}
    # What rounding down left over goes where most was cut off.
    for name in sorted(sizes, key=lambda n: kept[n] - exact[n]):
        if sum(kept.values()) >= total:
            break
        kept[name] += kept[name] < sizes[name]
    return kept
