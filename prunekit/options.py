"""TOML values -> typed options: every mistake is collected with its place and a way out."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from prunekit import contracts
from prunekit.component import Radius, Use, default_of
from prunekit.contracts import Threat
from prunekit.errors import OptionError, Place, Problem, UserError
from prunekit.registry import Registry

KeyPath = tuple[str | int, ...]

KIND_OF: dict[Any, str] = {
    contracts.Objective: "objective",
    contracts.Pruner: "pruner",
    contracts.Architecture: "architecture",
    contracts.Data: "dataset",
    contracts.Evaluator: "evaluator",
    contracts.Reporter: "reporter",
    contracts.OptimizerChoice: "optimizer",
    contracts.Schedule: "schedule",
}


def key_of(field_name: str) -> str:
    """The recipe's key of a field: Python's keywords have an underscore behind them."""
    return field_name.removesuffix("_")


def field_types(options: type) -> dict[str, Any]:
    """Field name -> type of an options dataclass."""
    return typing.get_type_hints(options)


def suggest(word: str, words: typing.Iterable[str]) -> str:
    """ "; did you mean 'x'?" or the list of what there is."""
    words = sorted(words)
    close = difflib.get_close_matches(word, words, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"there are: {', '.join(words)}" if words else "it takes none"


class _Invalid(Exception):
    """A value that cannot be; its problem is recorded already."""


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

    def options(self, cls: type, table: Mapping[str, Any], path: KeyPath, owner: str) -> Any | None:
        """Build the options dataclass from a table; None where a problem was recorded."""
        hints = field_types(cls)
        values: dict[str, Any] = {}
        fields = {key_of(f.name): f for f in dataclasses.fields(cls)}
        before = len(self.problems)
        for key in table:
            if key not in fields:
                advice = suggest(key, fields)
                self.problem((*path, key), f"unknown option {key!r} of {owner}; {advice}")
        for key, f in fields.items():
            default = default_of(f)
            if key not in table:
                if default is dataclasses.MISSING:
                    self.problem(path, f"{owner} needs {key}: {f.metadata['help']}")
                    continue
                value = default
            else:
                value = table[key]
                if isinstance(value, Mapping) and isinstance(default, Mapping):
                    # A table without `use` changes single options of the default component.
                    value = value if "use" in value else {**default, **value}
            if value is None:
                values[f.name] = None
                continue
            try:
                values[f.name] = self.value(hints[f.name], value, (*path, key), f, owner, table)
            except _Invalid:
                continue
        if len(self.problems) > before:
            return None
        try:
            return cls(**values)
        except OptionError as error:
            self.problem((*path, key_of(error.field)), f"{owner}: {error}")
        return None

    def value(
        self,
        hint: Any,
        value: Any,
        path: KeyPath,
        f: dataclasses.Field[Any],
        owner: str,
        table: Mapping[str, Any],
    ) -> Any:
        """One value, of the type `hint` and within the field's limits."""
        origin, arguments = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            (hint,) = (a for a in arguments if a is not type(None))
            return self.value(hint, value, path, f, owner, table)
        if origin is Use:
            use = self.use(KIND_OF[arguments[0]], value, path)
            if use is None:
                raise _Invalid
            return use
        if origin is tuple:
            if not isinstance(value, list | tuple):
                self._reject(path, owner, value, "a list")
            single = arguments[-1] is Ellipsis
            if not single and len(value) != len(arguments):
                self._reject(path, owner, value, f"a list of {len(arguments)} values")
            items, bad = [], False
            for i, item in enumerate(value):
                try:
                    items.append(
                        self.value(arguments[0 if single else i], item, (*path, i), f, owner, table)
                    )
                except _Invalid:
                    bad = True
            if bad:
                raise _Invalid
            return tuple(items)
        if origin is Literal:
            if value not in arguments or isinstance(value, bool) != isinstance(arguments[0], bool):
                advice = suggest(str(value), map(str, arguments))
                self._fail(path, f"{path[-1]} of {owner} cannot be {value!r}; {advice}")
            return value
        if hint is Path:
            return self._path(value, path, f, owner)
        if hint is Radius:
            return self._radius(value, path, f, owner, table)
        if origin is dict:
            if not isinstance(value, Mapping):
                self._reject(path, owner, value, "a table")
            return dict(value)
        return self._plain(hint, value, path, f, owner)

    def use(
        self, kind: str, value: Any, path: KeyPath, core: Mapping[str, Any] | None = None
    ) -> Use[Any] | None:
        """A component named by a string, or by a table with `use` and options."""
        table = {"use": value} if isinstance(value, str) else value
        if not isinstance(table, Mapping) or not isinstance(table.get("use"), str):
            example = self.registry.names(kind)[:1] or ["NAME"]
            self.problem(
                path, f'{path[-1]} needs a name; write use = "{example[0]}" (prunekit list {kind}s)'
            )
            return None
        try:
            entry = self.registry.find(kind, table["use"])
        except UserError as error:
            self.problem((*path, "use") if isinstance(value, Mapping) else path, str(error))
            return None
        component, owner = entry.component, f"{kind} {entry.component.name!r}"
        taken = {"use", "name"} if kind == "evaluator" else {"use"}
        own = {k: v for k, v in table.items() if k not in taken}
        options = self.options(component.options, own, path, owner)
        if options is None:
            return None
        name = table.get("name", component.name)
        if not isinstance(name, str):
            self.problem((*path, "name"), f"name of {owner} is a text, got {name!r}")
            return None
        threat = self._threat(options, path, owner)
        return Use(kind, component, options, entry.owner, name, threat)

    def _threat(self, options: Any, path: KeyPath, owner: str) -> Threat | None:
        eps, norm = getattr(options, "eps", None), getattr(options, "norm", None)
        if not (hasattr(options, "eps") and hasattr(options, "norm")):
            return self.threat
        if self.threat is None and eps is None:
            self.problem(
                path,
                f'{owner} needs a threat; write [threat] with norm = "linf" and eps = "8/255"',
            )
            return None
        base = self.threat or Threat("linf", 0.0)
        return Threat(norm or base.norm, base.eps if eps is None else eps)

    def _fail(self, path: KeyPath, message: str) -> typing.NoReturn:
        self.problem(path, message)
        raise _Invalid

    def _reject(self, path: KeyPath, owner: str, value: Any, wanted: str) -> typing.NoReturn:
        name = path[-1] if isinstance(path[-1], str) else f"{path[-2]}[{path[-1]}]"
        self._fail(path, f"{name} of {owner} is {wanted}, got {value!r}")

    def _path(self, value: Any, path: KeyPath, f: dataclasses.Field[Any], owner: str) -> Path:
        if isinstance(value, Path):
            return value
        if not isinstance(value, str):
            self._reject(path, owner, value, "a path")
        file = Path(value).expanduser()
        file = file if file.is_absolute() else (self.folder / file).absolute()
        if f.metadata.get("exists") and not file.exists():
            self._fail(path, f"{path[-1]} of {owner}: there is no {file}; paths start at the "
                       "recipe's folder")  # fmt: skip
        return file

    def _radius(
        self,
        value: Any,
        path: KeyPath,
        f: dataclasses.Field[Any],
        owner: str,
        table: Mapping[str, Any],
    ) -> Radius:
        number = value
        if isinstance(value, str):
            top, slash, bottom = value.partition("/")
            try:
                number = float(top) / float(bottom) if slash else float(top)
            except (ValueError, ZeroDivisionError):
                self._reject(path, owner, value, 'a radius such as 0.03 or "8/255"')
        if isinstance(number, bool) or not isinstance(number, int | float):
            self._reject(path, owner, value, 'a radius such as 0.03 or "8/255"')
        norm = table.get("norm") or (self.threat.norm if self.threat else "linf")
        if not 0 <= number < float("inf") or (number > 1 and norm == "linf"):
            way = f'; write "{number:g}/255"' if 1 < number <= 255 else ""
            self._fail(path, f"{path[-1]} is a radius in [0, 1] pixel units, got {value}{way}")
        self._limit(number, path, f, owner)
        return Radius(number)

    def _plain(
        self, hint: Any, value: Any, path: KeyPath, f: dataclasses.Field[Any], owner: str
    ) -> Any:
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        if hint is Any:
            return value
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if hint is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
            self._reject(path, owner, value, wanted.get(hint, hint.__name__))
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._limit(value, path, f, owner)
        return value

    def _limit(self, value: float, path: KeyPath, f: dataclasses.Field[Any], owner: str) -> None:
        low, high, above, below = (f.metadata.get(k) for k in ("low", "high", "above", "below"))
        if (
            value == value  # not NaN
            and (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
            and (below is None or value < below)
        ):
            return
        top = high if high is not None else below
        way = f"; write {value / 100:g}" if top == 1 and 1 < value < 100 else ""
        self._fail(path, f"{path[-1]} of {owner} must be {limits(f)}, got {value}{way}")


def limits(f: dataclasses.Field[Any]) -> str:
    """The allowed values of a field in words; empty where there is no limit."""
    words = (("low", "at least"), ("above", "above"), ("high", "at most"), ("below", "below"))
    return " and ".join(
        f"{word} {f.metadata[key]:g}" for key, word in words if f.metadata.get(key) is not None
    )


def describe(value: Any, of_path: Callable[[Path], Any] = str) -> Any:
    """Options as plain data, defaults included, absent values left out: what a recipe could say.

    `of_path` says what stands for a file: its path in a recipe, its content in a hash.
    """
    if isinstance(value, Use):
        named = {"name": value.name} if value.name != value.component.name else {}
        return {"use": value.component.name, **named, **describe(value.options, of_path)}
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
