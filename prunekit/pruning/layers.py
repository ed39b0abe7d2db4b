"""Which weights of a network can be pruned."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from prunekit.errors import RunError

WEIGHTS = ("weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_weight")
"""Names of the parameters that can be pruned, in the order that layers register them."""


def find_weights(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of one layer, not of its children, that can be pruned.

    The weight of a Conv2d or Linear, and the projections of a MultiheadAttention, packed or not.
    Weight-standardised layers have none: standardising revives zeros.
    """
    if isinstance(module, nn.Conv2d | nn.Linear) and "Std" not in type(module).__name__:
        names: tuple[str, ...] = WEIGHTS[:1]
    elif isinstance(module, nn.MultiheadAttention):
        names = WEIGHTS[1:]
    else:
        return ()
    return tuple(name for name in names if module._parameters.get(name) is not None)


def find_prunable(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, Tensor]:
    """Parameter name -> weight that can be pruned, as `find_weights` says, in the model's order.

    A weight that several layers share is there once, under the model's name for it. Left out are
    weights that are no parameter but computed from others, and names that match a pattern of
    `exclude`.

    Raises `RunError` where nothing is left to prune, or a pattern matches nothing.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for module in model.modules():
        for own in find_weights(module):
            weight = module._parameters[own]
            assert weight is not None
            found[names[weight]] = weight
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise RunError(
                f"exclude pattern {pattern!r} matches no prunable weight; there are: "
                f"{', '.join(found)}"
            )
    kept = {n: w for n, w in found.items() if not any(fnmatchcase(n, p) for p in exclude)}
    if not kept:
        raise RunError("there is nothing to prune: the network has no Conv2d or Linear left")
    return kept


def find_unprunable(model: nn.Module) -> dict[str, str]:
    """Parameter name -> class of its layer, of every matrix or kernel that cannot be pruned."""
    owners: dict[Tensor, nn.Module] = {}
    prunable: set[Tensor] = set()
    for module in model.modules():
        parameters = {n: p for n, p in module._parameters.items() if p is not None}
        owners |= dict.fromkeys(parameters.values(), module)
        prunable |= {parameters[name] for name in find_weights(module)}
    return {
        name: type(owners[parameter]).__name__
        for name, parameter in model.named_parameters()
        # Vectors, also those with axes of one entry for broadcasting, are none.
        if sum(size > 1 for size in parameter.shape) > 1 and parameter not in prunable
    }
