"""TOML -> Recipe: tables merged over `extends`, every value with the place that says it."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.errors import Place, Problem, RecipeError, relative
from prunekit.recipe.sections import DATA_KEYS
from prunekit.recipe.toml_lines import read_toml
from prunekit.recipe.values import KeyPath, suggest

FORMAT = 1
"""Version of the recipe format."""

SECTIONS = ("dataset", "architecture", "threat", "objective")


@dataclass(frozen=True)
class Setting:
    """A value for what an address names: of `--set`, of [set], or one of a sweep's."""

    address: str
    value: Any
    place: Place


@dataclass
class Recipe:
    """A recipe as it was written: `data` is plain TOML data, `places` say where it stands."""

    path: Path
    data: dict[str, Any]
    places: dict[KeyPath, Place] = field(default_factory=dict)
    overrides: list[Setting] = field(default_factory=list)
    """What `--set` said: it is in `data` already, and stays so whatever a sweep replaces."""

    def locate(self, path: KeyPath) -> Place:
        """Where the value, or what it is part of, was written."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places[path] if path else Place(relative(self.path), 1)

    def settings(self, table: Mapping[str, Any], path: KeyPath) -> Iterator[Setting]:
        """The settings that the table at `path` lists."""
        for inner, value in flatten(table, path):
            yield Setting(".".join(map(str, inner[len(path) :])), value, self.locate(inner))

    def assign(self, setting: Setting) -> list[Problem]:
        """Set what the address names; tells where there is no such thing.

        Replacing a component drops the options of the old one.
        """
        path = resolve_address(self.data, setting.address)
        if isinstance(path, str):
            return [Problem(setting.place, path)]
        here: Any = self.data
        for depth, key in enumerate(path[:-1], start=1):
            if isinstance(here, dict):
                if key not in here:
                    here[key] = {}
                    self.places[path[:depth]] = setting.place
                elif isinstance(here[key], str):
                    here[key] = {"use": here[key]}
            here = here[key]
            # The only list that an address leads into is that of the stages.
            if not isinstance(here, dict) and path[:depth] != ("stage",):
                what = "a list; set all of it" if isinstance(here, list) else "no table"
                return [Problem(setting.place, f"{setting.address!r}: {key!r} is {what}")]
        key = path[-1]
        here[key] = _replace(here.get(key), copy.deepcopy(setting.value), path)
        self._forget(path)
        self.places[path] = setting.place
        return []

    def drop_from_sweep(self, address: str) -> None:
        """Take an address out of the sweep: `--set` has decided it."""
        sweep = self.data.get("sweep")
        if not isinstance(sweep, dict):
            return
        target = resolve_address(self.data, address)
        cases = sweep.get("case")
        cases = [c for c in cases if isinstance(c, dict)] if isinstance(cases, list) else []
        for table in (sweep, *cases):
            for inner, _ in flatten(table):
                if resolve_address(self.data, ".".join(map(str, inner))) == target:
                    _delete(table, inner)
        if cases and not any(map(flatten, cases)):
            del sweep["case"]
        if not flatten(sweep):
            del self.data["sweep"]

    def _forget(self, path: KeyPath) -> None:
        for known in [p for p in self.places if p[: len(path)] == path and not _keeps(path, p)]:
            del self.places[known]


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe, what it extends, and the `--set` settings ("address=value", value in TOML).

    Raises `RecipeError` where a file is missing or is not TOML, or a setting names nothing.
    """
    recipe = _read(path, ())
    override(recipe, settings)
    return recipe


def override(recipe: Recipe, settings: Sequence[str]) -> None:
    """Apply `--set` settings. Raises `RecipeError` where one names nothing."""
    problems, found = [], []
    for text in settings:
        address, equals, value = text.partition("=")
        setting = Setting(address.strip(), parse_value(value), Place(f"--set {text}"))
        if not equals:
            message = "write ADDRESS=VALUE, such as prune.sparsity=0.95"
            problems.append(Problem(setting.place, message))
            continue
        found.append(setting)
    apply(recipe, found, problems)


def apply(recipe: Recipe, settings: Iterable[Setting], problems: Sequence[Problem] = ()) -> None:
    """Put settings over what the recipe and its sweep say.

    Raises `RecipeError` where one names nothing, and where there were `problems` before.
    """
    problems = list(problems)
    for setting in settings:
        wrong = recipe.assign(setting)
        problems += wrong
        if not wrong:
            recipe.overrides.append(setting)
            recipe.drop_from_sweep(setting.address)
    if problems:
        raise RecipeError(problems)


def parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        # A bare word is a text: --set prune.pruner=lwm needs no quotes within quotes.
        return text.strip()


def _read(path: Path, above: tuple[Path, ...]) -> Recipe:
    file = relative(path)
    path = path.resolve()
    if path in above:
        chain = " -> ".join(relative(p) for p in (*above, path))
        raise RecipeError([Problem(Place(file), f"extends itself: {chain}")])
    data, places = read_toml(path)
    recipe = Recipe(path, data, places)
    base = data.pop("extends", None)
    if base is not None:
        place = recipe.locate(("extends",))
        if not isinstance(base, str):
            raise RecipeError([Problem(place, 'write extends = "FILE.toml"')])
        below = path.parent / base
        if not below.is_file():
            raise RecipeError([Problem(place, f"there is no recipe {relative(below)}")])
        recipe = _merge(_read(below, (*above, path)), recipe)
    settings = recipe.data.pop("set", {})
    if not isinstance(settings, dict):
        message = 'write [set] with addresses, such as "prune.sparsity" = 0.95'
        raise RecipeError([Problem(recipe.locate(("set",)), message)])
    problems = [p for s in recipe.settings(settings, ("set",)) for p in recipe.assign(s)]
    if problems:
        raise RecipeError(problems)
    return recipe


def _merge(base: Recipe, top: Recipe) -> Recipe:
    """`top` over `base`: tables key by key, everything else as a whole."""
    merged = Recipe(top.path, base.data, base.places)

    def put(into: dict[str, Any], table: Mapping[str, Any], path: KeyPath) -> None:
        for key, value in table.items():
            here = (*path, key)
            if isinstance(value, dict) and isinstance(into.get(key), str):
                into[key] = {"use": into[key]}
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
            merged._forget(here)
            merged.places |= {p: at for p, at in top.places.items() if p[: len(here)] == here}

    put(merged.data, top.data, ())
    return merged


def _keeps(section: KeyPath, path: KeyPath) -> bool:
    return section == ("dataset",) and len(path) > 1 and path[1] in DATA_KEYS


def _replace(old: Any, new: Any, path: KeyPath) -> Any:
    """The new value; a new data set keeps the old one's batch size and the like."""
    if path != ("dataset",) or not isinstance(old, dict) or not isinstance(new, dict | str):
        return new
    table = {"use": new} if isinstance(new, str) else new
    return {**{k: v for k, v in old.items() if k in DATA_KEYS}, **table}


def _delete(table: dict[str, Any], path: KeyPath) -> None:
    for key in path[:-1]:
        table = table[key]  # type: ignore[index]
    del table[path[-1]]  # type: ignore[arg-type]


def flatten(table: Mapping[str, Any], path: KeyPath = ()) -> list[tuple[KeyPath, Any]]:
    """(key path, value) of each setting in a table; a component's table is one value."""
    found: list[tuple[KeyPath, Any]] = []
    for key, value in table.items():
        if isinstance(value, Mapping) and "use" not in value:
            found += flatten(value, (*path, key))
        else:
            found.append(((*path, key), value))
    return found


def resolve_address(data: Mapping[str, Any], address: str) -> KeyPath | str:
    """The key path of a sweep's address, or a message: "prune.sparsity", "objective.beta", "seed".

    The first word is a stage's name, its kind where only one stage has it, or a section.
    """
    first, *rest = address.removesuffix(".use").split(".")
    listed = data.get("stage")
    stages = [
        s if isinstance(s, dict) else {} for s in (listed if isinstance(listed, list) else [])
    ]
    names = [s.get("name", s.get("kind")) for s in stages]
    if first in names and rest:
        if names.count(first) > 1:
            return f"{address!r}: {names.count(first)} stages are called {first!r}; give them names"
        return ("stage", names.index(first), *rest)
    kinds = [s.get("kind") for s in stages]
    if rest and kinds.count(first) == 1:
        return ("stage", kinds.index(first), *rest)
    if first in (*SECTIONS, "seed", "name", "report"):
        return (first, *rest)
    if first in names:
        return f"{address!r} names a stage; say which option, such as {first}.epochs"
    words = {*SECTIONS, "seed", *(str(name) for name in names if name)}
    return f"{address!r} names no stage and no section; {suggest(first, words)}"
