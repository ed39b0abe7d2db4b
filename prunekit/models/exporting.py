"""Pruned networks -> files that other programs read."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from prunekit.errors import UserError, relative
from prunekit.models.importing import count_imported, find_keep_ratio
from prunekit.models.stored import find_architecture, load_network
from prunekit.store.files import make_folder, write_bytes
from prunekit.store.networks import read_network
from prunekit.store.tensors.checkpoint import read_checkpoint, read_masks

HYDRA_NAMES = {
    "cifar-small": "cifar_model",
    "cifar-large": "cifar_model_large",
    "mnist-small": "mnist_model",
    "mnist-large": "mnist_model_large",
}
"""Names in HYDRA that are not prunekit's with underscores instead of hyphens."""


def export_hydra(model: Path, out: Path) -> float:
    """Write a checkpoint of HYDRA, with popup_scores that are 1 where a weight is kept, else 0.

    Removed weights are zero. Returns the sparsity to read it with, which is not in the file. Raises
    `UserError` if no single keep ratio gives these masks.
    """
    _check_free(out)
    state, header = read_checkpoint(model)
    masks = read_masks(state, header, model)
    if not masks:
        raise UserError(f"{relative(model)} has no masks; other programs can load it as it is")
    # HYDRA reads scores of every layer, also of those that were left dense.
    matrices = {n: v for n, v in state.items() if n.endswith("weight") and v.dim() >= 2}
    masks |= {
        n: torch.ones_like(v, dtype=torch.bool) for n, v in matrices.items() if n not in masks
    }
    for name, mask in masks.items():
        if not name.endswith(".weight") or mask.dim() < 2:
            raise UserError(f"a hydra file has scores of layers only, and {name} is none of these")
    counts = {name: (mask.numel(), int(mask.sum())) for name, mask in masks.items()}
    sparsity = find_sparsity(counts)
    if sparsity is None:
        kept = sorted((k / n, name) for name, (n, k) in counts.items())
        raise UserError(
            f"a hydra file has one keep ratio for all layers, and {kept[0][1]} keeps "
            f"{kept[0][0]:.4g} and {kept[-1][1]} {kept[-1][0]:.4g} of its weights; prune with "
            'budget = "layer" and exclude = []'
        )
    for name, mask in masks.items():
        state[f"{name.removesuffix('weight')}popup_scores"] = mask.to(state[name].dtype)
    name = str(header.get("architecture", {}).get("use", "unknown"))
    if name.startswith("wrn-"):
        # HYDRA's loader expects this block, although its forward pass never uses it.
        state |= {f"sub_{n}": v.clone() for n, v in state.items() if n.startswith("block1.")}
    name = HYDRA_NAMES.get(name, name.removeprefix("cifar-").replace("-", "_"))
    content = {"epoch": 0, "arch": name, "state_dict": state, "best_prec1": 0.0, "optimizer": {}}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    make_folder(out.parent)
    write_bytes(out, buffer.getvalue())
    return sparsity


def export_own(path: Path, kind: str, out: Path, *, trust: bool = False) -> None:
    """Write the network of a run folder or model file in a format that its architecture declares.

    Raises `UserError` if there is no such format, or if `load_network` does.
    """
    network = read_network(path)
    use = find_architecture(network, trust=trust)
    if kind not in use.component.exports:
        formats = ", ".join(["hydra", *use.component.exports])
        raise UserError(
            f"architecture {use.component.name!r} has no format {kind!r}; there are: {formats}"
        )
    _check_free(out)
    model, _ = load_network(network, trust=trust)
    module, _, function = use.component.exports[kind].partition(":")
    make_folder(out.parent)
    getattr(importlib.import_module(module), function)(model, use.options, network.header, out)


def _check_free(out: Path) -> None:
    if os.path.lexists(out):
        raise UserError(f"{relative(out)} exists already; choose another --out")


def find_sparsity(counts: Mapping[str, tuple[int, int]]) -> float | None:
    """The shortest decimal with which HYDRA keeps these numbers of weights; None if there is none.

    `counts` maps each layer to (weights, kept weights).

    >>> find_sparsity({"a": (1000, 100), "b": (10, 1)}), find_sparsity({"a": (8, 1), "b": (8, 2)})
    (0.9, None)
    """
    low = max((n - kept) / n for n, kept in counts.values())
    high = min((n - kept + 1) / n for n, kept in counts.values())
    for digits in range(1, 11):
        for value in (low, (low + high) / 2):
            sparsity = round(value, digits)
            ratio = find_keep_ratio(sparsity)
            if all(count_imported(n, ratio) == kept for n, kept in counts.values()):
                return sparsity
    return None
