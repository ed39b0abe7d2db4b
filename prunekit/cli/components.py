"""Commands that show what there is: list, show."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from prunekit.catalog.component import Radius, Use, default_of
from prunekit.catalog.registry import Entry, Registry
from prunekit.cli import completion
from prunekit.cli.group import (
    as_json,
    print_json,
)
from prunekit.errors import UserError
from prunekit.recipe.resolver import KIND_OF, field_types, key_of
from prunekit.recipe.values import example_of, limits, suggest

if TYPE_CHECKING:
    pass


@click.command("list")
@click.argument("kind", required=False, shell_complete=completion.complete_kinds)
@click.option("--match", metavar="PATTERN",
              help="Names like 'convnext*' alone, those of timm and torchvision too.")  # fmt: skip
@as_json
def list_components(kind: str | None, match: str | None, as_json: bool) -> None:
    """List all components, or those of one KIND (objectives, pruners, ...)."""
    from prunekit.catalog.registry import load_registry
    from prunekit.cli.components import find_matches, print_table, summarize
    from prunekit.recipe.values import suggest

    registry = load_registry()
    kinds = list(dict.fromkeys(entry.kind for entry in registry.entries))
    wanted = kind and kind.removesuffix("s")
    if wanted and wanted not in kinds:
        raise UserError(f"unknown kind {kind!r}; {suggest(f'{wanted}s', [f'{k}s' for k in kinds])}")
    entries = [e for k in kinds for e in registry.entries if e.kind == k and wanted in (None, k)]
    found = find_matches(entries, match) if match else [summarize(entry) for entry in entries]
    if as_json:
        broken = [vars(plugin) for plugin in registry.broken]
        print_json({"components": found, "broken": broken})
        return
    rows = [tuple(c[k] for k in ("kind", "name", "summary", "distribution", "status"))
            for c in found]  # fmt: skip
    rows += [("plugin", b.plugin, "", b.distribution, f"broken: {b.reason}")
             for b in registry.broken]  # fmt: skip
    print_table(("kind", "name", "what it is", "from", "status"), rows)


@click.command()
@click.argument("name", shell_complete=completion.complete_components())
@as_json
def show(name: str, as_json: bool) -> None:
    """Show a component: its options, its paper, a recipe fragment that works."""
    from prunekit.catalog.registry import load_registry
    from prunekit.cli.components import describe_component, find_anywhere, render_component

    entries = find_anywhere(load_registry(), name)
    if as_json:
        print_json({"components": [describe_component(entry) for entry in entries]})
        return
    click.echo("\n\n".join(render_component(entry) for entry in entries))


WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    Radius: "radius",
}


def find_anywhere(registry: Registry, name: str) -> list[Entry]:
    """All components of that name, of whatever kind; "plugin:name" asks one plugin."""
    plugin, _, bare = name.rpartition(":")
    found = [e for e in registry.entries if e.component.name == bare and plugin in ("", e.plugin)]
    if not found:
        names = {e.component.name for e in registry.entries}
        advice = suggest(name, names)
        advice = advice if advice.startswith("did") else "see: prunekit list"
        raise UserError(f"there is no component {name!r}; {advice}")
    return found


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A plain table; a terminal's width is kept by wrapping, a pipe gets whole lines."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(header):
        table.add_column(title, no_wrap=number < 2)
    for row in rows:
        table.add_row(*map(escape, row))
    wide = sum(max(map(len, column)) + 2 for column in zip(header, *rows, strict=True))
    Console(width=None if Console().is_terminal else wide).print(table)


def summarize(entry: Entry) -> dict[str, str]:
    """What `prunekit list` says of a component."""
    return {
        "kind": entry.kind,
        "name": entry.component.name,
        "summary": entry.component.summary,
        "plugin": entry.plugin,
        "distribution": entry.distribution,
        "status": entry.status,
    }


def find_matches(entries: Sequence[Entry], pattern: str) -> list[dict[str, str]]:
    """What `summarize` says of components whose name is like the pattern, and of their models.

    A pattern without `*`, `?` or `[` may stand anywhere in a name. Imports what lists the models.
    """
    if not set(pattern) & set("*?["):
        pattern = f"*{pattern}*"
    found = []
    for entry in entries:
        if fnmatch(entry.component.name, pattern):
            found.append(summarize(entry))
        if entry.component.catalog and entry.status == "ready":
            module, _, function = entry.component.catalog.partition(":")
            for name in getattr(importlib.import_module(module), function)():
                if fnmatch(name, pattern):
                    use = f'use = "{entry.reference}", model = "{name}"'
                    found.append({**summarize(entry), "name": name, "summary": use})
    return found


def describe_component(entry: Entry) -> dict[str, Any]:
    """Everything of a declaration, as plain data."""
    component = entry.component
    return {
        **summarize(entry),
        "paper": component.paper,
        "details": component.details,
        "options": describe_options(component.options),
        "recipe": fragment(entry),
    }


def describe_options(options: type) -> list[dict[str, Any]]:
    """The fields of an options dataclass, as plain data."""
    types = field_types(options)
    return [
        {
            "name": key_of(f.name),
            "type": name_type(types[f.name]),
            "default": _plain(default_of(f)),
            "required": default_of(f) is dataclasses.MISSING,
            "limits": limits(f),
            "unit": f.metadata.get("unit", ""),
            "help": f.metadata.get("help", ""),
        }
        for f in dataclasses.fields(options)
    ]


def render_component(entry: Entry) -> str:
    """The same for a reader."""
    facts = describe_component(entry)
    lines = [f"{facts['name']}: {facts['summary']}"]
    lines += [
        f"  kind    {facts['kind']}",
        f"  from    {facts['distribution']}, plugin {facts['plugin']}",
    ]
    if facts["status"] != "ready":
        lines.append(f"  status  {facts['status']}")
    if facts["paper"]:
        lines.append(f"  paper   {facts['paper']}")
    if facts["details"]:
        lines += ["", facts["details"]]
    lines += ["", "options" if facts["options"] else "It has no options."]
    for option in facts["options"]:
        default = "required" if option["required"] else "optional"
        if option["default"] is not None:
            default = f"default {write_value(option['default'])}"
        details = ", ".join(
            filter(None, (option["type"], option["limits"], option["unit"], default))
        )
        lines += [f"  {option['name']} ({details})", f"      {option['help']}"]
    lines += ["", "in a recipe", *(f"  {line}" for line in facts["recipe"].splitlines())]
    return "\n".join(lines)


def name_type(hint: Any) -> str:
    """The type of an option in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(f'"{a}"' if isinstance(a, str) else str(a) for a in arguments)
    if origin is Use:
        return f"a {KIND_OF[arguments[0]]}"
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {name_type(arguments[0])}"
        return f"list of {len(arguments)}: {', '.join(map(name_type, arguments))}"
    if arguments and origin is not dict:
        return " | ".join(name_type(a) for a in arguments if a is not type(None))
    return WORDS.get(hint, "table" if origin is dict else str(getattr(hint, "__name__", hint)))


def fragment(entry: Entry, *, example: bool = True) -> str:
    """A piece of a recipe that names the component; required options with an example.

    With `example`, one of the others where none is required.
    """
    component = entry.component
    types = field_types(component.options)
    needed = [
        f"{key_of(f.name)} = {example_of(types[f.name])}"
        for f in dataclasses.fields(component.options)
        if default_of(f) is dataclasses.MISSING
    ]
    first = next(
        (
            f"{key_of(f.name)} = {write_value(_plain(default_of(f)))}"
            for f in dataclasses.fields(component.options)
            if default_of(f) not in (dataclasses.MISSING, None)
        ),
        None,
    )
    pairs = needed or ([first] if first and example else [])
    use = f'use = "{entry.reference}"'
    inline = "{ " + ", ".join([use, *pairs]) + " }" if pairs else f'"{entry.reference}"'
    stage = '[[stage]]\nkind = "{kind}"\n'
    match entry.kind:
        case "dataset" | "architecture" | "objective":
            return "\n".join([f"[{entry.kind}]", use, *pairs])
        case "pruner":
            epochs = "epochs = 20\n" if component.learns else ""
            return stage.format(kind="prune") + f"sparsity = 0.9\n{epochs}pruner = {inline}"
        case "evaluator":
            return stage.format(kind="evaluate") + f"with = [{inline}]"
        case "reporter":
            return f'report = ["console", "jsonl", {inline}]'
        case "optimizer":
            return stage.format(kind="pretrain") + f"epochs = 100\noptimizer = {inline}"
        case _:
            return (
                stage.format(kind="pretrain")
                + f'epochs = 100\noptimizer = {{ use = "sgd", schedule = {inline} }}'
            )


def render_preview(preview: Mapping[str, Any], recipe: str) -> str:
    """What a run would do, as comments behind the recipe itself."""
    lines = [f"# into {preview['out']}, stages in {preview['store']}", "", recipe]
    for run in preview["runs"]:
        lines.append(
            f"# {run['run']}: {run['parameters']:,} parameters, {run['prunable']:,} prunable"
        )
        lines += [
            f"#   {stage['name']:<12} {stage['status']:<7} {stage['steps']:>9,} steps "
            f"{stage['forward_passes']:>11,} forward passes   {stage['key'][:12]}"
            for stage in run["stages"]
        ]
    todo = [s for run in preview["runs"] for s in run["stages"] if s["status"] == "to do"]
    passes = sum(stage["forward_passes"] for stage in todo)
    return "\n".join([*lines, f"# to do: {len(todo)} stages, {passes:,} forward passes of a batch"])


def _plain(value: Any) -> Any:
    if value is dataclasses.MISSING:
        return None
    return list(value) if isinstance(value, tuple) else value


def write_value(value: Any) -> str:
    """The value as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(map(write_value, value))}]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {write_value(v)}" for k, v in value.items()) + " }"
    return str(value)
