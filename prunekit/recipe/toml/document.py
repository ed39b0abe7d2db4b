"""TOML -> Recipe: `extends` and settings applied, and the place of every value known."""

from __future__ import annotations

import copy
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.errors import Place, Problem, RecipeError, UserError, nearest, relative, shorten_value
from prunekit.reading import DEEPEST, find_fault
from prunekit.recipe.toml.addresses import resolve_address
from prunekit.recipe.toml.lines import KeyPath, Unfit, check_recipe, find_lines, read_toml
from prunekit.recipe.toml.sections import DATA_KEYS

FORMAT = 1
"""Version of the recipe format."""


@dataclass(frozen=True)
class Setting:
    """A value for an address such as "prune.sparsity", from `--set`, [set] or a sweep."""

    address: str
    value: Any
    place: Place


@dataclass
class Recipe:
    """A recipe as written: `data` is plain TOML data, `places` says where each part stands."""

    path: Path
    data: dict[str, Any]
    places: dict[KeyPath, Place] = field(default_factory=dict)
    overrides: list[Setting] = field(default_factory=list)
    """The settings of `--set`. They are in `data` already, and also override a sweep."""
    foreign: dict[str, str] = field(default_factory=dict)
    """Top-level keys that the user did not write, as `Resolver.foreign`."""
    written: bool = True
    """Whether it is in a file; a table of Python has no lines."""

    def locate(self, path: KeyPath) -> Place:
        """Where a value was written, or else the innermost table that it belongs to.

        Of what is in no file, the keys that lead to it.
        """
        known = path
        while known and known not in self.places:
            known = known[:-1]
        if known:
            return self.places[known]
        if self.written:
            return Place(relative(self.path), 1)
        keys = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
        return Place(keys.removeprefix(".") or "the recipe")

    def settings(self, table: Mapping[str, Any], path: KeyPath) -> Iterator[Setting]:
        """The settings that the table at `path` lists."""
        for inner, value in flatten(table, path):
            yield Setting(".".join(map(str, inner[len(path) :])), value, self.locate(inner))

    def assign(self, setting: Setting) -> list[Problem]:
        """Set the value at an address. Returns a problem if the address names nothing.

        A new component does not keep the options of the one it replaces.
        """
        path = resolve_address(self.data, setting.address)
        if isinstance(path, str):
            return [Problem(setting.place, path)]
        here: Any = self.data
        for depth, key in enumerate(path[:-1], start=1):
            if isinstance(here, dict) and key not in here:
                here[key] = {}
                self.places[path[:depth]] = setting.place
            _name_component(here, key)
            here = here[key]
            # Lists that an address leads into are those of stages and of components.
            if not isinstance(here, dict | list):
                return [Problem(setting.place, f"{setting.address!r}: {key!r} is not a table")]
        self.replace(here, path, copy.deepcopy(setting.value), {path: setting.place})
        return []

    def replace(
        self, table: Any, path: KeyPath, value: Any, places: Mapping[KeyPath, Place]
    ) -> None:
        """Set the last key of `path`, in its table or list; `places` are those of the new value.

        A new data set keeps the core's keys, such as the batch size, from the one before.
        """
        old, kept = table.get(path[-1]) if isinstance(table, dict) else None, []
        if path == ("dataset",) and isinstance(old, dict) and isinstance(value, dict | str):
            value = {"use": value} if isinstance(value, str) else value
            kept = [key for key in old if key in DATA_KEYS and key not in value]
            value = {**{key: old[key] for key in kept}, **value}
        table[path[-1]] = value
        for known in list(self.places):
            if _is_below(known, path) and not any(_is_below(known, (*path, k)) for k in kept):
                del self.places[known]
        self.places |= places

    def narrow_sweep(self, setting: Setting) -> bool:
        """Put a list of values in the place of those that the sweep lists for this address.

        An option that takes lists is swept by a list of lists.
        """
        target, sweep = resolve_address(self.data, setting.address), self.data.get("sweep")
        axes = {k: v for k, v in sweep.items() if k != "case"} if isinstance(sweep, dict) else {}
        for path, values in flatten(axes, ("sweep",)):
            address = ".".join(map(str, path[1:]))
            if isinstance(values, list) and resolve_address(self.data, address) == target:
                lists = any(isinstance(value, list) for value in values)
                given = setting.value
                if isinstance(given, list) and (
                    not lists or all(isinstance(value, list) for value in given)
                ):
                    table: Any = self.data
                    for key in path[:-1]:
                        table = table[key]
                    self.replace(table, path, list(given), {path: setting.place})
                    return True
        return False

    def sweep_over(self, setting: Setting) -> None:
        """Make an axis of the sweep from a setting that was given a list of values."""
        self.overrides.remove(setting)
        values: list[Any] = setting.value
        if not values:
            message = f"{setting.address} lists no values to try; add some"
            raise RecipeError([Problem(setting.place, message)])
        self.assign(Setting(setting.address, values[0], setting.place))
        self.data.setdefault("sweep", {})[setting.address] = list(values)
        self.places[("sweep", setting.address)] = setting.place

    def drop_from_sweep(self, address: str) -> None:
        """Remove an address from the sweep, because `--set` has decided its value."""
        sweep = self.data.get("sweep")
        if not isinstance(sweep, dict):
            return
        target = resolve_address(self.data, address)
        listed = sweep.get("case")
        cases = [c for c in listed if isinstance(c, dict)] if isinstance(listed, list) else []
        for table in (sweep, *cases):
            self._drop(table, target)
        if cases and not any(cases):
            del sweep["case"]
        if not sweep:
            del self.data["sweep"]

    def _drop(self, table: dict[str, Any], target: KeyPath | str, prefix: str = "") -> None:
        for key, value in list(table.items()):
            if isinstance(value, dict) and "use" not in value:
                self._drop(value, target, f"{prefix}{key}.")
                if not value:
                    del table[key]
            elif resolve_address(self.data, f"{prefix}{key}") == target:
                del table[key]


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe, what it extends, and the `--set` settings ("address=value", value in TOML).

    Raises `UserError` if a file is missing or not TOML, or if a setting names nothing.
    """
    recipe = _read(path, ())
    override(recipe, settings)
    return recipe


def override(recipe: Recipe, settings: Sequence[str]) -> None:
    """Apply `--set` settings. Raises `RecipeError` if one names nothing."""
    chosen = []
    for text in settings:
        address, equals, value = text.partition("=")
        place = Place(f"--set {shorten_value(text)}")
        if not equals:
            raise RecipeError([Problem(place, "write ADDRESS=VALUE, such as prune.sparsity=0.95")])
        chosen.append(Setting(address.strip(), parse_value(value, place), place))
    apply(recipe, chosen)


def apply(recipe: Recipe, settings: Iterable[Setting]) -> None:
    """Set values that override the recipe and its sweep.

    Raises `RecipeError` with all settings that name nothing.
    """
    problems = []
    for setting in settings:
        if recipe.narrow_sweep(setting):
            continue
        wrong = recipe.assign(setting)
        problems += wrong
        if not wrong:
            recipe.overrides.append(setting)
            recipe.drop_from_sweep(setting.address)
    if problems:
        raise RecipeError(problems)


def locate_options(options: Mapping[Any, tuple[str, Any]]) -> dict[KeyPath, Place]:
    """The places of values that a command's options gave: key path -> (option, value or None)."""
    given = {path: pair for path, pair in options.items() if pair[1] is not None}
    return {path: Place(f"{option} {value}") for path, (option, value) in given.items()}


def parse_value(text: str, place: Place | None = None) -> Any:
    """A value in TOML; a word without quotes is a string, as in `--set prune.pruner=lwm`.

    Raises `RecipeError` for one that a recipe could not hold either: too deep, or not finite.
    """
    place = place or Place(f"--set {text}")
    try:
        find_lines(f"value = {text}")
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    except Unfit as error:
        raise RecipeError([Problem(place, f"the value {error}")]) from None
    if fault := find_fault(value):
        path, message = fault
        where = ".".join(map(str, ("the value", *path)))
        message += "; the norm is called linf" if value == float("inf") else ""
        raise RecipeError([Problem(place, f"{where} {message}")])
    return value


def _read(path: Path, above: tuple[Path, ...]) -> Recipe:
    # Not `resolve`, which fails for a link to itself.
    file, path = nearest(path), Path(os.path.realpath(path))
    if len(above) == DEEPEST:
        raise RecipeError([Problem(Place(file), f"is extended through {DEEPEST} recipes already")])
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
        try:
            check_recipe(below)
        except UserError as error:
            raise RecipeError([Problem(place, str(error))]) from None
        extended = _read(below, (*above, path))
        extended.path = path
        _merge(extended, extended.data, recipe, data)
        recipe = extended
    settings = recipe.data.pop("set", {})
    if not isinstance(settings, dict):
        message = 'write [set] with addresses, such as "prune.sparsity" = 0.95'
        raise RecipeError([Problem(recipe.locate(("set",)), message)])
    problems = [p for s in recipe.settings(settings, ("set",)) for p in recipe.assign(s)]
    if problems:
        raise RecipeError(problems)
    return recipe


def _merge(
    base: Recipe, into: dict[str, Any], top: Recipe, table: dict[str, Any], path: KeyPath = ()
) -> None:
    """Put `table` of `top` over `into` of `base`: tables key by key, other values as a whole."""
    for key, value in table.items():
        here = (*path, key)
        if isinstance(value, dict):
            _name_component(into, key)
            old = into.get(key)
            if isinstance(old, dict) and value.get("use", old.get("use")) == old.get("use"):
                _merge(base, old, top, value, here)
                base.places[here] = top.places[here]
                continue
        places = {known: place for known, place in top.places.items() if _is_below(known, here)}
        base.replace(into, here, value, places)


def _name_component(table: Any, key: Any) -> None:
    """Write a component that is a bare name as a table, so that it can take options."""
    if (isinstance(table, list) or key in table) and isinstance(table[key], str):
        table[key] = {"use": table[key]}


def _is_below(path: KeyPath, table: KeyPath) -> bool:
    return path[: len(table)] == table


def flatten(table: Mapping[str, Any], path: KeyPath = ()) -> list[tuple[KeyPath, Any]]:
    """(key path, value) of each setting in a table; a component's table is one value."""
    found: list[tuple[KeyPath, Any]] = []
    for key, value in table.items():
        if isinstance(value, Mapping) and "use" not in value:
            found += flatten(value, (*path, key))
        else:
            found.append(((*path, key), value))
    return found
