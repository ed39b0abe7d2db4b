"""Entry points -> components. A broken plugin is listed as broken and harms nobody else."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import re
import sys
import typing
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pluggy

from prunekit.catalog import hookspecs
from prunekit.catalog.component import API_VERSION, KINDS, Component
from prunekit.errors import UserError

GROUP = "prunekit"


@dataclass(frozen=True)
class Entry:
    """A registered component and where it comes from."""

    kind: str
    component: Component
    plugin: str
    distribution: str
    problem: str = ""
    """Why it cannot be used although its plugin loads (a name that two plugins claim)."""

    @property
    def owner(self) -> str:
        return f"{self.plugin} ({self.distribution})"

    @property
    def ours(self) -> bool:
        """Whether it comes with prunekit."""
        return self.distribution.partition(" ")[0] == "prunekit"

    @property
    def reference(self) -> str:
        """What a recipe writes after `use =`: the name, with the plugin where two claim it."""
        name = self.component.name
        return f"{self.plugin}:{name}" if self.problem else name

    @property
    def missing(self) -> tuple[str, ...]:
        """The import names it needs that are not installed."""
        return tuple(name for name in self.component.needs if not _is_installed(name))

    @property
    def status(self) -> str:
        """ready, needs X, or broken: reason."""
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
        return f"{self.plugin} ({self.distribution})"


@dataclass(frozen=True)
class Registry:
    """All components that are installed."""

    entries: tuple[Entry, ...]
    broken: tuple[BrokenPlugin, ...] = ()

    def names(self, kind: str) -> list[str]:
        return sorted({e.component.name for e in self.entries if e.kind == kind})

    def find(self, kind: str, name: str) -> Entry:
        """The component of this kind and name; "plugin:name" tells two of one name apart.

        Raises `UserError` saying which names there are, what is missing, or why it is broken.
        """
        plugin, _, bare = name.rpartition(":")
        found = [
            entry
            for entry in self.entries
            if (entry.kind, entry.component.name) == (kind, bare) and plugin in ("", entry.plugin)
        ]
        if not found:
            raise UserError(f"unknown {kind} {name!r}; {self._suggest(kind, bare)}")
        if len(found) > 1:
            owners = " and ".join(entry.owner for entry in found)
            ways = " or ".join(f'"{entry.reference}"' for entry in found)
            raise UserError(f"{kind} {name!r} is claimed by the plugins {owners}; write {ways}")
        if found[0].missing:
            names = " ".join(found[0].missing)
            command = found[0].component.install or f"pip install {names}"
            raise UserError(f"{kind} {name!r} needs {names}, not installed here; run: {command}")
        return found[0]

    def _suggest(self, kind: str, name: str) -> str:
        names = self.names(kind)
        close = difflib.get_close_matches(name, names, n=1)
        text = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names)}"
        elsewhere = [e.kind for e in self.entries if e.component.name == name]
        if elsewhere and not close:
            text = f"{name!r} is of kind {elsewhere[0]}; {text}"
        if self.broken:
            text += f" (plugins that failed to load: {', '.join(b.owner for b in self.broken)})"
        return text


def load_registry(points: Iterable[EntryPoint] | None = None) -> Registry:
    """Load the declarations of all plugins, by default those of the entry-point group `prunekit`.

    Nothing that a plugin does can raise from here: a plugin that fails is listed in `broken`.
    """
    entries: list[Entry] = []
    broken: list[BrokenPlugin] = []
    if points is None:
        points = entry_points(group=GROUP)
    for name, point in _name_plugins(points):
        distribution = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
        try:
            # What a plugin prints at import must not end up in a result.
            with contextlib.redirect_stdout(sys.stderr):
                found = _load_plugin(point)
        # A plugin may raise anything at import, SystemExit included.
        except (Exception, SystemExit) as error:
            broken.append(BrokenPlugin(name, distribution, _explain(error, point)))
            continue
        entries += [Entry(kind, c, name, distribution) for kind, c in found]
    return Registry(_mark_conflicts(entries), tuple(broken))


def _name_plugins(points: Iterable[EntryPoint]) -> list[tuple[str, EntryPoint]]:
    """Plugins in order, ours first; where several chose one name, others go by their module's."""
    ordered = sorted(
        {(p.name, p.value): p for p in points}.values(),
        key=lambda p: (not _is_builtin(p), p.name, p.value),
    )
    taken = Counter(p.name for p in ordered)
    return [(p.value if taken[p.name] > 1 and not _is_builtin(p) else p.name, p) for p in ordered]


class ApiError(Exception):
    """A plugin was written for another version of the plugin API; the message is for the user."""


def _load_plugin(point: EntryPoint) -> list[tuple[str, Component]]:
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    module = point.load()
    _check_api(getattr(module, "PRUNEKIT_API", API_VERSION))
    manager.register(module, name=point.name)
    _check_hooks(manager)
    found = []
    for kind in KINDS:
        for components in getattr(manager.hook, f"prunekit_{kind}s")():
            for component in components:
                _check_declaration(f"prunekit_{kind}s", component)
                found.append((kind, component))
    if not found:
        raise LookupError("declares no component; is @hookimpl missing, or a return?")
    return found


def _check_api(version: object) -> None:
    """Raise `ApiError` where a plugin's version of the API is not ours."""
    if isinstance(version, bool) or not isinstance(version, int):
        raise ApiError(f"PRUNEKIT_API is {version!r}; write PRUNEKIT_API = {API_VERSION}")
    if version != API_VERSION:
        older, newer = ("update it", "update prunekit")
        raise ApiError(
            f"written for plugin API {version}, this prunekit has {API_VERSION}; "
            f"{newer if version > API_VERSION else older}"
        )


def _explain(error: BaseException, point: EntryPoint) -> str:
    """Why a plugin is broken, in a line.

    One that was written for another API may fail while it is imported, before it could say so.
    """
    if not isinstance(error, ApiError):
        try:
            _check_api(_read_api(point.module))
        except ApiError as mismatch:
            error = mismatch
    if isinstance(error, ApiError):
        return str(error)
    told = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, ImportError) and (error.name or "").startswith("prunekit."):
        told += (
            "; plugins import from `prunekit` and the modules beside it, as docs/plugins.md says"
        )
    return told


def _read_api(module: str) -> int:
    """The version that a module's source says it was written for; ours where it says none."""
    try:
        spec = importlib.util.find_spec(module)
        text = Path(spec.origin).read_text("utf-8") if spec and spec.origin else ""
    # An import on the way there may raise anything again.
    except (Exception, SystemExit):
        text = ""
    found = re.search(r"^PRUNEKIT_API(?:\s*:\s*int)?\s*=\s*(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else API_VERSION


def _check_hooks(manager: pluggy.PluginManager) -> None:
    """Without this a misspelt hook would be ignored in silence."""
    hooks = [f"prunekit_{kind}s" for kind in KINDS]
    for name in vars(manager.hook):
        if not name.startswith("_") and name not in hooks:
            close = difflib.get_close_matches(name, hooks, n=1) or hooks
            raise NameError(f"there is no hook {name!r}; did you mean {close[0]!r}?")
    manager.check_pending()


def _check_declaration(hook: str, component: object) -> None:
    """What reading commands rely on; `testing.check_component` holds it against more."""
    if not isinstance(component, Component):
        raise TypeError(f"{hook} gave a {type(component).__name__}, not a Component")
    for field in ("name", "summary", "build"):
        if not isinstance(value := getattr(component, field), str):
            raise TypeError(f"{field} of {component.name!r} is no text: {value!r}")
    for field in ("needs", "sources", "beats"):
        value = getattr(component, field)
        # A text is a sequence of letters to Python: needs=("torch") has no comma.
        if not isinstance(value, tuple | list) or not all(isinstance(v, str) for v in value):
            raise TypeError(f'{field} of {component.name!r} is {value!r}; write ("...",)')
    if not dataclasses.is_dataclass(component.options):
        raise TypeError(f"options of {component.name!r} is no dataclass: {component.options!r}")
    typing.get_type_hints(component.options)


def _mark_conflicts(entries: list[Entry]) -> tuple[Entry, ...]:
    marked = []
    for entry in entries:
        rivals = [
            other.owner
            for other in entries
            if (other.kind, other.component.name) == (entry.kind, entry.component.name)
            and other is not entry
        ]
        if rivals:
            reference = f"{entry.plugin}:{entry.component.name}"
            problem = f'name also claimed by {", ".join(rivals)}; write "{reference}"'
            entry = dataclasses.replace(entry, problem=problem)
        marked.append(entry)
    return tuple(marked)


def _is_builtin(point: EntryPoint) -> bool:
    return point.dist is not None and point.dist.name == "prunekit"


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
