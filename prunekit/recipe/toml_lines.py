"""A TOML file: its data, and the line of every key path."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from prunekit.errors import Place, Problem, RecipeError, UserError, relative
from prunekit.recipe.values import KeyPath


def read_toml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, Place]]:
    """The data of a file, and where it says each of its parts.

    Raises `UserError` where there is no such file, and `RecipeError` where it is not TOML.
    """
    file = relative(path)
    text = _read_text(path, file)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, line = _explain(error, text)
        raise RecipeError([Problem(Place(file, line), message)]) from None
    return data, {path: Place(file, line) for path, line in find_lines(text).items()}


def _read_text(path: Path, file: str) -> str:
    """The file's text. Raises `UserError` that says why there is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no recipe {file}") from None
    except IsADirectoryError:
        inner = path / "recipe.toml"
        way = f"; write {relative(inner)}" if inner.is_file() else ""
        raise UserError(f"{file} is a folder, not a recipe{way}") from None
    except UnicodeDecodeError as error:
        place = Place(file, error.object[: error.start].count(b"\n") + 1)
        raise RecipeError([Problem(place, "is not UTF-8; save the file as such")]) from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


HINTS = {
    "Invalid value": 'texts need quotes: use = "trades"',
    "Cannot overwrite": "this key is there already; remove one of the two",
    "Cannot declare": "this table is there already; remove one of the two",
}
"""What tomllib says, and what that mostly means in a recipe."""


def _explain(error: tomllib.TOMLDecodeError, text: str) -> tuple[str, int]:
    found = re.search(r"\(at line (\d+), column \d+\)", str(error))
    line = int(found[1]) if found else text.rstrip().count("\n") + 1
    if not found:
        return "is not TOML: it ends in the middle; close the bracket or the quote", line
    message = re.sub(r" \(at .*\)$", "", str(error))
    hints = (f"; {hint}" for start, hint in HINTS.items() if message.startswith(start))
    return f"is not TOML: {message}{next(hints, '')}", line


def find_lines(text: str) -> dict[KeyPath, int]:
    """Key path -> line (from 1) that first mentions it.

    tomllib tells no positions, so growing prefixes of the file are parsed: a path that is new in a
    prefix belongs to the statement that starts after the last prefix that could be parsed. Within
    a list over several lines a bracket is put behind the prefix, which tells the items' lines.
    """
    lines = text.split("\n")
    found: dict[KeyPath, int] = {}
    start = None
    for number, line in enumerate(lines, start=1):
        if start is None and line.strip() and not line.lstrip().startswith("#"):
            start = number
        if start is None:
            continue
        prefix = "\n".join(lines[:number])
        with suppress(tomllib.TOMLDecodeError):
            for path in _paths(tomllib.loads(prefix)):
                found.setdefault(path, start)
            start = None
            continue
        with suppress(tomllib.TOMLDecodeError):
            for path in _paths(tomllib.loads(f"{prefix}\n]")):
                found.setdefault(path, number)
    return found


def _paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    yield path
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from _paths(inner, (*path, key))
