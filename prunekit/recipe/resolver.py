"""TOML values -> typed options: every mistake is collected with its place and a way out."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from prunekit import contracts
from prunekit.catalog.component import Radius, Use, default_of
from prunekit.catalog.registry import Registry
from prunekit.contracts import Threat
from prunekit.errors import OptionError, Place, Problem, UserError, explain_briefly
from prunekit.recipe.values import (
    KeyPath,
    Mistake,
    Slot,
    example_of,
    read_plain,
    read_radius,
    suggest,
)
from prunekit.report import Reporter

KIND_OF: dict[Any, str] = {
    contracts.Objective: "objective",
    contracts.Pruner: "pruner",
    contracts.Architecture: "architecture",
    contracts.Data: "dataset",
    contracts.Evaluator: "evaluator",
    Reporter: "reporter",
    contracts.OptimizerChoice: "optimizer",
    contracts.Schedule: "schedule",
}


def key_of(field_name: str) -> str:
    """The recipe's key of a field: Python's keywords have an underscore behind them."""
    return field_name.removesuffix("_")


def field_types(options: type) -> dict[str, Any]:
    """Field name -> type of an options dataclass."""
    return typing.get_type_hints(options)


class Recorded(Exception):
    """There is no value; its problems are recorded already."""


@dataclass
class Resolver:
    """Turns the tables of one recipe into options; `problems` collects what is wrong."""

    registry: Registry
    folder: Path
    locate: Callable[[KeyPath], Place]
    threat: Threat | None = None
    problems: list[Problem] = field(default_factory=list)

    def problem(self, path: KeyPath, message: str) -> None:
        self.problems.append(Problem(self.locate(path), message))

    @contextmanager
    def _collecting(self) -> Iterator[None]:
        """Turns a mistake inside into a problem, and goes on."""
        try:
            yield
        except Recorded:
            pass
        except Mistake as mistake:
            self.problem(mistake.path, str(mistake))

    def options(
        self,
        cls: type,
        table: Mapping[str, Any],
        path: KeyPath,
        owner: str,
        core: Collection[str] = (),
        plugin: str = "",
    ) -> Any | None:
        """Build the options dataclass from a table; None where a problem was recorded.

        `core` are the keys beside them that the core takes, for suggestions; `plugin` is whose
        dataclass it is.
        """
        hints = field_types(cls)
        values: dict[str, Any] = {}
        fields = {key_of(f.name): f for f in dataclasses.fields(cls)}
        before = len(self.problems)
        for key in table:
            if key not in fields:
                advice = suggest(key, (*fields, *core))
                self.problem((*path, key), f"unknown option {key!r} of {owner}; {advice}")
        norm = table.get("norm") or (self.threat.norm if self.threat else "linf")
        for key, f in fields.items():
            default = default_of(f)
            if key not in table and default is dataclasses.MISSING:
                way = f"{f.metadata.get('help', '')}; write {key} = {example_of(hints[f.name])}"
                self.problem(path, f"{owner} needs {key}: {way}")
                continue
            value = _over_default(table[key], default) if key in table else default
            slot = Slot((*path, key), f, owner, f.metadata.get("norm") or norm)
            with self._collecting():
                values[f.name] = None if value is None else self._value(hints[f.name], value, slot)
        if len(self.problems) > before:
            return None
        try:
            return cls(**values)
        except OptionError as error:
            self.problem((*path, key_of(error.field)), f"{owner}: {error}")
        # What a plugin's own check raises instead.
        except Exception as error:
            reason = explain_briefly(error)
            of_plugin = f" of plugin {plugin}" if plugin else ""
            self.problem(path, f"{owner}{of_plugin} refuses its options: {reason}")
        return None

    def use(
        self, kind: str, value: Any, path: KeyPath, core: Collection[str] = ()
    ) -> Use[Any] | None:
        """A component named by a string, or by a table with `use` and options."""
        with self._collecting():
            return self._use(kind, value, path, core)
        return None

    def _use(self, kind: str, value: Any, path: KeyPath, core: Collection[str] = ()) -> Use[Any]:
        table = {"use": value} if isinstance(value, str) else value
        if not isinstance(table, Mapping) or not isinstance(table.get("use"), str):
            key = path[-1] if isinstance(path[-1], str) else f"{path[-2]}[{path[-1]}]"
            example = next(iter(self.registry.names(kind)), "NAME")
            way = f'write use = "{example}" (prunekit list {kind}s)'
            raise Mistake(path, f"{key} needs a name; {way}")
        try:
            entry = self.registry.find(kind, table["use"])
        except UserError as error:
            raise Mistake((*path, "use"), str(error)) from None
        component, owner = entry.component, f"{kind} {entry.component.name!r}"
        core = ("name", *core) if kind == "evaluator" else core
        own = {k: v for k, v in table.items() if k != "use" and k not in core}
        options = self.options(component.options, own, path, owner, core, entry.owner)
        if options is None:
            raise Recorded
        name = table.get("name", component.name) if kind == "evaluator" else component.name
        # Part of paths and of the names of metrics.
        if not isinstance(name, str) or not re.fullmatch(r"[\w+-]+", name):
            way = f"name of {owner} is letters, digits, '-', '_' and '+', got {name!r}"
            raise Mistake((*path, "name"), way)
        threat = self._threat(options, path, owner)
        return Use(kind, component, options, entry.owner, name, threat, entry.reference)

    def _threat(self, options: Any, path: KeyPath, owner: str) -> Threat | None:
        if not (hasattr(options, "eps") and hasattr(options, "norm")):
            return None
        if self.threat is None and options.eps is None:
            way = 'write [threat] with norm = "linf" and eps = "8/255"'
            raise Mistake(path, f"{owner} needs a threat; {way}")
        base = self.threat or Threat("linf", 0.0)
        return Threat(options.norm or base.norm, base.eps if options.eps is None else options.eps)

    # Values

    def _value(self, hint: Any, value: Any, slot: Slot) -> Any:
        """One value, of the type `hint`. Raises `Mistake`; those of lists are recorded already."""
        origin, arguments = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            (hint,) = (a for a in arguments if a is not type(None))
            return self._value(hint, value, slot)
        if origin is Use:
            return self._use(KIND_OF[arguments[0]], value, slot.path)
        if origin is tuple:
            return self._list(arguments, value, slot)
        if origin is Literal:
            # 1 == True in Python, not in a recipe.
            if not any(value == a and type(value) is type(a) for a in arguments):
                advice = suggest(str(value), map(str, arguments))
                raise Mistake(slot.path, f"{slot.name} cannot be {value!r}; {advice}")
            return value
        if origin is dict:
            if not isinstance(value, Mapping):
                raise slot.wants("a table", value)
            return dict(value)
        if hint is Any:
            return value
        if hint is Path:
            return self._path(value, slot)
        return read_radius(value, slot) if hint is Radius else read_plain(hint, value, slot)

    def _list(self, arguments: tuple[Any, ...], value: Any, slot: Slot) -> tuple[Any, ...]:
        single = arguments[-1] is Ellipsis
        if not isinstance(value, list | tuple):
            raise slot.wants(f"a list; write [{value!r}]" if single else "a list", value)
        if not single and len(value) != len(arguments):
            raise slot.wants(f"a list of {len(arguments)} values", value)
        items = []
        for i, item in enumerate(value):
            with self._collecting():
                items.append(self._value(arguments[0 if single else i], item, slot.item(i)))
        if len(items) < len(value):
            raise Recorded
        return tuple(items)

    def _path(self, value: Any, slot: Slot) -> Path:
        if isinstance(value, Path):
            return value
        if not isinstance(value, str):
            raise slot.wants("a path", value)
        place, folder, way = self.locate(slot.path), self.folder, "its recipe's folder"
        if place.line:
            # A recipe that is extended may be in another folder than the one that extends it.
            folder = Path(place.file).parent
        elif place.file.startswith("--set"):
            folder, way = Path(), "the folder you are in"
        file = folder.absolute() / Path(value).expanduser()
        if slot.field.metadata.get("exists") and not file.exists():
            message = f"{slot.name}: there is no {file}; a relative path starts at {way}"
            raise Mistake(slot.path, message)
        return file


def _over_default(value: Any, default: Any) -> Any:
    """A table without `use` changes single options of the component that is the default."""
    if not isinstance(value, Mapping) or "use" in value:
        return value
    base = {"use": default} if isinstance(default, str) else default
    return {**base, **value} if isinstance(base, Mapping) else value


def describe(value: Any, of_path: Callable[[Path], Any] = str) -> Any:
    """Options as plain data, defaults included, absent values left out: what a recipe could say.

    `of_path` says what stands for a file: its path in a recipe, its content in a hash.
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
