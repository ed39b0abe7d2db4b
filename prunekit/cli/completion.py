"""What a shell completes: components, kinds, recipes, addresses. No torch, and no error ever."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from prunekit.store.layout import PLAN

if TYPE_CHECKING:
    from prunekit.catalog.registry import Registry


Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


DEVICES = ("auto", "cpu", "cuda", "mps")


DEPTH, MOST = 3, 200
"""How deep recipes are looked for, and how many are told."""


def _silently(find: Callable[..., Iterable[CompletionItem]]) -> Complete:
    """Whatever happens, nothing is printed between the words that a user types."""

    @wraps(find)
    def complete(
        context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Exception, SystemExit):
            return list(find(context, incomplete))
        return []

    return complete


def complete_components(*kinds: str) -> Complete:
    """Names of the components of these kinds, or of all."""

    @_silently
    def complete(context: click.Context, incomplete: str) -> Iterator[CompletionItem]:
        yield from _list_components(_load(), kinds, incomplete)

    return complete


def _load() -> Registry:
    # Only now: commands that do something complete nothing.
    from prunekit.catalog.registry import load_registry

    return load_registry()


def _list_components(
    registry: Registry, kinds: tuple[str, ...], incomplete: str
) -> Iterator[CompletionItem]:
    for entry in registry.entries:
        if (not kinds or entry.kind in kinds) and entry.reference.startswith(incomplete):
            yield CompletionItem(entry.reference, help=entry.component.summary)


@_silently
def complete_kinds(context: click.Context, incomplete: str) -> Iterator[CompletionItem]:
    """The kinds of components, as `prunekit list` calls them."""
    for kind in dict.fromkeys(entry.kind for entry in _load().entries):
        if f"{kind}s".startswith(incomplete):
            yield CompletionItem(f"{kind}s")


@_silently
def complete_evaluators(context: click.Context, incomplete: str) -> Iterator[CompletionItem]:
    """Names of evaluators, with commas between them; none twice."""
    before, comma, last = incomplete.rpartition(",")
    for item in _list_components(_load(), ("evaluator",), last):
        if item.value not in before.split(","):
            yield CompletionItem(f"{before}{comma}{item.value}", help=item.help)


@_silently
def complete_devices(context: click.Context, incomplete: str) -> Iterator[CompletionItem]:
    """Devices that may be there."""
    yield from (CompletionItem(d) for d in DEVICES if d.startswith(incomplete))


@_silently
def complete_recipes(context: click.Context, incomplete: str) -> Iterator[CompletionItem]:
    """TOML files below where the word leads; run folders only where it leads into one."""
    folder = Path(incomplete).parent if not incomplete.endswith("/") else Path(incomplete)
    found = [
        path
        for path in sorted(_walk(folder, DEPTH))
        if str(path).startswith(incomplete.removeprefix("./"))
    ]
    dot = "./" if incomplete.startswith("./") else ""
    yield from (CompletionItem(f"{dot}{path}") for path in found[:MOST])
    if not found:
        yield CompletionItem(incomplete, type="file")


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and depth > 1 and not (path / PLAN).exists():
            with contextlib.suppress(OSError):
                yield from _walk(path, depth - 1)
        elif path.suffix == ".toml" and path.name != "pyproject.toml":
            yield path


@_silently
def complete_addresses(context: click.Context, incomplete: str) -> Iterator[CompletionItem]:
    """Addresses of the recipe that the command names: "prune.sparsity="."""
    from prunekit.recipe.document import load_recipe

    # With `--set` still without its value, click has put no argument where it belongs.
    named = [context.params.get("recipe"), *(context.params.get("recipes") or ()), *context.args]
    path = next(Path(word) for word in named if word and Path(word).is_file())
    for address, text in _list_addresses(load_recipe(path).data, _load()):
        if address.startswith(incomplete):
            yield CompletionItem(f"{address}=", help=text)


def _list_addresses(data: dict[str, Any], registry: Registry) -> Iterator[tuple[str, str]]:
    from prunekit.recipe.document import SECTIONS
    from prunekit.recipe.sections import (
        STAGE_OPTIONS,
        ArchitectureOptions,
        DataOptions,
        ThreatOptions,
    )

    core: dict[str, type] = {
        "dataset": DataOptions, "architecture": ArchitectureOptions, "threat": ThreatOptions,
    }  # fmt: skip
    yield "seed", "decides everything random"
    for section in SECTIONS:
        if section not in data:
            continue
        yield from _list_options(section, core.get(section))
        table = data[section]
        used = table.get("use") if isinstance(table, dict) else table
        for entry in registry.entries:
            if (entry.kind, entry.reference) == (section, used):
                yield section, f"another {section}"
                yield from _list_options(section, entry.component.options)
    for stage in data.get("stage", []):
        kind = stage["kind"]
        yield from _list_options(stage.get("name", kind), STAGE_OPTIONS[kind])


def _list_options(owner: str, options: type | None) -> Iterator[tuple[str, str]]:
    from prunekit.recipe.resolver import key_of

    for field in dataclasses.fields(options) if options else ():
        yield f"{owner}.{key_of(field.name)}", field.metadata.get("help", "")


def write_script(shell: str, main: click.Command) -> str:
    """What the shell has to read, once, to complete `prunekit`."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    return found(main, {}, "prunekit", "_PRUNEKIT_COMPLETE").source()
