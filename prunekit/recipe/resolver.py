"""TOML values -> typed options. Every mistake is collected, with its place and what to write."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from prunekit.catalog.component import Radius, Threatened, Use, default_of
from prunekit.catalog.containment import contained
from prunekit.catalog.kinds import KIND_OF, find_kind
from prunekit.catalog.registry import Registry
from prunekit.contracts import Threat
from prunekit.errors import (
    OptionError,
    Place,
    Problem,
    UserError,
    explain_briefly,
    in_order,
    suggest,
    translate,
)
from prunekit.recipe.describing import field_types, key_of
from prunekit.recipe.toml.lines import KeyPath
from prunekit.recipe.trust import Guard
from prunekit.recipe.values import (
    NAME,
    NAME_RULE,
    Mistake,
    Slot,
    example_of,
    last_key,
    read_choice,
    read_path,
    read_plain,
    read_radius,
    write_value,
)

Method = TypeVar("Method", bound=Callable[..., Any])

THREAT_EXAMPLE = 'write [threat] with norm = "linf" and eps = "8/255"'


class Recorded(Exception):
    """There is no value, and the problems that say why have been recorded."""


def _once(method: Method) -> Method:
    """Let `method(resolver, what, value, path, ...)` resolve the same at the same places once."""

    @wraps(method)
    def resolve(resolver: Resolver, what: Any, value: Any, path: KeyPath, *more: Any) -> Any:
        names = tuple(word for word in more if isinstance(word, str))
        key: Any = (what, names, resolver.threat, resolver.mark(value, path))
        try:
            if found := resolver.known.get(key):
                resolver.problems += found[1]
                return found[0]
        except TypeError:  # something of Python that cannot be hashed
            key = object()
        before = len(resolver.problems)
        result = method(resolver, what, value, path, *more)
        resolver.known[key] = result, resolver.problems[before:]
        return result

    return cast(Method, resolve)


@dataclass
class Resolver:
    """Turns the tables of one recipe into options; `problems` collects the mistakes."""

    registry: Registry
    folder: Path
    locate: Callable[[KeyPath], Place]
    threat: Threat | None = None
    problems: list[Problem] = field(default_factory=list)
    files: dict[tuple[str, str], str] = field(default_factory=dict)
    """(key, path as written) -> absolute path, of every file that the recipe names."""
    foreign: Mapping[str, str] = field(default_factory=dict)
    """Top-level keys that the user did not write -> the `Guard.source` that did."""
    known: dict[Any, tuple[Any, list[Problem]]] = field(default_factory=dict)
    """What was resolved before, as in another combination of a sweep, and its problems."""

    def problem(self, path: KeyPath, message: str) -> None:
        """Record a problem with the value at `path`."""
        self.problems.append(Problem(self.locate(path), message, path))

    def mark(self, value: Any, path: KeyPath) -> Any:
        """The same for equal values that are written at the same places, and hashable."""
        place = self.locate(path)
        if isinstance(value, Mapping):
            return place, tuple((k, self.mark(v, (*path, k))) for k, v in value.items())
        if isinstance(value, list | tuple):
            return place, tuple(self.mark(v, (*path, n)) for n, v in enumerate(value))
        return place, type(value), value  # 1 == True in Python, but not in a recipe

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Record a mistake that is raised inside as a problem, and go on."""
        try:
            yield
        except Recorded:
            pass
        except Mistake as mistake:
            self.problem(mistake.path, str(mistake))

    @_once
    def options(
        self,
        cls: type,
        table: Mapping[str, Any],
        path: KeyPath,
        owner: str,
        core: Collection[str] = (),
        plugin: str = "",
    ) -> Any | None:
        """Build an options dataclass from the table at `path`; None if there was a problem.

        `core` are keys of the same table that the core reads. `plugin` owns the dataclass.
        """
        hints = field_types(cls)
        values: dict[str, Any] = {}
        fields = {key_of(f.name): f for f in dataclasses.fields(cls)}
        before = len(self.problems)
        unknown = {key: self.locate((*path, key)) for key in table if key not in fields}
        for key, shown in in_order(unknown):
            if not shown:
                self.problem((*path, key), f"unknown option {key!r} of {owner}")
                continue
            inside = self._find_inside(key, cls, table)
            given = unknown[key].file.removeprefix("--set ").partition("=")[0].strip()
            if inside and given.endswith(f".{key}"):  # with `--set`, the whole address
                inside = f"{given.removesuffix(key)}{inside}"
            owner_of = inside.split(".")[-2:][0]
            advice = f"it belongs to its {owner_of}: write {inside}" if inside else ""
            advice = advice or suggest(key, (*fields, *core))
            self.problem((*path, key), f"unknown option {key!r} of {owner}; {advice}")
        known = cls.norms[0] if issubclass(cls, Threatened) else "linf"
        norm = table.get("norm") or (self.threat.norm if self.threat else known)
        for key, f in fields.items():
            value = default = default_of(f)
            if key in table:
                value = _over_default(table[key], default)
            elif default is dataclasses.MISSING:
                example = f"write {key} = {example_of(hints[f.name])}"
                self.problem(path, f"{owner} needs {key}: {f.metadata.get('help', '')}; {example}")
                continue
            slot = Slot((*path, key), f, owner, f.metadata.get("norm") or norm)
            with self.collecting():
                values[f.name] = None if value is None else self._value(hints[f.name], value, slot)
        if len(self.problems) > before:
            return None
        try:
            with contained():
                return cls(**values)
        except OptionError as error:
            self.problem((*path, key_of(error.field)), f"{owner}: {error}")
        # Whatever else the check of a plugin's dataclass may raise.
        except Exception as error:
            told = f" of plugin {plugin}" if plugin else ""
            self.problem(path, f"{owner}{told} rejects its options: {explain_briefly(error)}")
        return None

    def _find_inside(self, key: str, cls: type, table: Mapping[str, Any]) -> str:
        """Where an option is one of a component that the table names, what to write; else ""."""
        for f in dataclasses.fields(cls):
            outer, hint = key_of(f.name), field_types(cls)[f.name]
            named = _over_default(table.get(outer, default_of(f)), default_of(f))
            use = str(named.get("use") if isinstance(named, Mapping) else named)
            if (kind := find_kind(hint)) is None:
                continue
            name = translate(use, self.registry.names(kind)) or use
            for entry in self.registry.search(name, kind):
                if meant := translate(key, map(key_of, field_types(entry.component.options))):
                    return f"{outer}.{meant}"
        return ""

    @_once
    def use(
        self, kind: str, value: Any, path: KeyPath, core: Collection[str] = ()
    ) -> Use[Any] | None:
        """The component that a string, or a table with `use`, names; None if there was a problem.

        `core` are keys of the table that the core reads.
        """
        with self.collecting():
            return self._use(kind, value, path, core)
        return None

    def _use(self, kind: str, value: Any, path: KeyPath, core: Collection[str] = ()) -> Use[Any]:
        table = {"use": value} if isinstance(value, str) else value
        if not isinstance(table, Mapping) or not isinstance(table.get("use"), str):
            example = next(iter(self.registry.names(kind)), "NAME")
            advice = f'write use = "{example}" (prunekit list {kind}s)'
            raise Mistake(path, f"{last_key(path)} needs a name; {advice}")
        try:
            entry = self.registry.find(kind, table["use"])
        except UserError as error:
            meant = translate(table["use"], self.registry.names(kind))
            if meant and not self.registry.search(table["use"], kind):
                # What else is wrong with it is told in the same go.
                with suppress(Mistake, Recorded):
                    self._use(kind, {**table, "use": meant}, path, core)
            raise Mistake((*path, "use"), str(error)) from None
        component, owner = entry.component, f"{kind} {entry.component.name!r}"
        core = ("name", *core) if kind == "evaluator" else core
        own = {k: v for k, v in table.items() if k != "use" and k not in core}
        options = self.options(component.options, own, path, owner, core, entry.owner)
        if options is None:
            raise Recorded
        name = table.get("name", component.name) if kind == "evaluator" else component.name
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
            raise Mistake((*path, "name"), f"name of {owner} {NAME_RULE}, got {name!r}")
        threat = self._threat(options, path, owner)
        guard = Guard(self.foreign.get(str(path[0])))
        return Use(component, options, entry.owner, name, threat, entry.reference, guard=guard)

    def _threat(self, options: Any, path: KeyPath, owner: str) -> Threat | None:
        """The recipe's threat model, overridden by the component's own `norm` and `eps`."""
        if not isinstance(options, Threatened):
            return None
        if self.threat is None and options.eps is None:
            raise Mistake(path, f"{owner} needs a threat model; {THREAT_EXAMPLE}")
        base = self.threat or Threat(options.norms[0], 0.0)
        norm = options.norm or base.norm
        if norm not in options.norms:
            raise Mistake(
                (*path, "norm") if options.norm else path,
                f'{owner} does not take norm "{norm}"; write norm = "{options.norms[0]}" and an '
                f"eps for it, or use another component",
            )
        return Threat(norm, base.eps if options.eps is None else options.eps)

    def _value(self, hint: Any, value: Any, slot: Slot) -> Any:
        """A value of the type `hint`. Raises `Mistake`, or `Recorded` for mistakes within lists."""
        origin, arguments = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            (hint,) = (a for a in arguments if a is not type(None))
            return self._value(hint, value, slot)
        if origin is Use:
            return self._use(KIND_OF[arguments[0]], value, slot.path)
        if origin is tuple:
            return self._list(arguments, value, slot)
        if origin is Literal:
            return read_choice(value, arguments, slot)
        if origin is dict:
            if not isinstance(value, Mapping):
                raise slot.wrong_type("a table", value)
            return dict(value)
        if hint is Any:
            return value
        if hint is Path:
            return self._path(value, slot)
        return read_radius(value, slot) if hint is Radius else read_plain(hint, value, slot)

    def _list(self, arguments: tuple[Any, ...], value: Any, slot: Slot) -> tuple[Any, ...]:
        any_length = arguments[-1] is Ellipsis
        if not isinstance(value, list | tuple):
            items = re.findall(r"[^\s,\[\]\"']+", value) if isinstance(value, str) else [value]
            if kind := find_kind(arguments[0]):
                known = self.registry.names(kind)
                items = [translate(str(item), known) or item for item in items]
            advice = f"; write {write_value(items)}" if any_length else ""
            raise slot.wrong_type("a list", value, advice)
        if not any_length and len(value) != len(arguments):
            raise slot.wrong_type(f"a list of {len(arguments)} values", value)
        found = []
        for i, item in enumerate(value):
            with self.collecting():
                found.append(self._value(arguments[0 if any_length else i], item, slot.item(i)))
        if len(found) < len(value):
            raise Recorded
        return tuple(found)

    def _path(self, value: Any, slot: Slot) -> Path:
        file = read_path(value, slot, self.locate(slot.path), self.folder)
        written = key_of(slot.field.name), str(value)
        if self.files.setdefault(written, str(file)) != str(file):
            self.files[written] = str(value)  # the same words name two files: they stay as written
        return file


def _over_default(value: Any, default: Any) -> Any:
    """A table without `use` changes single options of the default component."""
    if not isinstance(value, Mapping) or "use" in value:
        return value
    base = {"use": default} if isinstance(default, str) else default
    return {**base, **value} if isinstance(base, Mapping) else value
