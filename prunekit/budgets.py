"""Budgets: how much each layer keeps. Structures: which weights are kept or removed together."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from prunekit.errors import RunError
from prunekit.settings import read_ratio


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


NORMS = nn.modules.batchnorm._BatchNorm


def find_followers(model: nn.Module, example: Tensor) -> dict[str, list[str]]:
    """Weight name -> vectors with an entry for each of its output channels.

    These are its own bias and the scale and shift of a batch normalisation that takes nothing but
    its output: when a channel goes they go with it. `example` (1, C, H, W) is sent through once.
    """
    names = {module: name for name, module in model.named_modules()}
    made: dict[int, str] = {}
    kept: list[Tensor] = []
    followers: dict[str, list[str]] = {}

    def join(*parts: str) -> str:
        return ".".join(filter(None, parts))

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        name = names[module]
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = join(name, "weight")
            followers[weight] = [join(name, "bias")] if module.bias is not None else []
            made[id(output)] = weight
            kept.append(output)  # alive, so that no other tensor gets its id
        elif isinstance(module, NORMS) and module.affine and id(inputs[0]) in made:
            followers[made[id(inputs[0])]] += [join(name, "weight"), join(name, "bias")]

    hooks = [module.register_forward_hook(watch) for module in model.modules()]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return followers
