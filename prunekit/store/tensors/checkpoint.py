"""Checkpoints: safetensors files with a JSON header."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from prunekit.contracts import Masks
from prunekit.errors import UserError, relative
from prunekit.reading import check_file
from prunekit.store.files import write_bytes
from prunekit.store.tensors.headers import parse_header

FORMAT = 1
"""Version of the header."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of weights; smaller ones are stored with scales, which no network here has."""

NORMED = ("weight_g", "weight_v", "weight.original0", "weight.original1")
"""What weight norm makes of a weight, the older one and the one of parametrizations."""
PRUNED = {".k_score": "harp", ".popup_scores": "hydra", "_orig": "torch-prune"}
"""Endings of names in files of pruned networks -> how `prunekit import` calls their kind."""


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header in one step. The same content gives the same bytes.

    Raises `RunError` if the file cannot be written; what was there before is kept.
    """
    # Cloned: tied weights share memory, which safetensors refuses.
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    text = json.dumps({"format": FORMAT, **header}, sort_keys=True)
    write_bytes(path, save(plain, metadata={"prunekit": text}))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, header) of a safetensors file; the header is empty if prunekit did not write it.

    Raises `UserError` for a file that is missing, damaged, or of another format.
    """
    with _open(path) as (file, header):
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118


def read_header(path: Path) -> dict[str, Any]:
    """The header alone, of which `read_checkpoint` says the same."""
    with _open(path) as (_, header):
        return header


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """An open safetensors file and its header; what is raised inside becomes a `UserError`."""
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = parse_header((file.metadata() or {}).get("prunekit", "{}"), path)
            if header.get("format", FORMAT) != FORMAT:
                raise UserError(
                    f"{relative(path)} has format {header['format']}, and this prunekit reads "
                    f"{FORMAT}; update prunekit"
                )
            yield file, header
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise UserError(
            f"{relative(path)} is damaged or not a safetensors file ({error})"
        ) from None


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Load a state dict from the file `source` into the network.

    Raises `UserError` that lists the tensors that are missing, extra, or of another shape or type.
    """
    own = model.state_dict()
    faults = []
    if missing := own.keys() - state.keys():
        faults.append(f"missing: {_some(missing)}")
    if extra := state.keys() - own.keys():
        faults.append(f"not in the network: {_some(extra)}")
    faults += [
        f"{key} is {tuple(state[key].shape)}, in the network {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    faults += [
        f"{key} is {reason}, in the network {value.dtype}"
        for key, value in own.items()
        if key in state and (reason := find_misfit(state[key], value))
    ]
    if faults:
        ways = [way for end, way in PRUNED.items() if any(key.endswith(end) for key in extra)]
        advice = "" if missing or not extra else "; save the network's own state_dict() alone"
        if ways:
            advice = f"; it is a pruned network: prunekit import {ways[0]}"
        if any(key.endswith(NORMED) for key in extra):
            advice = (
                "; it has weight norm: call torch.nn.utils.remove_weight_norm(layer), or "
                'parametrize.remove_parametrizations(layer, "weight"), for each layer; save again'
            )
        raise UserError(
            f"{relative(source)} does not fit the network: {'; '.join(faults[:6])}{advice}"
        )
    model.load_state_dict(state)


def find_misfit(value: Tensor, own: Tensor | None = None) -> str:
    """What a tensor is that is no plain array of numbers, or none for `own`; "" if it will do."""
    if value.is_quantized:
        return "quantised"
    if value.is_meta:
        return "without values, on torch's meta device"
    if value.layout != torch.strided:
        return "sparse"
    if value.is_complex():
        return f"of type {value.dtype}"
    if own is None or value.dtype == own.dtype:
        return ""
    fits = not value.is_floating_point() or value.dtype in FLOATS
    if own.is_floating_point():
        fits = value.dtype in FLOATS
    elif fits:
        fits = bool((value.to(own.dtype).double() == value.double()).all())
    return "" if fits else f"of type {value.dtype}"


def _some(keys: set[str]) -> str:
    first = sorted(keys)[:8]
    return ", ".join(first) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def write_model(path: Path, model: nn.Module, masks: Masks, header: Mapping[str, Any]) -> None:
    """Write a network as plain weights, zero where they are removed; any program can load them.

    The header's `masked` lists the weights with a mask, which is `weight != 0`; `kept_zeros` holds
    the flat indices of kept weights that happen to be zero.
    """
    weights = dict(model.named_parameters())
    kept_zeros = {}
    for name, mask in masks.items():
        zeros = (mask & (weights[name].detach() == 0)).flatten().nonzero().flatten().tolist()
        if zeros:
            kept_zeros[name] = zeros
    own = {"masked": sorted(masks), "kept_zeros": kept_zeros}
    write_checkpoint(path, model.state_dict(), {**header, **own})


def read_model(path: Path, model: nn.Module) -> Masks:
    """Load a file of `write_model` into the network, and return the masks.

    Raises `UserError` if the file is damaged or does not fit the network.
    """
    state, header = read_checkpoint(path)
    load_weights(model, state, path)
    return read_masks(state, header, path)


def read_masks(state: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> Masks:
    """The masks of a file of `write_model`, from what `read_checkpoint` read.

    Raises `UserError` if the header does not fit the weights.
    """
    masks: Masks = {}
    try:
        for name in header.get("masked", []):
            mask = state[name] != 0
            mask.view(-1)[torch.tensor(header["kept_zeros"].get(name, []), dtype=torch.long)] = True
            masks[name] = mask
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{relative(path)} is damaged: its masks do not fit its weights ({error})"
        ) from None
    return masks
