"""What a run was made with, read from the resolved recipe in its folder: address -> value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.errors import UserError
from prunekit.recipe.toml.addresses import resolve_address
from prunekit.recipe.toml.lines import read_toml
from prunekit.store.layout import RECIPE

ELSEWHERE = ("format", "name", "seed", "report", "compute", "stage")
"""Keys of a recipe that decide no result, or are told otherwise."""


@dataclass(frozen=True)
class Settings:
    """The settings of a run by their addresses, defaults included, but not its seed.

    `general` are those of its data, network, threat and training stages, and `judging` those of
    each evaluate stage, such as "pgd.steps" and "evaluate.images". `swept` are those that a sweep,
    or `prunekit eval`, gave to this run, and all that is known where there is no recipe.
    """

    general: Mapping[str, Any] = field(default_factory=dict)
    judging: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    swept: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    """Address as a sweep wrote it -> as it stands here."""
    training: tuple[str, ...] = ()
    """The names of the training stages."""
    before: Mapping[str, int] = field(default_factory=dict)
    """Evaluate stage -> how many training stages are before it: its result depends on no others."""

    def of(self, stage: str) -> dict[str, Any]:
        """The settings that bear on the result of an evaluate stage; all, if it is unknown."""
        last = self.before.get(stage, len(self.training))
        later = self.training[last:]
        others = {a for own in self.judging.values() for a in own} if stage in self.before else ()
        every = {**{a: v for a, v in self.swept.items() if a not in others}, **self.general}
        bears = {a: v for a, v in every.items() if a.partition(".")[0] not in later}
        if stage in self.before and not last:
            bears = {a: v for a, v in bears.items() if a.partition(".")[0] != "objective"}
        return {**bears, **self.judging.get(stage, {})}


def read_settings(folder: Path, given: Mapping[str, Any]) -> Settings:
    """The settings of the run in a folder, to which a sweep has `given` values for addresses."""
    recipe: dict[str, Any] = {}
    with suppress(UserError):  # nobody promises that the file is as it was written
        recipe = read_toml(folder / RECIPE)[0]
    return _describe(recipe if isinstance(recipe.get("stage"), list) else {}, given)


def _describe(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    general: dict[str, Any] = {}
    judging: dict[str, dict[str, Any]] = {}
    training: list[str] = []
    before: dict[str, int] = {}
    for key, value in recipe.items():
        if key not in ELSEWHERE:
            general |= _flatten(value, key)
    for stage in recipe.get("stage", ()):
        if not isinstance(stage, dict):
            continue
        name = str(stage.get("name", stage.get("kind")))
        table = {key: value for key, value in stage.items() if key not in ("kind", "name", "with")}
        if stage.get("kind") == "evaluate":
            judging[name] = dict(_flatten(table, "evaluate"))
            for own, use in _list_components(stage.get("with")):
                judging[name] |= _flatten(use, own)
            before[name] = len(training)
        else:
            training.append(name)
            general |= _flatten(table, name)
    names = {a: _name(recipe, a) for a in given if a.partition(".")[0] not in ELSEWHERE}
    swept: dict[str, Any] = {}
    for address, name in names.items():
        value = given[address]
        if name == "evaluate.with" or isinstance(general.get(name), str):
            value = _as_tables(value)
        # The evaluators' options are at the addresses that `judging` has.
        told = _flatten(value, name)
        swept |= {a.removeprefix("evaluate.with."): v for a, v in told}
    return Settings(general, judging, swept, names, tuple(training), before)


def _flatten(value: Any, address: str) -> Iterator[tuple[str, Any]]:
    """(address, value) of all that is in a table; a component has the address of its options.

    A list of components has their names, joined, and below its address the options of each.
    """
    if isinstance(value, dict):
        if "use" in value:
            yield address, value["use"]
        for key, inner in value.items():
            if key != "use":
                yield from _flatten(inner, f"{address}.{key}")
    elif components := _list_components(value):
        yield address, ", ".join(name for name, _ in components)
        for name, table in components:
            options = {key: inner for key, inner in table.items() if key != "use"}
            yield from _flatten(options, f"{address}.{name}")
    else:
        yield address, value


def _list_components(value: Any) -> list[tuple[str, dict[str, Any]]]:
    """(name, table without it) of each component, where a value is a list of them; else none."""
    if not isinstance(value, list) or not all(isinstance(i, dict) and "use" in i for i in value):
        return []
    return [
        (
            str(item.get("name", item["use"])).rpartition(":")[2],
            {key: inner for key, inner in item.items() if key != "name"},
        )
        for item in value
    ]


def _as_tables(value: Any) -> Any:
    """A list of components as a sweep wrote it, names alone among them, as a recipe has it."""
    if not isinstance(value, list):
        return value
    return [{"use": item} if isinstance(item, str) else item for item in value]


def _name(recipe: Mapping[str, Any], address: str) -> str:
    """The address under which `_flatten` has what a sweep may call by several."""
    path = resolve_address(recipe, address) if recipe else address
    if isinstance(path, str):
        return address.removesuffix(".use")
    here: Any = recipe
    words: list[str] = []
    for key in path:
        inside = isinstance(here, list)
        here = here[key] if inside or (isinstance(here, dict) and key in here) else None
        if inside and isinstance(here, dict):
            key = str(here.get("name", here.get("use", here.get("kind")))).rpartition(":")[2]
        words.append(str(key))
    if path[0] != "stage":
        return ".".join(words)
    judges = recipe["stage"][path[1]].get("kind") == "evaluate"
    if judges and len(words) > 3 and words[2] == "with":
        return ".".join(words[3:])
    return ".".join(["evaluate", *words[2:]] if judges else words[1:])
