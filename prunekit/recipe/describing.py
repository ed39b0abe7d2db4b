"""Options as a recipe could write them, and the components among them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from prunekit.catalog.component import Use


def key_of(field_name: str) -> str:
    """The recipe's key of a field, without the underscore that Python's keywords need."""
    return field_name.removesuffix("_")


def describe(value: Any, of_path: Callable[[Path], Any] = str) -> Any:
    """Options as a recipe could write them: plain data with defaults, None left out.

    `of_path` says what represents a file: its path in a recipe, its content in a hash.
    """
    if isinstance(value, Use):
        named = {"name": value.name} if value.name != value.component.name else {}
        reference = value.reference or value.component.name
        return {"use": reference, **named, **describe(value.options, of_path)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((key_of(f.name), getattr(value, f.name)) for f in dataclasses.fields(value))
        return {k: describe(v, of_path) for k, v in pairs if v is not None}
    if isinstance(value, Path):
        return of_path(value)
    if isinstance(value, tuple | list):
        return [describe(v, of_path) for v in value]
    if isinstance(value, dict):
        return {k: describe(v, of_path) for k, v in value.items()}
    return float(value) if isinstance(value, float) else value


@cache
def field_types(options: type) -> dict[str, Any]:
    """Field name -> type of an options dataclass."""
    return typing.get_type_hints(options)


def uses_in(value: Any) -> Iterator[Use[Any]]:
    """All components that options name, at any depth."""
    if isinstance(value, Use):
        yield value
        yield from uses_in(value.options)
    elif dataclasses.is_dataclass(value):
        options: type = type(value)
        for name in _naming(options):
            yield from uses_in(getattr(value, name))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from uses_in(item)


@cache
def _naming(options: type) -> list[str]:
    """Fields of an options dataclass that name components."""
    return [name for name, hint in field_types(options).items() if "Use[" in str(hint)]
