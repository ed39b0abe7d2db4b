"""The hooks: one for each kind of component, all of one shape.

A plugin is a module that an entry point of the group `prunekit` names:

    [project.entry-points.prunekit]
    mine = "my_plugin"

Hooks only declare; the code of a component is imported when a recipe uses it. For each kind,
`prunekit new plugin my-plugin --kind KIND` writes a complete package with tests, which
docs/plugins.md shows and explains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pluggy

from prunekit.catalog.component import Component
from prunekit.catalog.kinds import KINDS

hookspec = pluggy.HookspecMarker("prunekit")


def _specify(declaration: type[Component]) -> Callable[[], Iterable[Component]]:
    """The hook of a kind: a function without arguments that gives declarations."""

    def hook() -> Iterable[Component]:
        raise NotImplementedError

    hook.__doc__ = declaration.__doc__
    specified: Callable[[], Iterable[Component]] = hookspec(hook)
    return specified


globals().update({f"prunekit_{kind}s": _specify(found) for kind, found in KINDS.items()})
