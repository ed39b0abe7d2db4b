"""What a shell completes beyond commands, options and files: components and their kinds."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def complete_components(*kinds: str) -> Complete:
    """Names of the components of these kinds, or of all; behind a comma none that was named."""

    def complete(
        context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        return [
            CompletionItem(f"{before}{comma}{name}", help=summary)
            for kind, name, summary in _list_components()
            if (not kinds or kind in kinds) and name.startswith(last)
            if name not in before.split(",")
        ]

    return complete


def complete_kinds(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The kinds of components, as `prunekit list` calls them."""
    kinds = dict.fromkeys(f"{kind}s" for kind, _, _ in _list_components())
    return [CompletionItem(kind) for kind in kinds if kind.startswith(incomplete)]


def _list_components() -> list[tuple[str, str, str]]:
    """(kind, name, summary); nothing is printed between the words that a user types."""
    # Only now: commands that do something complete nothing.
    from prunekit.catalog.registry import load_registry

    with contextlib.redirect_stderr(io.StringIO()):
        entries = load_registry().entries
    return [(e.kind, e.reference, e.component.summary) for e in entries]
