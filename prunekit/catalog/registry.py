"""Entry points -> components. A broken plugin is listed as such; all others still load."""

from __future__ import annotations

import dataclasses
import importlib.abc
import importlib.util
import re
import typing
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, EntryPoint, entry_points
from types import FunctionType

import pluggy

from prunekit.catalog import hookspecs
from prunekit.catalog.component import API_VERSION, Component
from prunekit.catalog.containment import contained
from prunekit.catalog.kinds import KINDS
from prunekit.errors import UserError, explain_briefly, suggest

GROUP = "prunekit"


@dataclass(frozen=True)
class Entry:
    """A registered component and where it comes from."""

    component: Component
    plugin: str
    distribution: str
    problem: str = ""
    """Why it cannot be used although its plugin loads: two plugins claim its name."""

    @property
    def kind(self) -> str:
        """The kind of the component."""
        return self.component.kind

    @property
    def owner(self) -> str:
        """The plugin and its distribution, for messages: "pruners (prunekit 0.1.0)"."""
        return f"{self.plugin} ({self.distribution})"

    @property
    def reference(self) -> str:
        """What a recipe writes after `use =`: the name, after its plugin if two claim it."""
        name = self.component.name
        return f"{self.plugin}:{name}" if self.problem else name

    @property
    def missing(self) -> tuple[str, ...]:
        """The import names it needs that are not installed."""
        return tuple(name for name in self.component.needs if not _is_installed(name))

    @property
    def status(self) -> str:
        """One of "ready", "needs X", "broken: reason"."""
        if self.problem:
            return f"broken: {self.problem}"
        return f"needs {', '.join(self.missing)}" if self.missing else "ready"


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that could not be loaded."""

    plugin: str
    distribution: str
    reason: str

    @property
    def owner(self) -> str:
        """The plugin and its distribution, as in `Entry.owner`."""
        return f"{self.plugin} ({self.distribution})"


@dataclass(frozen=True)
class Registry:
    """All components that are installed."""

    entries: tuple[Entry, ...]
    broken: tuple[BrokenPlugin, ...] = ()

    def names(self, kind: str) -> list[str]:
        """Names of all components of a kind, sorted."""
        return sorted({e.component.name for e in self.entries if e.kind == kind})

    def search(self, name: str, kind: str = "") -> list[Entry]:
        """All components of this name, or "plugin:name"; of one kind, or by default of any."""
        plugin, _, bare = name.rpartition(":")
        return [
            entry
            for entry in self.entries
            if entry.component.name == bare
            if plugin in ("", entry.plugin) and kind in ("", entry.kind)
        ]

    def find(self, kind: str, name: str) -> Entry:
        """The component of this kind and name; "plugin:name" distinguishes two of one name.

        Raises `UserError` that lists the known names, or says what is missing or in conflict.
        """
        found = self.search(name, kind)
        if not found:
            raise UserError(f"unknown {kind} {name!r}; {self._suggest(kind, name)}")
        if len(found) > 1:
            owners = " and ".join(entry.owner for entry in found)
            ways = " or ".join(f'"{entry.reference}"' for entry in found)
            raise UserError(f"{kind} {name!r} is claimed by the plugins {owners}; write {ways}")
        if found[0].missing:
            names = " ".join(found[0].missing)
            command = found[0].component.install or f"pip install {names}"
            raise UserError(f"{kind} {name!r} needs {names}, not installed here; run: {command}")
        return found[0]

    def _suggest(self, kind: str, reference: str) -> str:
        name, names = reference.rpartition(":")[2], self.names(kind)
        text = suggest(name, names)
        elsewhere = self.search(name)
        if elsewhere and not text.startswith("did"):
            text = f"{name!r} is of kind {elsewhere[0].kind}; {text}"
        if self.broken:
            text += f" (plugins that failed to load: {', '.join(b.owner for b in self.broken)})"
        return text


def load_registry(points: Iterable[EntryPoint] | None = None) -> Registry:
    """Load the declarations of all plugins, by default those of the entry-point group `prunekit`.

    Never raises: a plugin that fails is listed in `broken`.
    """
    entries: list[Entry] = []
    broken: list[BrokenPlugin] = []
    for name, point in _name_plugins(entry_points(group=GROUP) if points is None else points):
        distribution = " ".join(_read_dist(point.dist)) if point.dist else "unknown"
        try:
            # A filter of warnings that a plugin sets would be one for everybody.
            with contained(), warnings.catch_warnings():
                found = _load_plugin(point)
        except Exception as error:
            broken.append(BrokenPlugin(name, distribution, _explain(error)))
            continue
        entries += [Entry(component, name, distribution) for component in found]
    return Registry(tuple(_mark_conflicts(entries)), tuple(broken))


def _name_plugins(points: Iterable[EntryPoint]) -> list[tuple[str, EntryPoint]]:
    """(name, entry point) of all plugins, ours first; the module's name if several chose one."""
    ordered = sorted(
        {(p.name, p.value): p for p in points}.values(),
        key=lambda p: (not _is_builtin(p), p.name, p.value),
    )
    taken = Counter(p.name for p in ordered)
    return [(p.value if taken[p.name] > 1 and not _is_builtin(p) else p.name, p) for p in ordered]


class ApiError(Exception):
    """A plugin was written for another version of the plugin API. The message is for users."""


def _load_plugin(point: EntryPoint) -> list[Component]:
    _check_api(point.module)
    found = list_declared(point.load(), point.name)
    if not found:
        raise LookupError("declares no component; is @hookimpl missing, or a return?")
    return found


def list_declared(plugin: object, name: str) -> list[Component]:
    """What the hooks of a plugin's module declare. Raises whatever is wrong with them."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name=name)
    _check_hooks(manager)
    found = []
    for kind in KINDS:
        for components in getattr(manager.hook, f"prunekit_{kind}s")():
            for component in components:
                _check_declaration(kind, component)
                found.append(component)
    return found


def _check_api(module: str) -> None:
    """Raise `ApiError` if a plugin's module states another version of the API than ours.

    This reads its source, because a plugin for another version may fail when it is imported.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not isinstance(spec.loader, importlib.abc.InspectLoader):
        return
    source = spec.loader.get_source(module) or ""
    stated = re.search(r"^PRUNEKIT_API\b[^=\n]*=\s*(\S+)", source, re.MULTILINE)
    version = stated[1] if stated else str(API_VERSION)
    if not version.isdigit():
        raise ApiError(f"PRUNEKIT_API is {version}; write PRUNEKIT_API = {API_VERSION}")
    if int(version) != API_VERSION:
        way = "update prunekit" if int(version) > API_VERSION else "update the plugin"
        raise ApiError(f"written for plugin API {version}, this prunekit has {API_VERSION}; {way}")


def _explain(error: BaseException) -> str:
    """Why a plugin is broken, in a line."""
    if isinstance(error, ApiError):
        return str(error)
    text = explain_briefly(error)
    if isinstance(error, ImportError) and (error.name or "").startswith("prunekit."):
        text += (
            "; plugins import from `prunekit` and the modules beside it, as docs/plugins.md says"
        )
    return text


def _check_hooks(manager: pluggy.PluginManager) -> None:
    """Raise `NameError` for a misspelled hook, which pluggy would silently ignore."""
    hooks = [f"prunekit_{kind}s" for kind in KINDS]
    for name in vars(manager.hook):
        if not name.startswith("_") and name not in hooks:
            raise NameError(f"there is no hook {name!r}; {suggest(name, hooks)}")
    manager.check_pending()


def _check_declaration(kind: str, component: object) -> None:
    """Check what `prunekit list` relies on; `testing.check_component` checks more."""
    expected, given = KINDS[kind], type(component)
    if not isinstance(component, expected):
        way = f"prunekit_{kind}s yields {expected.__name__}s"
        if isinstance(component, Component):
            raise TypeError(f"{way}, but {component.name!r} is declared as {given.__name__}")
        raise TypeError(f"{way}, not {given.__name__}")
    for key in ("name", "summary", "build"):
        if not isinstance(value := getattr(component, key), str):
            raise TypeError(f"{key} of {component.name!r} is not a str: {value!r}")
    for key in ("needs", "sources", "beats", "validates"):
        value = getattr(component, key, ())
        # needs=("torch") lacks a comma, and a str is a sequence of letters.
        if not isinstance(value, tuple | list) or not all(isinstance(v, str) for v in value):
            raise TypeError(f'{key} of {component.name!r} is {value!r}; write ("...",)')
    for field in dataclasses.fields(expected):
        value = getattr(component, field.name)
        if isinstance(field.default, FunctionType) and not callable(value):
            way = f"{field.name}=lambda options: {value!r}"
            raise TypeError(f"{field.name} of {component.name!r} is {value!r}; write {way}")
    if not dataclasses.is_dataclass(component.options):
        raise TypeError(f"options of {component.name!r} is not a dataclass: {component.options!r}")
    typing.get_type_hints(component.options)


def _mark_conflicts(entries: Sequence[Entry]) -> Iterator[Entry]:
    """The entries; those of one kind and name say which other plugins claim it."""
    registry = Registry(tuple(entries))
    for entry in entries:
        name = entry.component.name
        rivals = [e.owner for e in registry.search(name, entry.kind) if e is not entry]
        claimed = f'name also claimed by {", ".join(rivals)}; write "{entry.plugin}:{name}"'
        yield dataclasses.replace(entry, problem=claimed) if rivals else entry


def _is_builtin(point: EntryPoint) -> bool:
    return point.dist is not None and _read_dist(point.dist)[0] == "prunekit"


@cache
def _read_dist(dist: Distribution) -> tuple[str, str]:
    """(name, version); the distribution itself would parse its metadata each time."""
    metadata = dist.metadata
    return metadata["Name"], metadata["Version"]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
