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
from prunekit.pruning.layers import find_prunable


@dataclass
class State:
    """The network between stages, as it was built at first; changed in place by them."""

    model: nn.Module
    masks: Masks = field(default_factory=dict)
    frozen: tuple[str, ...] = field(init=False)
    """Parameters that the network does not train (requires_grad=False): no stage does."""

    def __post_init__(self) -> None:
        named = self.model.named_parameters()
        self.frozen = tuple(name for name, p in named if not p.requires_grad)

    def thaw(self) -> None:
        """Let train what the network trains, in train mode, whatever came before."""
        self.model.train()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in self.frozen)


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
        if not (value.isfinite() if strict else value.isfinite() | value.isneginf()).all():
            return f"NaN or infinity in {name}"
        if own == "running_var" and (value < 0).any():
            return f"negative variances in {name}"
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
    try:
        weights = find_prunable(model)
    except RunError:  # nothing can be pruned, in a quantized network, which may be judged anyway
        return {}
    counts = {}
    for name, weight in weights.items():
        n = weight.numel()
        counts[name] = {"kept": int(masks[name].sum()) if name in masks else n, "weights": n}
    return counts


def measure_sparsity(counts: Mapping[str, Mapping[str, int]]) -> float:
    """Fraction of all prunable weights that is removed."""
    total = sum(layer["weights"] for layer in counts.values())
    return 1 - sum(layer["kept"] for layer in counts.values()) / total if total else 0.0


def hash_masks(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bits: ranks and resumed runs compare it."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(name.encode())
        digest.update(masks[name].cpu().numpy().tobytes())
    return digest.hexdigest()
