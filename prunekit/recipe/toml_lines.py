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

HINTS = {
    "Invalid value": 'strings need quotes: use = "trades"',
    "Cannot overwrite": "this key exists already; remove one of the two",
    "Cannot declare": "this table exists already; remove one of the two",
}
"""How a message of tomllib starts, and what that usually means in a recipe."""

WRITTEN = {
    r"=\s*[\d.]+\s*/\s*[\d.]+": 'fractions need quotes: eps = "8/255"',
    r"^\s*\[+\s*stage\s*\]+": "stages are a list; write [[stage]], with two brackets, for each",
    r"^\s*\[+\s*sweep\.case\s*\]+": "cases are a list; write [[sweep.case]] for each",
    r"=\s*(True|False|None)\b": "write true or false, and leave out what there is not",
    r"^[^=#]*:": "write key = value, with =",
}
"""What the line of a mistake looks like, and what that usually means in a recipe."""


def read_toml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, Place]]:
    """The data of a TOML file, and the place in it of every key path.

    Raises `UserError` if the file cannot be read, and `RecipeError` if it is not TOML.
    """
    file = relative(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        data = tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"there is no recipe {file}") from None
    except IsADirectoryError:
        inner = path / "recipe.toml"
        advice = f"; write {relative(inner)}" if inner.is_file() else ""
        raise UserError(f"{file} is a folder, not a recipe{advice}") from None
    except UnicodeDecodeError as error:
        place = Place(file, error.object[: error.start].count(b"\n") + 1)
        raise RecipeError([Problem(place, "is not UTF-8; save the file as UTF-8")]) from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        message, line = _explain(error, text)
        problem = Problem(Place(file, line), f"is not TOML: {message}")
        raise RecipeError([problem]) from None
    return data, {path: Place(file, line) for path, line in find_lines(text).items()}


def _explain(error: tomllib.TOMLDecodeError, text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(.*) \(at line (\d+), column \d+\)", str(error), re.DOTALL)
    if not found:
        line = text.rstrip().count("\n") + 1
        return "the file ends in the middle of a value; close the bracket or the quote", line
    wrong = text.split("\n")[int(found[2]) - 1]
    hints = [hint for pattern, hint in WRITTEN.items() if re.search(pattern, wrong)]
    hints += [hint for start, hint in HINTS.items() if found[1].startswith(start)]
    return "; ".join([found[1], *hints[:1]]), int(found[2])


def find_lines(text: str) -> dict[KeyPath, int]:
    """Key path -> the line, counted from 1, that mentions it first.

    tomllib gives no positions, so growing prefixes of the file are parsed: a path that is new in a
    prefix belongs to the statement that starts after the last prefix that could be parsed. For the
    items of a list that extends over several lines, a bracket is added to the prefix.
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
        for complete, at in ((prefix, start), (f"{prefix}\n]", number)):
            with suppress(tomllib.TOMLDecodeError):
                for path in _list_paths(tomllib.loads(complete)):
                    found.setdefault(path, at)
                start = None if complete is prefix else start
                break
    return found


def _list_paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    yield path
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from _list_paths(inner, (*path, key))
