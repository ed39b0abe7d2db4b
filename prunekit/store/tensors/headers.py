"""The JSON header of a safetensors file: plain data of the types that its readers rely on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from prunekit.contracts import Norm
from prunekit.errors import UserError, relative
from prunekit.reading import parse_json

LARGEST = 2**24
"""Most values of an image, and most classes: what they take is memory, and not in the file."""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= LARGEST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_component(value: Any) -> bool:
    named = value.get("use") if isinstance(value, dict) else value
    return isinstance(named, str)


def _is_threat(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"norm", "eps"}
        and value["norm"] in get_args(Norm)
        and _is_number(value["eps"])
    )


def _are_indices(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(indices, list) and all(type(i) is int and i >= 0 for i in indices)
        for indices in value.values()
    )


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(map(_is_count, value))
        and math.prod(value) <= LARGEST
    )


KEYS: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: type(value) is int,
    "dataset": _is_component,
    "architecture": _is_component,
    "threat": lambda value: value is None or _is_threat(value),
    "shape": _is_shape,
    "classes": _is_count,
    "seed": lambda value: type(value) is int and value >= 0,
    "smoke": lambda value: isinstance(value, bool),
    "sparsity": lambda value: _is_number(value) and 0 <= value <= 1,
    "masked": _are_names,
    "kept_zeros": _are_indices,
}
"""Key -> whether its value can be used. Other keys are only shown, or belong to checkpoints."""


def parse_header(text: str, path: Path) -> dict[str, Any]:
    """The header of the file `path` from its JSON. Raises `UserError` that names what is wrong."""
    try:
        # A checkpoint in the middle of a training may hold a loss that is not finite.
        header = parse_json(text, finite=False)
        if not isinstance(header, Mapping):
            raise ValueError("it is no table")
        for key, fits in KEYS.items():
            if key in header and not fits(header[key]):
                raise ValueError(f"its {key} is {header[key]!r}")
    except ValueError as error:
        raise UserError(
            f"{relative(path)} is damaged: its header cannot be read ({error})"
        ) from None
    return dict(header)
