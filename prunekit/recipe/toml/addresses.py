"""Addresses such as "prune.sparsity" or "evaluate.pgd.steps": what they name in a recipe's data."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin

from prunekit.catalog.component import default_of
from prunekit.catalog.kinds import KINDS, find_kind
from prunekit.catalog.registry import Registry
from prunekit.errors import MOST_SHOWN, suggest, translate
from prunekit.recipe.toml.lines import KeyPath
from prunekit.recipe.toml.sections import (
    SELECTION_KEYS,
    STAGE_OPTIONS,
    ArchitectureOptions,
    ComputeOptions,
    DataOptions,
    ThreatOptions,
)

SECTIONS = ("compute", "dataset", "architecture", "threat", "objective")
TOP_KEYS = ("format", "name", "seed", *SECTIONS, "stage", "sweep", "report")
"""Keys at the top of a recipe, once `extends` and [set] are applied."""
LONGEST_NAME = 100
"""Most characters of a recipe's name; it may take twice as many bytes, of 255 in a file's name."""
OPTIONS = {
    "compute": ComputeOptions,
    "dataset": DataOptions,
    "architecture": ArchitectureOptions,
    "threat": ThreatOptions,
}
"""Section -> its keys that are the core's."""

OPTIMIZER_KEYS = {"lr", "momentum", "weight_decay", "schedule"}
"""What most optimizers take."""

MOST_WAYS = 3
"""Most places that are suggested for an option without one."""

EVALUATE_KEYS = (
    "kind",
    "name",
    *(f.name.rstrip("_") for f in dataclasses.fields(STAGE_OPTIONS["evaluate"])),
)


def is_misspelt(data: Mapping[str, Any], key: str) -> bool:
    """Whether a key that a recipe does not know, which is shown, was meant to be this one."""
    unknown = [k for k in data if k not in TOP_KEYS][:MOST_SHOWN]
    return any(suggest(k, TOP_KEYS) == f"did you mean {key!r}?" for k in unknown)


def find_name_fault(name: Any) -> str:
    """What to write instead of a recipe's name that cannot be one of a folder; "" if it can."""
    if not isinstance(name, str) or not re.fullmatch(r"[^./\\\s][^/\\\x00-\x1f]*", name):
        return "write a word without '/'"
    too_long = len(name) > LONGEST_NAME or len(name.encode()) > 2 * LONGEST_NAME
    return f"write at most {LONGEST_NAME} characters" if too_long else ""


def resolve_address(data: Mapping[str, Any], address: str) -> KeyPath | str:
    """The key path of an address such as "prune.sparsity" or "seed", or a message if there is none.

    The first word is a section, the name of a stage, or its kind if only one stage has that. A
    component in a list is called by its name: "pretrain.wrap.ema.decay". For evaluators `with` may
    be left out, and the stage too if one alone has an evaluator of that name: "pgd.steps".
    """
    path = _find_start(data, address.removesuffix(".use").split("."), address)
    return path if isinstance(path, str) else _enter_lists(data, path, address)


def _find_start(data: Mapping[str, Any], words: list[str], address: str) -> KeyPath | str:
    first, *rest = words
    listed = data.get("stage")
    stages = [s if isinstance(s, dict) else {} for s in listed] if isinstance(listed, list) else []
    names = [s.get("name", s.get("kind")) for s in stages]
    kinds = [s.get("kind") for s in stages]
    if rest and names.count(first) > 1:
        return f"{address!r}: {names.count(first)} stages are called {first!r}; give them names"
    if rest and (first in names or kinds.count(first) == 1):
        number = (names if first in names else kinds).index(first)
        return ("stage", number, *_add_with(stages[number], words))
    if first in (*SECTIONS, "seed", "name", "report"):
        return (first, *rest)
    if first in names:
        option = _example(kinds[names.index(first)], first)
        return f"{address!r} is a stage; name one of its options, such as {option}"
    owners = [n for n, s in enumerate(stages) if first in _names_in(s.get("with"))]
    if rest and len(owners) == 1:
        return ("stage", owners[0], "with", *words)
    if not rest and kinds.count(first) > 1:
        named = [_example(first, str(n)) for n, k in zip(names, kinds, strict=True) if k == first]
        ways = " or ".join(named[:MOST_WAYS])
        return f"{address!r}: {len(named)} stages are of that kind; write an option, such as {ways}"
    if len(owners) > 1 or kinds.count(first) > 1:
        several = owners or [n for n, kind in enumerate(kinds) if kind == first]
        ways = " or ".join(".".join([str(names[n]), *(words if owners else rest)]) for n in several)
        return f"{address!r}: {len(several)} stages have that; write {ways}"
    known = {*SECTIONS, "seed", *(str(name) for name in names if name)}
    advice = "" if rest else _find_owner(first, data, stages)
    return f"{address!r} names no stage and no section; {advice or suggest(first, known)}"


def _example(kind: Any, name: str) -> str:
    return f"{name}.{'with' if kind == 'evaluate' else 'epochs'}"


def _find_owner(word: str, data: Mapping[str, Any], stages: list[dict[str, Any]]) -> str:
    """What to write for an option without its section or stage; "" if it is of none."""
    tables: list[tuple[str, Iterable[str]]] = [(s, _hints(cls)) for s, cls in OPTIONS.items()]
    tables += [(s, data[s]) for s in SECTIONS if isinstance(data.get(s), dict)]
    for stage in stages:
        kind, name = stage.get("kind"), stage.get("name", stage.get("kind"))
        keys = set(_hints(STAGE_OPTIONS[kind])) if kind in STAGE_OPTIONS else set()
        keys -= set() if kind == "prune" else {*SELECTION_KEYS}  # for a rewirer, where there is one
        inner = OPTIMIZER_KEYS if "optimizer" in keys else ()
        tables += [(str(name), keys), (f"{name}.optimizer", inner)]
        used = stage.get("with")
        pairs = zip(_names_in(used), used if isinstance(used, list) else (), strict=True)
        tables += [(f"{name}.{use}", table) for use, table in pairs if isinstance(table, dict)]
    found = {f"{owner}.{key}": key for owner, keys in tables if (key := translate(word, keys))}
    if not found:
        return ""
    more = suggest(word, found.values()).partition(",")[2]  # of a key that means something else
    return f"write {' or '.join([*found][:MOST_WAYS])}" + (f",{more}" if more else "")


def _add_with(stage: Mapping[str, Any], words: list[str]) -> list[str]:
    """The keys below a stage; of an evaluate stage, `with` is added where it was left out."""
    first, *rest = words
    evaluators = _names_in(stage.get("with"))
    if stage.get("kind") != "evaluate" or rest[0] in EVALUATE_KEYS:
        return rest
    if rest[0] in evaluators:
        return ["with", *rest]
    # A stage of `prunekit eval` is called as its evaluators are.
    return ["with", *words] if first in evaluators else rest


def _names_in(components: Any) -> list[str]:
    """What the components of a list are called."""
    found = []
    for item in components if isinstance(components, list) else ():
        name = item.get("name", item.get("use")) if isinstance(item, dict) else item
        found.append(str(name).rpartition(":")[2])
    return found


def _enter_lists(data: Mapping[str, Any], path: KeyPath, address: str) -> KeyPath | str:
    """The path with names of components in lists as their numbers."""
    here: Any = data
    found: list[str | int] = []
    for key in path:
        if isinstance(here, list) and isinstance(key, str):
            names = _names_in(here)
            if not all(isinstance(item, str | dict) for item in here):
                return f"{address!r}: {found[-1]!r} is a list; set the whole list"
            if names.count(key) != 1:
                many = "is there several times; give each a name" if key in names else ""
                return (
                    f"{address!r}: {key!r} {many or f'is not in the list; {suggest(key, names)}'}"
                )
            key = names.index(key)
        found.append(key)
        there = isinstance(here, dict) and key in here
        here = here[key] if there or isinstance(here, list) else None
    if len(found) > 2 and isinstance(found[-1], int):
        return f"{address!r} is in a list; name one of its options, or set the whole list"
    return tuple(found)


def takes_list(data: Mapping[str, Any], path: KeyPath, registry: Registry) -> bool:
    """Whether the option at a key path is a list by its type; True where that is not known."""
    first, *rest = path
    if first == "stage":
        table = data["stage"][path[1]]
        cls: type | None = STAGE_OPTIONS.get(str(table.get("kind")))
        hint = _find_hint(cls, table, list(path[2:]), registry)
    elif not rest:  # the seed, or a component that is chosen for a whole section
        return first == "report"
    else:
        table, cls = data.get(str(first)), OPTIONS.get(str(first))
        if cls is None or rest[0] not in _hints(cls):
            cls = _options_of(str(first), table, registry)
        hint = _find_hint(cls, table, rest, registry)
    return hint is None or _is_list(hint)


def _find_hint(cls: type | None, table: Any, path: list[Any], registry: Registry) -> Any:
    """The type of the option at a path below a table of the options `cls`; None if not known."""
    key, *rest = path
    if cls is None or key not in (hints := _hints(cls)):
        return None
    kind, many = find_kind(hints[key]), get_origin(hints[key]) is tuple
    default = _default(cls, key)
    inner = table.get(key, default) if isinstance(table, dict) else default
    if isinstance(inner, dict) and "use" not in inner:  # options of the default
        inner = {"use": default.get("use") if isinstance(default, dict) else default, **inner}
    if many and rest:
        number, *rest = rest
        inner = inner[number]
    elif not rest:
        return hints[key]
    return kind and _find_hint(_options_of(kind, inner, registry), inner, rest, registry)


def _hints(cls: type) -> dict[str, Any]:
    return {name.removesuffix("_"): hint for name, hint in typing.get_type_hints(cls).items()}


def _default(cls: type, key: str) -> Any:
    fields = {f.name.removesuffix("_"): f for f in dataclasses.fields(cls)}
    return default_of(fields[key]) if key in fields else None


def _options_of(kind: str, table: Any, registry: Registry) -> type | None:
    """The options of the component that a table, or a name, chooses."""
    name = table.get("use") if isinstance(table, dict) else table
    found = registry.search(str(name), kind) if kind in KINDS else []
    return found[0].component.options if found else None


def _is_list(hint: Any) -> bool:
    if isinstance(hint, types.UnionType) or get_origin(hint) is typing.Union:
        return any(map(_is_list, get_args(hint)))
    return hint is Any or get_origin(hint) in (tuple, list, dict)
