"""How layers share the sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from prunekit import NoOptions, share_out, uniform
from prunekit.contexts import Context
from prunekit.errors import RunError
from prunekit.steps import Budget, Layers


def build_layer(options: NoOptions, context: Context) -> Budget:
    """The same fraction of every layer."""
    return uniform


def build_global(options: NoOptions, context: Context) -> Budget:
    """The scores as they are: the best of all layers are kept."""
    return lambda layers: layers.scores


def build_lamp(options: NoOptions, context: Context) -> Budget:
    """LAMP scores of every layer, which compare across layers (Lee et al., ICLR 2021)."""
    return lambda layers: {n: lamp(s, layers.alive.get(n)) for n, s in layers.scores.items()}


def build_erk(options: NoOptions, context: Context) -> Budget:
    """Whole counts that follow the Erdos-Renyi-Kernel densities (Evci et al., ICML 2020)."""

    def share(layers: Layers) -> dict[str, int]:
        sizes = {name: score.numel() for name, score in layers.scores.items()}
        return share_out(spread_erk(layers.shapes, 1 - layers.sparsity), sizes, layers.total)

    return share


def build_igq(options: NoOptions, context: Context) -> Budget:
    """Whole counts that follow `spread_igq`."""

    def share(layers: Layers) -> dict[str, int]:
        sizes = {name: score.numel() for name, score in layers.scores.items()}
        return share_out(spread_igq(sizes, layers.total), sizes, layers.total)

    return share


def lamp(values: Tensor, alive: Tensor | None = None) -> Tensor:
    """LAMP scores: s_u^2 / sum of s_v^2 over all v of the layer with |s_v| >= |s_u|, u included.

    Lee et al., ICLR 2021, equation 4. They compare across layers; what is not alive counts 0.

    Raises `RunError` for negative scores: their squares would be kept first.
    """
    flat = (values if alive is None else values.masked_fill(~alive, 0)).flatten().double()
    if flat.min() < 0:
        raise RunError("budget 'lamp' wants scores from 0 on, some are negative; choose another")
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


def spread_igq(sizes: Mapping[str, int], total: int) -> dict[str, float]:
    """Density of each layer of n units: 1 / (f n + 1), so that n / (f n + 1) units are kept.

    f is found by bisection: with it, `total` units are kept in all. Chen et al., ICLR 2022.
    """

    def spread(f: float) -> dict[str, float]:
        return {name: 1 / (f * size + 1) for name, size in sizes.items()}

    low, high = 0.0, len(sizes) / total  # a layer keeps less than 1 / f
    for _ in range(100):
        f = (low + high) / 2
        above = sum(density * sizes[name] for name, density in spread(f).items()) > total
        low, high = (f, high) if above else (low, f)
    return spread(high)
