"""Shell completion: names of components for options and arguments, and `prunekit completion`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from prunekit.catalog.kinds import KINDS
from prunekit.cli.group import echo

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def complete_components(*kinds: str) -> Complete:
    """Complete names of components of these kinds, or of all; after a comma, only new ones."""

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
    """Complete kinds of components as `prunekit list` takes them: objectives, pruners, ..."""
    kinds = (f"{kind}s" for kind in KINDS)
    return [CompletionItem(kind) for kind in kinds if kind.startswith(incomplete)]


def component_option(flag: str, kind: str, **settings: Any) -> Decorator:
    """An option that takes the name of a component of this kind, and completes it."""
    return click.option(flag, shell_complete=complete_components(kind), **settings)


def _list_components() -> list[tuple[str, str, str]]:
    """(kind, name, summary) of every component; whatever plugins print is dropped."""
    # Imported here because only shells that ask for a completion need it.
    from prunekit.catalog.registry import load_registry

    with contextlib.redirect_stderr(io.StringIO()):
        entries = load_registry().entries
    return [(e.kind, e.reference, e.component.summary) for e in entries]


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def print_completion(context: click.Context, shell: str) -> None:
    """Print a script that lets SHELL complete commands, components and recipes.

    \b
    bash   eval "$(prunekit completion bash)"      in ~/.bashrc
    zsh    eval "$(prunekit completion zsh)"       in ~/.zshrc, after compinit
    fish   prunekit completion fish | source       in ~/.config/fish/config.fish
    """
    found = get_completion_class(shell)
    assert found is not None
    main = context.find_root().command
    echo(found(main, {}, "prunekit", "_PRUNEKIT_COMPLETE").source())
