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

from prunekit.contracts import Masks, Scores
from prunekit.pruning.layers import WEIGHTS, find_weights
from prunekit.pruning.selection import Selection, check_layers, select_masks


class StraightThrough(torch.autograd.Function):
    """weight * mask(|score|), the gradient going straight through the mask (HYDRA, section 3).

    With w_eff = w * m and m treated as |s|: ds = dL/dw_eff * w * sign(s). The weight is frozen
    and gets none.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, score)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        weight, score = ctx.saved_tensors
        return None, gradients[0] * weight * score.sign(), None


class ScoredWeight(nn.Module):
    """Parametrization of a frozen weight by trained scores; the mask is written from outside."""

    mask: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.score = nn.Parameter(start.detach().clone())
        self.register_buffer("mask", torch.ones_like(start, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        masked: Tensor = StraightThrough.apply(weight, self.score, self.mask)
        return masked


LEAK = 1e-6
"""What a removed channel lets through while scores are learned.

Exactly nothing would meet the zero derivative of a ReLU at 0, and no removed channel could ever
come back.
"""


class ChannelGate(nn.Module):
    """Opens and closes the output channels of a layer by trained scores of its weights.

    Straight through as for single weights: with the gate m_c treated as the mean |s| of channel c,
    ds = dL/dm_c sign(s) / n for its n weights. The layer itself stays whole meanwhile: what reads
    its weight, instead of calling the network, wants `effective_parameters`.
    """

    mask: Tensor

    def __init__(self, start: Tensor, *, last: bool) -> None:
        super().__init__()
        self.score = nn.Parameter(start.detach().clone())
        self.register_buffer("mask", torch.ones_like(start, dtype=torch.bool))
        self.last = last
        """Whether channels are the last dimension of the output (linear layers), or the second."""

    def forward(self, output: Tensor) -> Tensor:
        gate = self.opening(output.dtype)
        return output * (gate if self.last else gate.view(-1, *[1] * (output.dim() - 2)))

    def opening(self, dtype: torch.dtype) -> Tensor:
        """What each channel (O,) is multiplied with: 1, or `LEAK`."""
        importance = self.score.abs().flatten(1).mean(1)
        opened = self.mask.flatten(1).any(1).to(dtype).clamp_min(LEAK)
        return opened + importance - importance.detach()


def _gate_output(module: nn.Module, inputs: Any, output: Tensor) -> Any:
    """The forward hook of a layer with a gate."""
    return module._modules["channel_gate"](output)  # type: ignore[misc]


def attach_gates(
    model: nn.Module, gates: Mapping[str, ChannelGate], followers: Mapping[str, Sequence[str]]
) -> list[Callable[[], None]]:
    """Put each weight's gate behind the last of its followers; returns what takes them off."""
    modules = dict(model.named_modules())
    undo: list[Callable[[], None]] = []
    for name, gate in gates.items():
        *_, end = (name, *followers[name])
        module = modules[end.rpartition(".")[0]]
        # A child of the layer, so that the score is among the model's parameters and states.
        module.add_module("channel_gate", gate)
        hook = module.register_forward_hook(_gate_output)
        undo += [hook.remove, partial(module.__delattr__, "channel_gate")]
    return undo


def attach(model: nn.Module, parts: Mapping[str, ScoredWeight]) -> None:
    """Parametrize the named weights, everywhere they are used; changes the model."""
    named = dict(model.named_parameters())
    by_weight = {named[name]: part for name, part in parts.items()}
    for module in list(model.modules()):
        for own in find_weights(module):
            weight = module._parameters[own]
            if weight in by_weight:
                parametrize.register_parametrization(module, own, by_weight[weight], unsafe=True)


def detach(model: nn.Module) -> None:
    """Undo `attach`: the plain weights are back, unmasked."""
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
    """Names of the weights of a layer that scores are attached to."""
    lists = module._modules.get("parametrizations")
    if not isinstance(lists, nn.ModuleDict):
        return []
    return [n for n in lists if isinstance(next(lists[n].children(), None), ScoredWeight)]


@contextmanager
def effective_weights(model: nn.Module) -> Iterator[None]:
    """Inside, each masked weight is made once: for one forward (or several) and one backward.

    Every weight is read at the start with gradients enabled. A first access under `no_grad` (by an
    attack, say) would cache a weight without a graph, and its scores would get no gradients.
    """
    with parametrize.cached():
        with torch.enable_grad():
            for module in model.modules():
                for own in _find_scored(module):
                    getattr(module, own)
        yield


def effective_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters as the forward pass of this step uses them, by the plain network's names.

    A weight with scores is masked; a layer whose channels a gate opens and closes has weight and
    bias multiplied by it along the outputs, which is what the gate does to the output. Gradients
    reach the scores. A tied parameter is there under the name of each layer that uses it.
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
            inner.add(gate)
        for name in names if module not in inner else ():
            value = getattr(module, name)
            if gate is not None:
                value = value * gate.opening(value.dtype).view(-1, *[1] * (value.dim() - 1))
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


# _NormBase: batch and instance normalization.
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class LearnedScores:
    """Trains scores of frozen weights; masks follow the scores, once an optimizer step.

    Biases are frozen too. Normalization layers train, affine parameters and running statistics,
    unless `bn` is "freeze". Channels are closed at the output of the last of a weight's
    `followers` (`structures.find_followers`), single weights where they are.
    """

    def __init__(
        self,
        model: nn.Module,
        start: Scores,
        selection: Selection,
        alive: Masks,
        bn: str,
        followers: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.model, self.start, self.alive = model, start, alive
        self.selection = selection
        model.requires_grad_(False)
        model.train()
        for module in model.modules():
            if isinstance(module, NORMS):
                module.train(bn != "freeze")
                module.requires_grad_(bn != "freeze")
        self.parts: dict[str, ScoredWeight] | dict[str, ChannelGate]
        self._undo: list[Callable[[], None]]
        if selection.structure == "channel":
            gates = {n: ChannelGate(v, last=v.dim() == 2) for n, v in start.values.items()}
            self._undo = attach_gates(model, gates, followers or {})
            self.parts = gates
        else:
            scored = {name: ScoredWeight(value) for name, value in start.values.items()}
            attach(model, scored)
            self._undo = [partial(detach, model)]
            self.parts = scored
        self.check()

    def scores(self) -> Scores:
        """Importance: |score|."""
        values = {name: part.score.detach().abs() for name, part in self.parts.items()}
        return Scores(values, self.start.layerwise)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the masks of the present scores."""
        masks = select_masks(self.scores(), self.selection, self.alive)
        for name, part in self.parts.items():
            part.mask.copy_(masks[name])

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextmanager
    def effective(self) -> Iterator[None]:
        self.refresh()
        with effective_weights(self.model):
            yield

    def after_backward(self) -> None:
        pass

    def check(self) -> None:
        self.refresh()
        check_layers({n: part.mask for n, part in self.parts.items()}, self.selection.sparsity)

    def detach(self) -> None:
        """Give the model its plain weights back."""
        for undo in self._undo:
            undo()
