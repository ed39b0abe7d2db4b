"""State dicts in files of other programs. From pickles, only tensors and plain values are read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.errors import UserError, relative
from prunekit.reading import check_file
from prunekit.store.tensors.checkpoint import read_checkpoint

DEPTH = 4
"""How deep a state dict may lie in the dicts of a file."""


def read_states(path: Path) -> dict[str, dict[str, Tensor]]:
    """Every state dict in a file, by where it lies: "" at the top, "state_dict", "ema.model".

    Raises `UserError` for a damaged file, a pickle that holds more than tensors and plain values,
    and a file without a state dict.
    """
    if path.suffix == ".safetensors":
        content: Any = read_checkpoint(path)[0]
    else:
        content = _load_tensors(path)
    found = dict(_walk(content, (), set()))
    if not found:
        held = list(content) if isinstance(content, Mapping) else []
        named = f"; it holds {', '.join(map(str, held[:8]))}" if held else ""
        raise UserError(
            f"{relative(path)} holds no state dict of tensors, neither at the top nor as an entry "
            f"such as state_dict{named}"
        )
    return found


def _walk(
    content: Any, place: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    # A pickle may hold a dict in itself.
    if not isinstance(content, Mapping) or len(place) > DEPTH or id(content) in seen:
        return
    seen.add(id(content))
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor) and not v.is_nested}
    beside = (value for key, value in content.items() if key not in tensors)
    # An epoch may stand among the weights.
    if tensors and all(isinstance(key, str) for key in content) and all(map(_is_plain, beside)):
        yield ".".join(place), tensors
    for key, value in content.items():
        if isinstance(key, str):
            yield from _walk(value, (*place, key), seen)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, int | float | str)


class _DType:
    """Stands for a `numpy.dtype` in a pickle: one of plain numbers."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if not (isinstance(code, str) and re.fullmatch(r"[biuf][1248]", code)):
            raise ValueError("not a type of plain numbers")
        self.plain = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _, order, *rest = state
        if order not in ("<", ">", "|", "=") or any(v is not None for v in rest[:3]):
            raise ValueError("not a type of plain numbers")
        self.plain = self.plain.newbyteorder(order)


def _make_number(dtype: Any, data: Any) -> Any:
    """Stands for numpy's function that makes a number of bytes: a number of Python."""
    if type(dtype) is not _DType or not isinstance(data, bytes):
        raise ValueError("not a number")
    (number,) = np.frombuffer(data, dtype.plain).tolist()
    return number


NUMPY: list[Any] = [
    (_DType, "numpy.dtype"),
    (_make_number, "numpy.core.multiarray.scalar"),
    (_make_number, "numpy._core.multiarray.scalar"),
]
"""Names that a pickle may use besides torch's, and what stands for them: nothing of numpy runs.

A learning rate that a schedule computed with numpy is such a number, in the optimizer's state.
"""


def _load_tensors(path: Path) -> Any:
    """What `torch.save` wrote. Raises `UserError` unless that is tensors and plain values."""
    check_file(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY):
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
