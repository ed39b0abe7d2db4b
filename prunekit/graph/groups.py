"""Groups: the channels that one decision removes, wherever the network has them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.contracts import Masks
from prunekit.graph.channels import Decisions
from prunekit.graph.leaking import find_leaks
from prunekit.graph.products import find_rule
from prunekit.graph.tracing import Tracer


@dataclass(frozen=True)
class Group:
    """Channels of one or several layers that go together: `size` decisions, or units.

    Each map has, by name, the unit of every entry along one dimension, -1 where it is of another
    group or of none. Tensors are int64 on the CPU.
    """

    size: int
    weights: Mapping[str, Tensor]
    """Weight -> unit (O,) of each output channel. The first name is the group's."""
    vectors: Mapping[str, Tensor]
    """Bias, scale or shift -> unit (C,) of each entry; they go with the channels."""
    gates: Mapping[str, tuple[int, Tensor]]
    """Module -> (dimension of channels in its output, unit (C,) of each): together all readers of
    the group's channels see them only through these."""
    readers: Mapping[str, Tensor]
    """Weight -> unit (I,) that each of its inputs reads."""
    scales: frozenset[str] = frozenset()
    """Those of the vectors that multiply; the others are added."""

    @property
    def name(self) -> str:
        return next(iter(self.weights))


def alone(weights: Mapping[str, Tensor]) -> list[Group]:
    """Every weight as a group by itself, for where there is no network around it."""
    return [Group(len(w), {n: torch.arange(len(w))}, {}, {}, {}) for n, w in weights.items()]


def find_groups(
    model: nn.Module, example: Tensor, weights: Collection[str]
) -> tuple[list[Group], dict[str, str]]:
    """(groups of the output channels of these weights, reasons why others of them stay dense).

    `example` (1, C, H, W) is sent through the model once, in eval mode. When a unit's entries of
    weights and vectors are zero, so is what readers take of it, whatever the image.
    """
    tracer = Tracer(model, weights, find_rule)
    tracer.run(model, example)
    decisions, reasons = tracer.decisions, tracer.decisions.reasons()
    roots = {n: decisions.roots(c).long().cpu() for n, c in tracer.channels.items()}
    units: list[dict[int, int]] = []
    members: list[list[str]] = []
    for names in _join_layers({name: own.tolist() for name, own in roots.items()}):
        members.append(names)
        found = dict.fromkeys(root for name in names for root in roots[name].tolist())
        units.append({root: unit for unit, root in enumerate(found)})
    index = _Index(decisions, units)
    own_units = index.split(tracer.channels)
    gates = index.split({n: tracer.sites[n][1] for n in tracer.seen if n in tracer.sites})
    readers = index.split(tracer.readers)
    vectors = index.split(tracer.collect_followed())
    groups: list[Group] = []
    dense: dict[str, str] = {}
    for number, (names, known) in enumerate(zip(members, units, strict=True)):
        why = next((reasons[root] for root in known if root in reasons), "")
        if not why and len(known) < 2:
            why = "all its channels would be one decision"
        if not why and not gates[number]:
            why = "no layer reads it"
        if why:
            dense |= dict.fromkeys(names, why)
            continue
        stand = {n: (tracer.sites[n][0], c) for n, c in gates[number].items()}
        own, along, reads = own_units[number], vectors[number], readers[number]
        groups.append(Group(len(known), own, along, stand, reads, tracer.scales & along.keys()))
    leaks = find_leaks(model, example, [group.gates for group in groups])
    for number, name in leaks.items():
        why = f"{name} would enlarge what gates let through"
        dense |= dict.fromkeys(groups[number].weights, why)
    return [group for number, group in enumerate(groups) if number not in leaks], dense


def _join_layers(roots: Mapping[str, Sequence[int]]) -> list[list[str]]:
    """Weights that share a decision, also by way of others, in one list."""
    joined: list[list[str]] = []
    of_root: dict[int, list[str]] = {}
    for name, own in roots.items():
        lists = {id(found): found for root in own if (found := of_root.get(root))}
        together = [*(n for found in lists.values() for n in found), name]
        joined = [found for found in joined if id(found) not in lists]
        joined.append(sorted(together, key=list(roots).index))
        of_root |= {root: joined[-1] for n in together for root in roots[n]}
    return sorted(joined, key=lambda names: list(roots).index(names[0]))


class _Index:
    """Channels to groups and their units."""

    def __init__(self, decisions: Decisions, units: Sequence[Mapping[int, int]]) -> None:
        self.decisions, self.count = decisions, len(units)
        size = 1 + max((root for found in units for root in found), default=0)
        # The last entry is for what has no channel.
        self.group, self.unit = torch.full((2, size + 1), -1)
        for number, found in enumerate(units):
            places = torch.tensor(list(found), dtype=torch.int64)
            self.group[places], self.unit[places] = number, torch.tensor(list(found.values()))

    def split(self, channels: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Of each group, the units of the tensors that have any of its channels."""
        found: list[dict[str, Tensor]] = [{} for _ in range(self.count)]
        for name, values in channels.items():
            roots = self.decisions.roots(values).long().cpu().clamp_min(-1)
            for number in self.group[roots].unique().tolist():
                if number >= 0:
                    inside = self.group[roots] == number
                    found[number][name] = torch.where(inside, self.unit[roots], -1)
        return found


def follow(masks: Masks, groups: Sequence[Group]) -> Masks:
    """The masks (C,) of the vectors that lose an entry when the channels of their unit are gone."""
    found: Masks = {}
    for group in groups:
        if kept := {name: masks[name] for name in group.weights if name in masks}:
            alive = join_units(group, kept)
            for name, units in group.vectors.items():
                mask = found.setdefault(name, alive.new_ones(len(units)))
                units = units.to(alive.device)
                mask &= alive[units] | (units < 0)
    return found


def _is_plain(group: Group, names: Collection[str]) -> bool:
    """Whether the units are the channels of one weight, in its own order."""
    return len(names) == 1 and all(
        torch.equal(group.weights[name], torch.arange(group.size)) for name in names
    )


def join_units(group: Group, masks: Masks) -> Tensor:
    """Masks (O, ...) of its weights -> (size,) whether anything of a unit is kept."""
    first = next(iter(masks.values()))
    if _is_plain(group, masks):
        return first.flatten(1).any(1)
    alive = torch.zeros(group.size, dtype=torch.bool, device=first.device)
    for name, mask in masks.items():
        alive[group.weights[name].to(alive.device)[mask.flatten(1).any(1)]] = True
    return alive


def average_units(group: Group, channels: Mapping[str, Tensor]) -> Tensor:
    """Values (O,) of its weights' channels -> (size,) their mean over the channels of a unit."""
    first = next(iter(channels.values()))
    if _is_plain(group, channels):
        return first
    total, counts = torch.zeros_like(first[:1]).repeat(group.size), torch.zeros(group.size)
    for name, values in channels.items():
        units = group.weights[name]
        there, many = units.unique(return_counts=True)
        counts[there] += many
        if bool((many == many[0]).all()):
            # Sums of equal length, in one order on every device.
            order = units.argsort(stable=True).to(values.device)
            values, units = values[order].unflatten(0, (len(there), -1)).sum(1), there
        else:
            # A GPU would add them in any order.
            total, values = total.cpu(), values.cpu()
        total = total.index_add(0, units.to(values.device), values).to(first.device)
    return total / counts.to(total)
