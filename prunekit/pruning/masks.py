"""Masks on a network: applying, checking, counting, hashing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.contracts import Masks
from prunekit.errors import RunError, UserError
from prunekit.graph.looking import is_frozen
from prunekit.pruning.layers import describe_faults, find_faults


@dataclass
class State:
    """The network between stages, as it was built at first; changed in place by them."""

    model: nn.Module
    masks: Masks = field(default_factory=dict)
    frozen: tuple[str, ...] = field(init=False)
    """Parameters that the network does not train (requires_grad=False): no stage does."""
    notes: list[str] = field(default_factory=list)
    """What the next stage that trains tells about the weights it starts from."""

    def __post_init__(self) -> None:
        named = self.model.named_parameters()
        self.frozen = tuple(name for name, p in named if not p.requires_grad)

    def thaw(self) -> None:
        """Let train what the network trains, in train mode, whatever came before."""
        self.model.train()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in self.frozen)
        for module in filter(is_frozen, self.model.modules()):
            module.eval()


INCIDENTAL = 0.01
"""This many of the weights of a layer, and of all, may be zero by chance, or by rounding."""


def find_zeros(weights: Mapping[str, Tensor]) -> Masks:
    """The masks of weights that come without any, zero where they were removed.

    Zeros are removed weights in a layer where they are at least `INCIDENTAL` of it, and two, and
    everywhere if all of them are that much of all weights. Layers that are zero as a whole, which
    is how some start, are so only beside others that lost a part.
    """
    masks = {name: weight.detach() != 0 for name, weight in weights.items()}
    masks = {name: mask for name, mask in masks.items() if not mask.all()}
    partly = {n: int((~mask).sum()) for n, mask in masks.items() if mask.any()}
    whole = sum(partly.values()) >= INCIDENTAL * sum(weight.numel() for weight in weights.values())
    removed = {
        n for n, zeros in partly.items() if whole or zeros >= max(2, INCIDENTAL * masks[n].numel())
    }
    return {n: mask for n, mask in masks.items() if n in removed or (removed and n not in partly)}


def take_zeros(state: State, *, trained: bool) -> None:
    """Take the zeros of a network that comes without masks for removed weights, and note it.

    Not if a stage that trains all weights comes first, `trained`.
    """
    named = dict(state.model.named_parameters())
    weights = {name: named[name] for name, fault in find_faults(state.model).items() if not fault}
    masks = find_zeros(weights)
    if not masks:
        return
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    told = f"{zeros / sum(w.numel() for w in weights.values()):.1%} of its weights are zero"
    if trained:
        state.notes.append(f"the network starts without masks, and {told}: pretrain trains them")
        return
    state.masks = masks
    empty = ", ".join(name for name, mask in masks.items() if not mask.any())
    told += f", which leaves nothing of {empty}" if empty else ""
    state.notes.append(f"the network starts without masks, and {told}: taken as removed")


def drop_changed(state: State) -> None:
    """Take masks off weights whose zeros would be none of the network's, and note it."""
    changed = [name for name, fault in find_faults(state.model).items() if fault]
    if lost := [name for name in changed if state.masks.pop(name, None) is not None]:
        named = describe_faults(state.model, lost)
        state.notes.append(f"left dense although they came with masks: {named}")


def describe_counts(state: State) -> dict[str, Any]:
    """Kept and all weights, in total and layer by layer."""
    layers = count_weights(state.model, state.masks)
    return {
        "kept": sum(layer["kept"] for layer in layers.values()),
        "weights": sum(layer["weights"] for layer in layers.values()),
        "layers": layers,
    }


def find_broken(model: nn.Module) -> str:
    """What cannot be computed with, and the first parameter or buffer that holds it; else empty.

    A buffer may hold -infinity, as masks of attention do, unless it is a running statistic.
    """
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if not value.is_floating_point():
            continue
        own = name.rpartition(".")[2]
        strict = isinstance(value, nn.Parameter) or own.startswith("running_")
        # NaN and infinity stay in a sum, which is several times faster; but it may overflow.
        summed = value.detach().sum(dtype=torch.float32).isfinite()
        if not summed and not (
            (value.isfinite() if strict else value.isfinite() | value.isneginf()).all()
        ):
            return f"NaN or infinity in {name}"
        if own == "running_var" and (value < 0).any():
            return f"negative variances in {name}"
    return ""


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the pruned weights of the model to zero, in place.

    Raises `UserError` for a mask that fits no parameter, or is of a weight whose zeros would be
    none of the network's because its layer makes another one of it; nothing is changed then.
    """
    weights = dict(model.named_parameters())
    for name, fault in find_faults(model).items():
        if fault and name in masks:
            raise UserError(f"{name} cannot have a mask: it is {fault}; leave it dense")
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
        if torch.count_nonzero(weights[name].detach().masked_fill(mask, 0)):
            raise RunError(f"pruned weights of {name} are not zero: training did not keep its mask")


def count_weights(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """Weight -> {"kept", "weights"}, of all layers that are pruned; one without a mask is dense.

    So is, whatever its mask, one whose zeros would be none of the network's (`find_faults`).
    """
    try:
        faults = find_faults(model)
    except RunError:  # nothing can be pruned, in a quantized network, which may be judged anyway
        return {}
    counts = {}
    named = dict(model.named_parameters())
    for name, fault in faults.items():
        n = named[name].numel()
        masked = name in masks and not fault
        counts[name] = {"kept": int(masks[name].sum()) if masked else n, "weights": n}
    return counts


def measure_sparsity(counts: Mapping[str, Mapping[str, int]]) -> float:
    """Fraction of all weights counted that is removed; 0 where there are none."""
    total = sum(layer["weights"] for layer in counts.values())
    return 1 - sum(layer["kept"] for layer in counts.values()) / total if total else 0.0


def hash_masks(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bits: ranks and resumed runs compare it."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(name.encode())
        digest.update(masks[name].cpu().numpy().tobytes())
    return digest.hexdigest()
