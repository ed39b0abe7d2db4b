"""Scores -> masks: which weights are kept, under a budget and a structure. For every pruner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.contracts import Masks, Scores, read_ratio
from prunekit.errors import RunError
from prunekit.graph.channels import align
from prunekit.graph.groups import Group, alone, average_units, join_units
from prunekit.pruning.budgets import count_kept, uniform
from prunekit.pruning.structures import keep_n_of_m, score_channels
from prunekit.steps import Budget, Layers


@dataclass(frozen=True)
class Selection:
    """How much is kept (`sparsity` is removed), how layers share it, and what goes together.

    `compares` says that the budget compares the scores of layers. structure: "element", "channel"
    or "n:m", whose ratio is the budget. Channels are those of `groups`, by default each layer's.
    """

    sparsity: float
    budget: Budget = uniform
    structure: str = "element"
    compares: bool = False
    groups: Sequence[Group] = ()

    def group(self, weights: Mapping[str, Tensor]) -> Sequence[Group]:
        """The groups of these weights."""
        return self.groups or alone(weights)


def select_masks(
    scores: Scores, selection: Selection, alive: Mapping[str, Tensor] | None = None
) -> Masks:
    """Keep the highest scores, exactly as many as the budget, or `scores.keep`, says.

    Sees all layers at once. Which of several tied scores survive is arbitrary, but the same for
    the same scores. A weight that is not `alive` (pruned by an earlier stage) is never kept.
    Channels count as wholes, and once for all layers of a group, which goes by the name of its
    first: what is removed of them is rounded down.
    """
    alive = {name: mask for name, mask in (alive or {}).items() if name in scores.values}
    values = {name: value.detach() for name, value in scores.values.items()}
    if selection.compares and scores.layerwise:
        values = {n: v / _root_mean_square(v, alive.get(n)) for n, v in values.items()}
    ratio = read_ratio(selection.structure)
    if ratio is not None:
        masks = {n: keep_n_of_m(_bury(v, alive.get(n)), *ratio) for n, v in values.items()}
    elif selection.structure == "channel":
        masks = _select_channels(values, scores, alive, selection)
    else:
        masks = _share(values, scores, alive, selection)
    return {n: m & alive[n] if n in alive else m for n, m in masks.items()}


def _select_channels(
    values: Mapping[str, Tensor], scores: Scores, alive: Mapping[str, Tensor], selection: Selection
) -> Masks:
    groups = selection.group(values)
    units, left = {}, {}
    for group in groups:
        own = {name: values[name] for name in group.weights}
        if len(own) > 1 and scores.layerwise and not selection.compares:
            own = {n: v / _root_mean_square(v, alive.get(n)) for n, v in own.items()}
        channels = {n: score_channels(v, alive.get(n)) for n, v in own.items()}
        units[group.name] = average_units(group, channels)
        if any(name in alive for name in own):
            whole = {n: alive.get(n, torch.ones_like(v, dtype=torch.bool)) for n, v in own.items()}
            left[group.name] = join_units(group, whole)
    chosen = _share(units, scores, left, selection)
    masks = {}
    for group in groups:
        for name, places in group.weights.items():
            value = values[name]
            kept = chosen[group.name][places.to(value.device)]
            masks[name] = align(kept, value, 0).expand_as(value)
    return masks


def count_units(masks: Masks, selection: Selection) -> dict[str, int]:
    """How many units are kept of each layer: weights, or channels of each group."""
    if selection.structure != "channel":
        return {name: int(mask.sum()) for name, mask in masks.items()}
    groups = selection.group(masks)
    return {g.name: int(join_units(g, {n: masks[n] for n in g.weights}).sum()) for g in groups}


def _bury(values: Tensor, alive: Tensor | None) -> Tensor:
    """What is not alive comes last."""
    return values if alive is None else values.masked_fill(~alive, float("-inf"))


def _share(
    units: Mapping[str, Tensor],
    scores: Scores,
    alive: Mapping[str, Tensor],
    selection: Selection,
) -> Masks:
    """Choose among units (weights or channels) under the budget."""
    units = {name: _bury(unit, alive.get(name)) for name, unit in units.items()}
    kept: Mapping[str, Any] | None = scores.keep
    total = count_kept(sum(unit.numel() for unit in units.values()), selection.sparsity)
    if kept is None:
        shapes = {name: scores.values[name].shape for name in units}
        layers = Layers(units, alive, shapes, selection.sparsity, total)
        kept = dict(selection.budget(layers))
    if any(isinstance(found, Tensor) for found in kept.values()):
        flat = [_bury(kept[name], alive.get(name)).flatten() for name in units]
        parts = keep_top(torch.cat(flat), total).split([part.numel() for part in flat])
        return {n: p.view_as(units[n]) for n, p in zip(units, parts, strict=True)}
    for name, unit in units.items():
        if not 0 <= kept[name] <= unit.numel():
            raise RunError(f"{name} cannot keep {kept[name]} of {unit.numel()}: a wrong budget")
    return {name: keep_top(unit, kept[name]) for name, unit in units.items()}


def check_scores(
    scores: Scores, weights: Mapping[str, Tensor], owner: str, *, allocates: bool
) -> None:
    """Raise `RunError` where scores do not fit the weights; `owner` is called so in messages.

    `allocates` is what its declaration says: whether the scores say what each layer keeps.
    """
    if allocates != (scores.keep is not None):
        says = "do not say" if allocates else "say"
        raise RunError(
            f"{owner}: its scores {says} what layers keep, its declaration differs; "
            "write allocates=True where Scores has keep="
        )
    for found in (scores.values, scores.values if scores.keep is None else scores.keep):
        if wrong := sorted(found.keys() ^ weights.keys()):
            raise RunError(
                f"{owner} must score every weight it is given, and no other; wrong: "
                f"{', '.join(wrong)}"
            )
    for name, value in scores.values.items():
        if not isinstance(value, Tensor):
            raise RunError(f"{owner}: the scores of {name} are a {type(value).__name__}, no tensor")
        if value.shape != weights[name].shape:
            raise RunError(
                f"{owner}: the scores of {name} are {tuple(value.shape)}, its weights "
                f"{tuple(weights[name].shape)}"
            )
        if value.isnan().any():
            raise RunError(f"{owner}: the scores of {name} hold NaN")


def check_keep(scores: Scores, selection: Selection, owner: str) -> None:
    """Raise `RunError` where `scores.keep` is not what the sparsity leaves of all units."""
    if scores.keep is None:
        return
    sizes = _size_units(scores, selection)
    unit = "channels" if selection.structure == "channel" else "weights"
    for name, size in sizes.items():
        if not 0 <= scores.keep[name] <= size:
            raise RunError(f"{owner} keeps {scores.keep[name]} of the {size} {unit} of {name}")
    if not meets(scores, selection):
        total = sum(sizes.values())
        raise RunError(
            f"{owner} keeps {sum(scores.keep[name] for name in sizes)} {unit} in all, and sparsity "
            f"{selection.sparsity:g} leaves {count_kept(total, selection.sparsity)} of {total}"
        )


def meets(scores: Scores, selection: Selection) -> bool:
    """Whether `scores.keep` adds up to what the sparsity leaves of all units."""
    sizes = _size_units(scores, selection)
    kept = sum((scores.keep or {})[name] for name in sizes)
    return kept == count_kept(sum(sizes.values()), selection.sparsity)


def _size_units(scores: Scores, selection: Selection) -> dict[str, int]:
    """How many units each layer has; channels of a group count once, for its first layer."""
    if selection.structure != "channel":
        return {name: value.numel() for name, value in scores.values.items()}
    return {group.name: group.size for group in selection.group(scores.values)}


def check_layers(masks: Masks, sparsity: float) -> None:
    """Raise `RunError` where a layer keeps nothing: the network would be cut in two."""
    for name, mask in masks.items():
        if not mask.any():
            raise RunError(
                f"sparsity {sparsity} leaves no weight of {name} ({mask.numel()} weights); lower "
                f'the sparsity, write exclude = ["{name}"], or change the budget'
            )


def keep_top(values: Tensor, kept: int) -> Tensor:
    """Bool mask of the `kept` largest values; how ties are broken depends on the values alone."""
    flat = values.detach().flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    if flat.device.type == "cpu" and flat.dtype == torch.float32 and kept:
        undecided, missing = _split_by_exponent(flat.numpy(), kept, mask.numpy())
        mask[undecided[torch.topk(flat[undecided], missing, sorted=False).indices]] = True
    else:
        mask[torch.topk(flat, kept, sorted=False).indices] = True
    return mask.view_as(values)


STRIDE = 127
"""One of so many values is looked at first; a prime, so that it meets all places of a kernel."""


def _split_by_exponent(flat: np.ndarray, kept: int, mask: np.ndarray) -> tuple[Tensor, int]:
    """Decide about nearly all values by their upper 16 bits: one step of a radix selection.

    Writes into `mask` which are surely among the `kept` largest. Returns the indices of the
    undecided, and how many of them are still missing. A sample says where about the edge is, which
    leaves a few comparisons with all values (benchmarks/selection.py).
    """
    keys = flat.view(np.int32)
    if keys.min() < 0:
        # As integers, negative floats run backwards.
        keys = keys ^ ((keys >> 31) & 0x7FFFFFFF)

    def count(high: int) -> int:
        """How many values have these upper bits, or higher ones; `mask` says which."""
        np.greater_equal(keys, high << 16, out=mask)
        return int(np.count_nonzero(mask))

    sample = keys[::STRIDE]
    place = len(sample) - 1 - kept * (len(sample) - 1) // len(keys)
    edge = int(np.partition(sample, place)[place]) >> 16
    # Looked for are the highest bits that at least `kept` values reach.
    step = 1
    while count(edge) < kept:
        edge, step = edge - step, 2 * step
    over, step = edge + 1, 1
    while count(over) >= kept:
        edge, over, step = over, over + step, 2 * step
    while over - edge > 1:
        middle = (edge + over) // 2
        edge, over = (middle, over) if count(middle) >= kept else (edge, middle)
    reached = keys >= edge << 16
    sure = count(over)
    undecided = np.flatnonzero(np.not_equal(reached, mask, out=reached))
    return torch.from_numpy(undecided), kept - sure


def _root_mean_square(values: Tensor, alive: Tensor | None) -> Tensor:
    """Of the finite values of a layer that are alive; never zero."""
    counted = values.isfinite() if alive is None else values.isfinite() & alive
    squares = torch.where(counted, values, 0).square()
    mean = squares.sum() / torch.count_nonzero(counted)
    return mean.sqrt().clamp_min(torch.finfo(values.dtype).tiny)
