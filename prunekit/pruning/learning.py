"""Learning through masks: scores of weights and gates of channels, straight through."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunekit.graph.channels import align
from prunekit.graph.groups import Group, average_units, join_units
from prunekit.graph.leaking import LEAK
from prunekit.pruning.layers import WEIGHTS, find_weights
from prunekit.pruning.straight_through import MaskedWeight


class _Part(nn.Module):
    """Trained scores of a weight, and the mask that follows them, written from outside.

    `rate` is a scalar module whose value is learned with the scores, as the keep rate of the layer:
    its gradient is the sum of those that reach the mask (HARP).
    """

    mask: Tensor

    def __init__(self, start: Tensor, rate: nn.Module | None = None) -> None:
        super().__init__()
        self.score = nn.Parameter(start.detach().clone())
        self.register_buffer("mask", torch.ones_like(start, dtype=torch.bool))
        self.rate = rate

    def soften(self, importance: Tensor) -> Tensor:
        """What the gradient of the mask goes to: the importance, and the rate."""
        return importance if self.rate is None else importance + self.rate()


class ScoredWeight(_Part):
    """Parametrization of a frozen weight by trained scores."""

    def forward(self, weight: Tensor) -> Tensor:
        rate = None if self.rate is None else self.rate()
        masked: Tensor = MaskedWeight.apply(weight.detach(), self.mask, self.score, rate)
        return masked


class TrainedWeight(nn.Module):
    """Parametrization of a weight that trains: times its factor, if it has one, under its mask."""

    mask: Tensor

    def __init__(self, mask: Tensor, factor: nn.Parameter | None = None) -> None:
        super().__init__()
        self.register_buffer("mask", mask.clone())
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        whole = weight if self.factor is None else weight * self.factor
        return whole.masked_fill(~self.mask, 0)


class ScoredChannels(_Part):
    """Trained scores of a weight whose output channels are opened and closed by gates.

    The layer itself stays whole meanwhile: what reads its weight, instead of calling the network,
    wants `effective_parameters`.
    """

    def forward(self) -> Tensor:
        """(O,) What the gradient of the gates goes to: the mean |s| of each channel."""
        return self.soften(self.score.abs().flatten(1).mean(1))


class GroupOpening(nn.Module):
    """What each unit (n,) of a group is multiplied with: 1, or `LEAK`.

    Straight through as for single weights: with the opening m_u treated as the mean |s| of unit u,
    ds = dL/dm_u sign(s) / k for the k weights of its channel, averaged over channels.
    """

    def __init__(self, group: Group, parts: Mapping[str, ScoredChannels]) -> None:
        super().__init__()
        self.group, self.names = group, list(group.weights)
        self.parts = nn.ModuleList(parts[name] for name in self.names)
        self.device = parts[self.names[0]].score.device
        self.made: Tensor | None = None
        """What all gates take, while `effective_weights` lasts."""
        self.shared = len(self.names) > 1 or len(group.gates) > 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "made": None}  # copies make their own

    def forward(self) -> Tensor:
        if self.made is not None:
            return self.made
        scored: Any = dict(zip(self.names, self.parts, strict=True))
        soft = average_units(self.group, {name: part() for name, part in scored.items()})
        kept = join_units(self.group, {name: part.mask for name, part in scored.items()})
        return kept.to(soft.dtype).clamp_min(LEAK) + soft - soft.detach()


class ChannelGate(nn.Module):
    """Multiplies the output of a module, along its channels, with the openings of their groups."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.homes = nn.ModuleList()
        """Those of the openings whose scores are among the states of this module."""
        self.pieces: list[tuple[Callable[[], Tensor], Tensor | None]] = []
        """(openings of a group, unit of each channel; None where these are the channels)"""

    def add(self, opening: GroupOpening, units: Tensor, *, home: bool) -> None:
        if home:
            self.homes.append(opening)
        plain = torch.equal(units, torch.arange(opening.group.size))
        self.pieces.append((opening.__call__, None if plain else units.to(opening.device)))

    def opening(self, dtype: torch.dtype) -> Tensor:
        """What each channel (C,) is multiplied with: 1, or `LEAK`."""
        whole: Tensor | None = None
        for opening, units in self.pieces:
            part = opening().to(dtype)
            if units is not None:
                part = torch.where(units < 0, 1, part[units])
            whole = part if whole is None else whole * part
        assert whole is not None
        return whole

    def forward(self, output: Tensor) -> Tensor:
        return output * align(self.opening(output.dtype), output, self.dim)


def _gate_output(module: nn.Module, inputs: Any, output: Tensor) -> Any:
    """The forward hook of a module with a gate."""
    return module._modules["channel_gate"](output)  # type: ignore[misc]


def attach_gates(
    model: nn.Module, parts: Mapping[str, ScoredChannels], groups: Sequence[Group]
) -> list[Callable[[], None]]:
    """Put gates where the groups want them; returns what takes them off.

    A group's scores are with the last of its gates, so that they are among the model's parameters
    and states.
    """
    modules = dict(model.named_modules())
    gates: dict[str, ChannelGate] = {}
    for group in groups:
        opening = GroupOpening(group, parts)
        for name, (dim, units) in group.gates.items():
            gate = gates.setdefault(name, ChannelGate(dim))
            gate.add(opening, units, home=name == [*group.gates][-1])
    undo: list[Callable[[], None]] = []
    for name, gate in gates.items():
        modules[name].add_module("channel_gate", gate)
        hook = modules[name].register_forward_hook(_gate_output)
        undo += [hook.remove, partial(modules[name].__delattr__, "channel_gate")]
    return undo


def attach(model: nn.Module, parts: Mapping[str, ScoredWeight | TrainedWeight]) -> None:
    """Parametrize the named weights, everywhere they are used; changes the model."""
    named = dict(model.named_parameters())
    by_weight = {named[name]: part for name, part in parts.items()}
    for module in list(model.modules()):
        for own in find_weights(module):
            weight = module._parameters[own]
            if weight in by_weight:
                parametrize.register_parametrization(module, own, by_weight[weight], unsafe=True)


def detach(model: nn.Module) -> None:
    """Undo `attach`: the plain weights are back, unmasked and without factors."""
    for module in list(model.modules()):
        scored = _find_scored(module)
        for own in scored:
            parametrize.remove_parametrizations(module, own, leave_parametrized=False)
        if scored:
            # They come back as the last parameters, but are the first in these layers: a resumed
            # optimizer, whose network was built anew, tells parameters apart by their order.
            parameters = module._parameters
            for name in sorted(parameters, key=_place):
                parameters[name] = parameters.pop(name)


def _place(name: str) -> int:
    return WEIGHTS.index(name) if name in WEIGHTS else len(WEIGHTS)


def _find_scored(module: nn.Module) -> list[str]:
    """Names of the weights of a layer that scores, or factors, are attached to."""
    lists = module._modules.get("parametrizations")
    if not isinstance(lists, nn.ModuleDict):
        return []
    kinds = (ScoredWeight, TrainedWeight)
    return [n for n in lists if isinstance(next(lists[n].children(), None), kinds)]


@contextmanager
def effective_weights(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, each masked weight is made once: for one forward (or several) and one backward.

    Every weight is read at the start with gradients enabled. A first access under `no_grad` (by an
    attack, say) would cache a weight without a graph, and its scores would get no gradients.
    Yields (frozen weight, masked weight) of every layer.
    """
    shared = [m for m in model.modules() if isinstance(m, GroupOpening) and m.shared]
    with parametrize.cached():
        try:
            with torch.enable_grad():
                made = []
                for opening in shared:
                    opening.made = opening()
                for module in model.modules():
                    for own in _find_scored(module):
                        lists: Any = module.parametrizations
                        made.append((lists[own].original, getattr(module, own)))
            yield made
        finally:
            for opening in shared:
                opening.made = None


def effective_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters as the forward pass of this step uses them, by the plain network's names.

    A weight with scores is masked; a layer whose channels a gate opens and closes has its
    parameters multiplied by it along the outputs, which is what the gate does to the output.
    Gradients reach the scores. A tied parameter is there under the name of each layer that uses it.
    """
    values: dict[str, Tensor] = {}
    inner: set[nn.Module] = set()
    for prefix, module in model.named_modules():
        gate = module._modules.get("channel_gate")
        gate = gate if isinstance(gate, ChannelGate) else None
        names = [name for name, value in module._parameters.items() if value is not None]
        for name in _find_scored(module):
            names.append(name)
            inner.update(module.parametrizations[name].modules())
        if gate is not None:
            inner.update(gate.modules())
        for name in names if module not in inner else ():
            value = getattr(module, name)
            if gate is not None:
                value = value * align(gate.opening(value.dtype), value, 0)
            values[f"{prefix}.{name}" if prefix else name] = value
    return values


def copy_plain(model: nn.Module) -> nn.Module:
    """A copy of the network without scores and gates: plain, unmasked layers, for tracing."""
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        if isinstance(module._modules.get("channel_gate"), ChannelGate):
            del module.channel_gate
            hooks = module._forward_hooks
            for key in [key for key, hook in hooks.items() if hook is _gate_output]:
                del hooks[key]
        if scored := _find_scored(module):
            # Not torch's way of removing: the class that it would change is the original's too.
            lists: Any = module._modules.pop("parametrizations")
            module.__class__ = type(module).__bases__[0]
            weights = {name: lists[name].original for name in scored}
            module._parameters = {**weights, **module._parameters}
    return plain
