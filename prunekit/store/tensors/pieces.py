"""Files of tensors by content, so that what another file has is not written again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.errors import UserError, relative
from prunekit.store.files import seal, write_bytes
from prunekit.store.tensors.checkpoint import FORMAT, read_checkpoint

TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip
"""How the format calls the types of tensors."""


def hash_piece(value: Tensor) -> str:
    """SHA-256 of a tensor: its type, its shape and its bits."""
    return _hash(_pack(value), value)


def write_pieces(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], known: Iterable[str] = ()
) -> set[str]:
    """Write tensors, by their hashes, and a header in one step; returns the hashes of them all.

    Those whose hashes are `known` are only named. Raises `RunError` if the file cannot be written;
    what was there before is kept.
    """
    names, pieces, bits = {}, {}, {}
    known = set(known)
    for name, value in tensors.items():
        packed = _pack(value)
        names[name] = piece = _hash(packed, value)
        if piece in known or piece in pieces:
            continue
        pieces[piece] = packed
        if value.dtype == torch.bool:
            bits[piece] = list(value.shape)
    told = {"format": FORMAT, **header, "tensors": names, "bits": bits}
    text = json.dumps({**told, "sha256": seal(told)})
    write_bytes(path, *_encode(pieces, text))
    return set(names.values())


def read_pieces(
    path: Path, known: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, header) of a file of `write_pieces`; those that it only names are `known`.

    Raises `UserError` for a file that is missing or damaged, or names others.
    """
    pieces, header = read_checkpoint(path)
    try:
        whole = header.pop("sha256") == seal(header)
        found, bits = dict(known), header.pop("bits")
        for piece, packed in pieces.items():
            value = _unpack(packed, bits[piece]) if piece in bits else packed
            whole = whole and _hash(packed, value) == piece
            found[piece] = value
        # Cloned: what is equal now will not stay so.
        tensors = {name: found[piece].clone() for name, piece in header.pop("tensors").items()}
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        whole = False
    if not whole:
        raise UserError(
            f"{relative(path)} is damaged (its content has changed since it was written)"
        )
    return tensors, header


def _pack(value: Tensor) -> Tensor:
    """What is written of a tensor; booleans take a bit each."""
    value = value.detach().cpu().contiguous()
    return torch.from_numpy(np.packbits(value.numpy())) if value.dtype == torch.bool else value


def _unpack(packed: Tensor, shape: list[int]) -> Tensor:
    bits = np.unpackbits(packed.numpy(), count=int(np.prod(shape)))
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


def _hash(packed: Tensor, value: Tensor) -> str:
    digest = hashlib.sha256(f"{value.dtype}\0{tuple(value.shape)}\0".encode())
    digest.update(_bytes(packed))
    return digest.hexdigest()


def _bytes(value: Tensor) -> memoryview:
    return value.flatten().view(torch.uint8).numpy().data


def _encode(pieces: Mapping[str, Tensor], text: str) -> list[bytes | memoryview]:
    """A safetensors file in parts: its own package would copy every tensor three times.

    The format: 8 bytes that say how long the JSON table is, the table, and the tensors.
    """
    # The widest first, so that each begins at a multiple of its entries.
    pieces = dict(sorted(pieces.items(), key=lambda piece: -piece[1].itemsize))
    table: dict[str, Any] = {"__metadata__": {"prunekit": text}}
    end = 0
    for name, value in pieces.items():
        start, end = end, end + value.nbytes
        kind = TYPES[value.dtype]
        table[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [start, end]}
    told = json.dumps(table).encode()
    told += b" " * (-len(told) % 8)  # tensors begin at a multiple of 8
    return [len(told).to_bytes(8, "little"), told, *map(_bytes, pieces.values())]
