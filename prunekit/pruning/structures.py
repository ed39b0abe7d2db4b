"""Structures: which weights are kept or removed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prunekit.contracts import Masks, read_ratio


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


NORMS = nn.modules.batchnorm._BatchNorm


def find_followers(model: nn.Module, example: Tensor) -> dict[str, list[str]]:
    """Weight name -> vectors with an entry for each of its output channels.

    These are its own bias and the scale and shift of a batch normalization that takes nothing but
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


def follow(masks: Masks, followers: Mapping[str, Sequence[str]]) -> Masks:
    """The masks (O,) of the vectors that lose an entry when a channel of their weight is gone."""
    return {
        vector: masks[name].flatten(1).any(1)
        for name, vectors in followers.items()
        if name in masks
        for vector in vectors
    }


def find_structured(
    weights: Mapping[str, Tensor], structure: str, called: Sequence[str]
) -> list[str]:
    """Names of the weights that the structure suits; the others stay dense.

    n:m wants inputs in whole groups. Channels want a layer that is called (`called`, in the order
    of the forward pass), and not as the last one: its outputs are the classes.
    """
    return [
        name
        for name, weight in weights.items()
        if fits(weight, structure) and (structure != "channel" or name in called[:-1])
    ]
