"""Masks on a network: which weights can have them, learning through them, applying, counting."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunekit.errors import RunError, UserError

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
        return StraightThrough.apply(weight, self.score, self.mask)


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
            # optimiser, whose network was built anew, tells parameters apart by their order.
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


def find_broken(model: nn.Module) -> str:
    """The first parameter or buffer that holds NaN or infinity; empty where none does."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and not value.isfinite().all():
            return name
    return ""


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the pruned weights of the model to zero, in place.

    Raises `UserError` for a mask that fits no parameter; nothing is changed then.
    """
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in weights:
            raise UserError(f"the mask {name!r} is of no parameter of the network")
        if mask.dtype != torch.bool or mask.shape != weights[name].shape:
            raise UserError(
                f"the mask of {name} is {mask.dtype} {tuple(mask.shape)}; give booleans of the "
                f"weight's shape {tuple(weights[name].shape)}, True where it is kept"
            )
    for name, mask in masks.items():
        weights[name].masked_fill_(~mask, 0)


def assert_masked(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Raise `RunError` where a pruned weight is not exactly zero."""
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        if torch.count_nonzero(weights[name].detach()[~mask]):
            raise RunError(f"pruned weights of {name} are not zero: training did not keep its mask")


def count_weights(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """Layer -> {"kept", "weights"} over all prunable weights; a layer without a mask is dense."""
    counts = {}
    for name, weight in find_prunable(model).items():
        n = weight.numel()
        counts[name] = {"kept": int(masks[name].sum()) if name in masks else n, "weights": n}
    return counts


def measure_sparsity(counts: Mapping[str, Mapping[str, int]]) -> float:
    """Fraction of all prunable weights that is removed."""
    total = sum(layer["weights"] for layer in counts.values())
    return 1 - sum(layer["kept"] for layer in counts.values()) / total


def hash_masks(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bits: ranks and resumed runs compare it."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(name.encode())
        digest.update(masks[name].cpu().numpy().tobytes())
    return digest.hexdigest()
