"""Entry points -> components. A broken plugin is listed as broken and harms nobody else."""

from __future__ import annotations

import difflib
import importlib.util
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

import pluggy

from prunekit import builtin, hookspecs
from prunekit.component import KINDS, Component
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
            raise UserError(f"unknown {kind} {name!r}; {self._suggest(kind, name)}")
        if len(found) > 1:
            owners = " and ".join(entry.owner for entry in found)
            ways = " or ".join(f'"{entry.plugin}:{bare}"' for entry in found)
            raise UserError(f"{kind} {name!r} is claimed by the plugins {owners}; write {ways}")
        if found[0].missing:
            names = " ".join(found[0].missing)
            raise UserError(
                f"{kind} {name!r} needs {names}, not installed here; run: pip install {names}"
            )
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
    for point in sorted(points, key=lambda p: (not _is_builtin(p), p.name)):
        distribution = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
        try:
            entries += [
                Entry(kind, component, point.name, distribution)
                for kind, component in _load_plugin(point)
            ]
        # A plugin may raise anything at import, SystemExit included.
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            broken.append(BrokenPlugin(point.name, distribution, reason))
    entries += [
        Entry(kind, component, "core", "prunekit") for kind, component in builtin.COMPONENTS
    ]
    return Registry(_mark_conflicts(entries), tuple(broken))


def _load_plugin(point: EntryPoint) -> list[tuple[str, Component]]:
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(point.load(), name=point.name)
    # Without this a misspelt hook would be ignored in silence.
    manager.check_pending()
    found = []
    for kind in KINDS:
        for components in getattr(manager.hook, f"prunekit_{kind}s")():
            for component in components:
                if not isinstance(component, Component):
                    raise TypeError(
                        f"prunekit_{kind}s gave a {type(component).__name__}, not a Component"
                    )
                found.append((kind, component))
    if not found:
        raise LookupError("declares no component; is @hookimpl missing?")
    return found


def _mark_conflicts(entries: list[Entry]) -> tuple[Entry, ...]:
    claims = Counter((e.kind, e.component.name) for e in entries)
    marked = []
    for entry in entries:
        if claims[entry.kind, entry.component.name] > 1:
            rivals = [
                other.owner
                for other in entries
                if (other.kind, other.component.name) == (entry.kind, entry.component.name)
                and other is not entry
            ]
            text = f"name also claimed by {', '.join(rivals)}; write"
            name = f"{entry.plugin}:{entry.component.name}"
            entry = Entry(
                entry.kind, entry.component, entry.plugin, entry.distribution, f'{text} "{name}"'
            )
        marked.append(entry)
    return tuple(marked)


def _is_builtin(point: EntryPoint) -> bool:
    return point.dist is not None and point.dist.name == "prunekit"


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
