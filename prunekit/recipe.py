"""TOML -> Recipe: tables merged over `extends`, every value with the place that says it."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from prunekit.errors import Place, Problem, RecipeError, UserError, relative
from prunekit.options import KeyPath, suggest
from prunekit.settings import DATA_KEYS

FORMAT = 1
"""Version of the recipe format."""

SECTIONS = ("dataset", "architecture", "threat", "objective")


@dataclass
class Recipe:
    """A recipe as it was written: `data` is plain TOML data, `places` say where it stands."""

    path: Path
    data: dict[str, Any]
    places: dict[KeyPath, Place | tuple[Path, KeyPath]] = field(default_factory=dict)

    def locate(self, path: KeyPath) -> Place:
        """Where the value, or what it is part of, was written."""
        while path and path not in self.places:
            path = path[:-1]
        place = self.places.get(path, (self.path, path))
        if isinstance(place, Place):
            return place
        file, inner = place
        lines = find_lines(file)
        while inner and inner not in lines:
            inner = inner[:-1]
        return Place(relative(file), lines.get(inner, 1))

    def assign(self, address: str, value: Any, place: Place | tuple[Path, KeyPath]) -> str:
        """Set what a sweep's address names; returns a message where there is no such thing.

        Replacing a component drops the options of the old one.
        """
        path = resolve_address(self.data, address)
        if isinstance(path, str):
            return path
        if path[-1] == "use":
            path = path[:-1]
        here: Any = self.data
        for key in path[:-1]:
            if isinstance(here, dict) and isinstance(here.get(key), str):
                here[key] = {"use": here[key]}
            here = here[key] if isinstance(key, int) else here.setdefault(key, {})
            if not isinstance(here, dict | list):
                return f"{address!r}: {key!r} is a value, not a table"
        key = path[-1]
        here[key] = _replace(here.get(key), copy.deepcopy(value), path)
        for known in [p for p in self.places if p[: len(path)] == path]:
            del self.places[known]
        self.places[path] = place
        return ""


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe, what it extends, and the `--set` settings ("address=value", value in TOML).

    Raises `RecipeError` where a file is missing or is not TOML, or a setting names nothing.
    """
    recipe = _read(path, ())
    problems = []
    for setting in settings:
        address, equals, text = setting.partition("=")
        place = Place(f"--set {setting}")
        if not equals:
            problems.append(Problem(place, "write ADDRESS=VALUE, such as prune.sparsity=0.95"))
            continue
        message = recipe.assign(address.strip(), _parse_value(text), place)
        if message:
            problems.append(Problem(place, message))
    if problems:
        raise RecipeError(problems)
    return recipe


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        # A bare word is a text: --set prune.pruner=lwm needs no quotes within quotes.
        return text.strip()


def _read(path: Path, above: tuple[Path, ...]) -> Recipe:
    place = Place(relative(path))
    path = path.resolve()
    if path in above:
        chain = " -> ".join(relative(p) for p in (*above, path))
        raise RecipeError([Problem(place, f"extends itself: {chain}")])
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no recipe {place}") from None
    except IsADirectoryError:
        raise UserError(f"{place} is a folder, not a recipe") from None
    except UnicodeDecodeError:
        raise RecipeError([Problem(place, "is not a text file in UTF-8")]) from None
    except OSError as error:
        raise UserError(f"cannot read {place}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        message, line = _explain(error, path)
        raise RecipeError([Problem(Place(place.file, line), message)]) from None
    recipe = Recipe(path, data, {p: (path, p) for p in _paths(data)})
    base = data.pop("extends", None)
    if base is not None:
        if not isinstance(base, str):
            raise RecipeError([Problem(recipe.locate(("extends",)), 'write extends = "FILE.toml"')])
        below = path.parent / base
        if not below.is_file():
            raise RecipeError(
                [Problem(recipe.locate(("extends",)), f"there is no recipe {relative(below)}")]
            )
        recipe = _merge(_read(below, (*above, path)), recipe)
    settings = recipe.data.pop("set", {})
    problems = []
    for address, value in flatten(settings):
        message = recipe.assign(address, value, (path, _written(path, "set", address)))
        if message:
            problems.append(Problem(recipe.locate(("set", address)), message))
    if problems:
        raise RecipeError(problems)
    return recipe


def _explain(error: tomllib.TOMLDecodeError, path: Path) -> tuple[str, int]:
    text = str(error)
    found = re.search(r"\(at line (\d+), column \d+\)", text)
    line = int(found[1]) if found else len(path.read_text().splitlines())
    return "is not TOML: " + re.sub(r" \(at .*\)$", "", text), line


def _merge(base: Recipe, top: Recipe) -> Recipe:
    """`top` over `base`: tables key by key, everything else as a whole."""
    merged = Recipe(top.path, base.data, base.places)

    def put(into: dict[str, Any], table: Mapping[str, Any], path: KeyPath) -> None:
        for key, value in table.items():
            here = (*path, key)
            old = into.get(key)
            if (
                isinstance(value, dict)
                and isinstance(old, dict)
                and value.get("use", old.get("use")) == old.get("use")
            ):
                put(old, value, here)
                merged.places[here] = top.places[here]
                continue
            into[key] = _replace(old, value, here)
            for stale in [p for p in merged.places if p[: len(here)] == here]:
                if not _keeps(here, stale):
                    del merged.places[stale]
            merged.places.update(
                {p: place for p, place in top.places.items() if p[: len(here)] == here}
            )

    put(merged.data, top.data, ())
    return merged


def _keeps(section: KeyPath, path: KeyPath) -> bool:
    return section == ("dataset",) and len(path) > 1 and path[1] in DATA_KEYS


def _replace(old: Any, new: Any, path: KeyPath) -> Any:
    """The new value; a new data set keeps the old one's batch size and the like."""
    if path == ("dataset",) and isinstance(old, dict):
        table = {"use": new} if isinstance(new, str) else new
        return {**{k: v for k, v in old.items() if k in DATA_KEYS}, **table}
    return new


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(address, value) pairs of a table of settings, dotted keys joined again."""
    for key, value in table.items():
        if isinstance(value, Mapping) and "use" not in value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _written(path: Path, table: str, address: str) -> KeyPath:
    """The key path under which an address stands in a file: as one quoted key, or dotted."""
    quoted: KeyPath = (table, address)
    return quoted if quoted in find_lines(path) else (table, *address.split("."))


def resolve_address(data: Mapping[str, Any], address: str) -> KeyPath | str:
    """The key path of a sweep's address, or a message: "prune.sparsity", "objective.beta", "seed".

    The first word is a stage's name, its kind where only one stage has it, or a section.
    """
    first, *rest = address.split(".")
    stages = [s for s in data.get("stage", []) if isinstance(s, dict)]
    names = [s.get("name", s.get("kind")) for s in stages]
    if first in names and rest:
        if names.count(first) > 1:
            return f"{address!r}: {names.count(first)} stages are called {first!r}; give them names"
        return ("stage", names.index(first), *rest)
    kinds = [s.get("kind") for s in stages]
    if rest and kinds.count(first) == 1:
        return ("stage", kinds.index(first), *rest)
    if first in (*SECTIONS, "seed", "name"):
        return (first, *rest)
    if first in names:
        return f"{address!r} names a stage; say which option, such as {first}.epochs"
    words = {*SECTIONS, "seed", *map(str, names)}
    return f"{address!r} names no stage and no section; {suggest(first, words)}"


def _paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    yield path
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from _paths(inner, (*path, key))


@cache
def find_lines(file: Path) -> dict[KeyPath, int]:
    """Key path -> line (from 1) of the statement that first mentions it.

    tomllib tells no positions, so growing prefixes of the file are parsed: a path that is new in a
    prefix belongs to the statement that starts after the last prefix that could be parsed.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    found: dict[KeyPath, int] = {}
    start = None
    for number, line in enumerate(lines, start=1):
        if start is None and line.strip() and not line.lstrip().startswith("#"):
            start = number
        if start is None:
            continue
        try:
            data = tomllib.loads("\n".join(lines[:number]))
        except tomllib.TOMLDecodeError:
            continue
        for path in _paths(data):
            found.setdefault(path, start)
        start = None
    return found
