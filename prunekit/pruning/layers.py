"""Which weights of a network can be pruned."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import RunError
from prunekit.graph.watching import watch_weights

WEIGHTS = ("weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_weight")
"""Names of the parameters that can be pruned, in the order that layers register them."""

FAULTS = "pruning_faults"
"""The attribute of a layer that was watched, in its network or alone: name of its weight -> why it
cannot be pruned, or ""."""

PLAIN = (nn.Conv2d, nn.Linear, nn.MultiheadAttention)


def _find_own(module: nn.Module) -> tuple[str, ...]:
    """Names of the weights of one layer that are pruned if they multiply as they are."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        names: tuple[str, ...] = WEIGHTS[:1]
    elif isinstance(module, nn.MultiheadAttention):
        names = WEIGHTS[1:]
    else:
        return ()
    return tuple(name for name in names if module._parameters.get(name) is not None)


def _find_faults(module: nn.Module) -> dict[str, str]:
    """Name of a weight of one layer -> why it cannot be pruned; "" if it can."""
    names = _find_own(module)
    seen = module.__dict__.get(FAULTS, {})
    if not seen.keys() >= set(names) and not _is_plain(module):
        # Without images, at least a layer of another class is tried alone, and once.
        seen = module.__dict__[FAULTS] = {**_watch_alone(module, names), **seen}
    return {name: seen.get(name, "") for name in names}


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer computes what torch's own class does."""
    methods = ("forward", "_conv_forward")
    return not any(m in module.__dict__ for m in methods) and any(
        isinstance(module, c)
        and all(getattr(type(module), m, None) is getattr(c, m, None) for m in methods)
        for c in PLAIN
    )


def _watch_alone(module: Any, names: Sequence[str]) -> dict[str, str]:
    weights = {name: module._parameters[name] for name in names}
    like = weights[names[0]].detach()
    if isinstance(module, nn.Conv2d):
        sizes = zip(module.kernel_size, module.dilation, strict=True)
        inputs = [like.new_ones(2, module.in_channels, *((k - 1) * d + 2 for k, d in sizes))]
    elif isinstance(module, nn.Linear):
        inputs = [like.new_ones(2, module.in_features)]
    else:
        widths = (module.embed_dim, module.kdim, module.vdim)
        inputs = [like.new_ones(2, 2, width) for width in widths]
    return watch_weights(module, weights, lambda: module(*inputs), inputs)


def watch_network(model: nn.Module, shape: Sequence[int]) -> None:
    """Send two images of this shape (C, H, W) through, and have the layers remember what was seen.

    From then on the network and its copies leave weights dense whose zeros would be none of what
    multiplies. Weights, buffers and random generators are as before.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    owners = [(module, own) for module in model.modules() for own in _find_own(module)]
    weights = {names[w]: w for module, own in owners if (w := module._parameters[own]) is not None}
    if not weights:
        return
    like = next(iter(weights.values())).detach()
    draw = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    images = draw.to(like.device)
    faults = watch_weights(model, weights, lambda: model(images), [images])
    for module, own in owners:
        weight = module._parameters[own]
        assert weight is not None
        module.__dict__.setdefault(FAULTS, {})[own] = faults[names[weight]]


def find_weights(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of one layer, not of its children, that can be pruned.

    The weight of a Conv2d or Linear, and the projections of a MultiheadAttention, packed or not, as
    long as they multiply as they are: see `watch_network`.
    """
    return tuple(name for name, fault in _find_faults(module).items() if not fault)


def find_faults(model: nn.Module) -> dict[str, str]:
    """Parameter name -> why it cannot be pruned, "" where it can, of the layers that are pruned.

    A weight that several layers share is there once, under the model's name for it, and has to
    suit all of them.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, str] = {}
    for module in model.modules():
        for own, fault in _find_faults(module).items():
            weight = module._parameters[own]
            assert weight is not None
            found[names[weight]] = found.get(names[weight]) or fault
    return found


def find_prunable(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, Tensor]:
    """Parameter name -> weight that can be pruned, as `find_weights` says, in the model's order.

    A weight that several layers share is there once, under the model's name for it. Left out are
    weights that are no parameter but computed from others, and names that match a pattern of
    `exclude`.

    Raises `RunError` where nothing is left to prune, or a pattern matches nothing.
    """
    faults = find_faults(model)
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in faults):
            advice = f"there are: {', '.join(faults)}"
            if any(name.startswith(f"{pattern}.") for name in faults):
                advice = f'write "{pattern}.*"'
            raise RunError(f"exclude pattern {pattern!r} matches no prunable weight; {advice}")
    kept = [n for n, f in faults.items() if not f and not any(fnmatchcase(n, p) for p in exclude)]
    if not kept:
        told = "the network has no Conv2d or Linear left"
        if not all(faults.values()):
            told = "exclude, or the network's leave_dense, takes all of it: "
            told += f"{', '.join(exclude)}; name less"
        if any(faults.values()):
            told += f"; left dense: {describe_faults(model)}"
        raise RunError(f"there is nothing to prune: {told}")
    named = dict(model.named_parameters())
    return {name: named[name] for name in kept}


def describe_faults(model: nn.Module, among: Sequence[str] | None = None) -> str:
    """The weights that would be pruned if they multiplied as they are; "" where there are none."""
    found = {name: f for name, f in find_faults(model).items() if among is None or name in among}
    return ", ".join(f"{name} ({fault})" for name, fault in found.items() if fault)


def find_unprunable(model: nn.Module) -> dict[str, str]:
    """Parameter name -> class of its layer, of every matrix or kernel that cannot be pruned."""
    owners: dict[Tensor, nn.Module] = {}
    for module in model.modules():
        owners |= {p: module for p in module._parameters.values() if p is not None}
    prunable = {name for name, fault in find_faults(model).items() if not fault}
    return {
        name: type(owners[parameter]).__name__
        for name, parameter in model.named_parameters()
        # Vectors, also those with axes of one entry for broadcasting, are none.
        if sum(size > 1 for size in parameter.shape) > 1 and name not in prunable
    }


def tell_unprunable(model: nn.Module) -> list[str]:
    """What a stage that prunes says of the weights that it cannot."""
    faults, others = find_faults(model), find_unprunable(model).items()
    kinds = ", ".join(f"{name} ({layer})" for name, layer in others if name not in faults)
    told = [f"cannot be pruned, by the kind of their layer: {kinds}"] if kinds else []
    changed = describe_faults(model)
    ours = "left dense, as their zeros would be none of the network's"
    return [*told, *([f"{ours}: {changed}"] if changed else [])]
