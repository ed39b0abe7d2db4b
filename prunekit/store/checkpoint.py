"""Checkpoints: safetensors files with a JSON header. From pickles, only tensors are read."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
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
from prunekit.store.headers import read_header

FORMAT = 1
"""Version of the header."""


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
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = read_header((file.metadata() or {}).get("prunekit", "{}"), path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise UserError(
            f"{relative(path)} is damaged or not a safetensors file ({error})"
        ) from None
    if header.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{relative(path)} has format {header['format']}, and this prunekit reads {FORMAT}; "
            "update prunekit"
        )
    return tensors, header


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in any file: safetensors, or what `torch.save` wrote of tensors.

    It may be the entry `state_dict` of a larger dict; the prefix `module.` is removed if all keys
    have it. Raises `UserError` for a damaged file, and for a pickle that holds more than tensors.
    """
    if path.suffix == ".safetensors":
        state = read_checkpoint(path)[0]
    else:
        content = _load_tensors(path)
        state = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        found = f"; it holds {', '.join(map(str, list(state)[:8]))}" if state else ""
        raise UserError(
            f"{relative(path)} holds no state dict of tensors, neither at the top nor as "
            f"state_dict{found}"
        )
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _load_tensors(path: Path) -> Any:
    """What `torch.save` wrote. Raises `UserError` unless that is tensors and plain values."""
    check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling may raise anything
        # torch's own message is not shown: it says how to disable this protection.
        asked = re.search(r"GLOBAL ([\w.]+\w)", str(error))
        reason = f"is damaged, or not a torch.save of tensors ({type(error).__name__})"
        if asked:
            reason = f"is a pickle that asks for {asked[1]}, and only tensors are read"
        raise UserError(
            f"{relative(path)} {reason}; save a plain state dict, best as .safetensors"
        ) from None


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Load a state dict from the file `source` into the network.

    Raises `UserError` that lists the tensors that are missing, extra or of another shape.
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
    if faults:
        raise UserError(f"{relative(source)} does not fit the network: {'; '.join(faults[:6])}")
    model.load_state_dict(state)


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


def start_from(path: Path, model: nn.Module) -> Masks:
    """Load the file of `init` into the network. Only files of prunekit have masks; others give {}.

    Raises `UserError` if the file is damaged or does not fit the network.
    """
    if path.suffix == ".safetensors" and "masked" in read_checkpoint(path)[1]:
        return read_model(path, model)
    load_weights(model, read_weights(path), path)
    return {}
