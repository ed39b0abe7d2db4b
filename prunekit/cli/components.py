"""Commands that show what is installed: list, show."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from prunekit.catalog.component import Component, Radius, Use, default_of
from prunekit.catalog.kinds import (
    KIND_OF,
    KINDS,
    ArchitectureComponent,
    EvaluatorComponent,
    ObjectiveComponent,
    PrunerComponent,
    RewirerComponent,
    WrapperComponent,
)
from prunekit.catalog.registry import Entry, load_registry
from prunekit.cli.completion import complete_components, complete_kinds
from prunekit.cli.group import as_json, echo, print_json, print_table, width_of
from prunekit.errors import UserError, suggest
from prunekit.recipe.describing import field_types, key_of
from prunekit.recipe.values import example_of, limits, write_value

WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    Radius: "radius",
}
"""The type of an option -> how `prunekit show` names it."""

FRAGMENTS = {
    "evaluator": '[[stage]]\nkind = "evaluate"\nwith = [{}]',
    "optimizer": '[[stage]]\nkind = "pretrain"\nepochs = 100\noptimizer = {}',
    "pruner": '[[stage]]\nkind = "prune"\nsparsity = 0.9\npruner = {}',
    "reporter": 'report = ["console", "jsonl", {}]',
    "schedule": '[[stage]]\nkind = "pretrain"\nepochs = 100\n'
    'optimizer = {{ use = "sgd", schedule = {} }}',
    "budget": '[[stage]]\nkind = "prune"\nepochs = 20\nsparsity = 0.95\nbudget = {}',
    "sparsity_schedule": '[[stage]]\nkind = "prune"\nepochs = 20\nsparsity = 0.98\n'
    "sparsity_schedule = {}",
    "rewirer": '[[stage]]\nkind = "pretrain"\nepochs = 100\nsparsity = 0.9\nrewire = {}',
    "backend": "[compute]\nbackend = {}",
    "wrapper": '[[stage]]\nkind = "pretrain"\nepochs = 100\nwrap = [{}]',
}
"""Kind -> a piece of a recipe around the component; the other kinds have a section of their own."""


@click.command("list")
@click.argument("kind", required=False, shell_complete=complete_kinds)
@click.option(
    "--match",
    metavar="PATTERN",
    help="Only names like 'convnext*', including models of timm and torchvision.",
)
@as_json
def list_components(kind: str | None, match: str | None, as_json: bool) -> None:
    """List all components, or those of one KIND (objectives, pruners, ...)."""
    from rich.console import Console

    registry = load_registry()
    wanted = kind and kind.removesuffix("s").replace("-", "_")
    if wanted and wanted not in KINDS:
        raise UserError(f"unknown kind {kind!r}; {suggest(f'{wanted}s', [f'{k}s' for k in KINDS])}")
    entries = [e for k in KINDS for e in registry.entries if e.kind == k and wanted in (None, k)]
    found = find_matches(entries, match) if match else [summarize(entry) for entry in entries]
    if as_json:
        print_json({"components": found, "broken": [vars(p) for p in registry.broken]})
        return
    keys = ("kind", "name", "summary", "distribution", "status")
    rows = [[component[key] for key in keys] for component in found]
    for plugin in registry.broken:
        status = f"broken: {plugin.reason}"
        rows.append(["plugin", plugin.plugin, "", plugin.distribution, status])
    titles = ["kind", "name", "what it is", "from", "status"]
    width = width_of(Console())
    if width and width < 3 + sum(max(map(len, column)) + 2 for column in zip(*rows, strict=True)):
        # What is so of most components is left out, that the others are read.
        titles = titles[:3]
        rows = [[kind, name, _join(what, *more)] for kind, name, what, *more in rows]
    print_table(titles, rows)


def _join(summary: str, distribution: str, status: str) -> str:
    """What a component is, with its origin and its status where they are not the usual ones."""
    told = [] if distribution.partition(" ")[0] == "prunekit" else [f"from {distribution}"]
    told += [] if status == "ready" else [status]
    return f"{summary} ({', '.join(told)})".strip() if told else summary


@click.command()
@click.argument("name", shell_complete=complete_components())
@as_json
def show(name: str, as_json: bool) -> None:
    """Show a component: its options, its paper, a recipe fragment that works."""
    registry = load_registry()
    entries = registry.search(name)
    if not entries:
        bare = name.rpartition(":")[2]
        known = {e.component.name for e in registry.entries}
        advice = f"did you mean {bare!r}?" if bare in known else suggest(bare, known)
        advice = advice if advice.startswith("did") else "see: prunekit list"
        raise UserError(f"there is no component {name!r}; {advice}")
    if as_json:
        print_json({"components": [describe_component(entry) for entry in entries]})
    else:
        echo("\n\n".join(map(render_component, entries)))


def summarize(entry: Entry) -> dict[str, str]:
    """What `prunekit list` says about a component."""
    return {
        "kind": entry.kind,
        "name": entry.component.name,
        "summary": entry.component.summary,
        "plugin": entry.plugin,
        "distribution": entry.distribution,
        "status": entry.status,
    }


def find_matches(entries: Sequence[Entry], pattern: str) -> list[dict[str, str]]:
    """Summaries of the components whose name matches the pattern, and of their models that do.

    A pattern without `*`, `?` or `[` may occur anywhere in a name. Imports what lists the models.
    """
    if not set(pattern) & set("*?["):
        pattern = f"*{pattern}*"
    found = []
    for entry in entries:
        if fnmatch(entry.component.name, pattern):
            found.append(summarize(entry))
        component = entry.component
        if not isinstance(component, ArchitectureComponent) or entry.status != "ready":
            continue
        if component.catalog:
            module, _, function = component.catalog.partition(":")
            for name in getattr(importlib.import_module(module), function)():
                if fnmatch(name, pattern):
                    use = f'use = "{entry.reference}", model = "{name}"'
                    found.append({**summarize(entry), "name": name, "summary": use})
    return found


def describe_component(entry: Entry) -> dict[str, Any]:
    """Everything a component declares, as plain data."""
    return {
        **summarize(entry),
        "paper": entry.component.paper,
        "details": entry.component.details,
        "cost": describe_cost(entry.component),
        "options": describe_options(entry.component.options),
        "recipe": fragment(entry),
    }


def describe_cost(component: Component) -> str:
    """What a component costs, as it says; or from the passes that it declares, by its defaults."""
    if any(map(_is_required, dataclasses.fields(component.options))):
        return component.cost
    options = component.options()
    if isinstance(component, PrunerComponent):
        passes = component.forward_passes(options, 100, 1)
        once = f"{passes} forward passes by default, of a loss of one and epochs of 100 batches"
        return "; ".join(filter(None, (component.cost, once if passes > 1 else "")))
    if component.cost:
        return component.cost
    if isinstance(component, ObjectiveComponent):
        return f"forward passes of an image in a training step: {component.forward_passes(options)}"
    if isinstance(component, EvaluatorComponent):
        return f"forward passes of an image: {component.forward_passes(options)}"
    if isinstance(component, WrapperComponent):
        return f"forward and backward passes in a training step: {component.passes(options)}"
    return ""


def describe_options(options: type) -> list[dict[str, Any]]:
    """The fields of an options dataclass, as plain data."""
    types = field_types(options)
    return [
        {
            "name": key_of(f.name),
            "type": name_type(types[f.name]),
            "default": None if _is_required(f) else default_of(f),
            "required": _is_required(f),
            "limits": limits(f),
            "unit": f.metadata.get("unit", ""),
            "help": f.metadata.get("help", ""),
        }
        for f in dataclasses.fields(options)
    ]


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return default_of(field) is dataclasses.MISSING


def render_component(entry: Entry) -> str:
    """The text that `prunekit show` prints about a component."""
    facts = describe_component(entry)
    lines = [
        f"{facts['name']}: {facts['summary']}",
        f"  kind    {facts['kind']}",
        f"  from    {facts['distribution']}, plugin {facts['plugin']}",
    ]
    if facts["status"] != "ready":
        lines.append(f"  status  {facts['status']}")
    if facts["paper"]:
        lines.append(f"  paper   {facts['paper']}")
    if facts["cost"]:
        lines.append(f"  cost    {facts['cost']}")
    if facts["details"]:
        lines += ["", facts["details"]]
    lines += ["", "options" if facts["options"] else "It has no options."]
    for option in facts["options"]:
        default = "required" if option["required"] else "optional"
        if option["default"] is not None:
            default = f"default {write_value(option['default'])}"
        details = filter(None, (option["type"], option["limits"], option["unit"], default))
        lines += [f"  {option['name']} ({', '.join(details)})", f"      {option['help']}"]
    lines += ["", "in a recipe", *(f"  {line}" for line in facts["recipe"].splitlines())]
    return "\n".join(lines)


def with_article(kind: str) -> str:
    """The kind of a component in words: "an objective", "a sparsity schedule"."""
    return f"{'an' if kind[0] in 'aeo' else 'a'} {kind.replace('_', ' ')}"


def name_type(hint: Any) -> str:
    """The type of an option in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(map(write_value, arguments))
    if origin is Use:
        return with_article(KIND_OF[arguments[0]])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            inner = name_type(arguments[0])
            return (
                f"list of {inner.partition(' ')[2]}s"
                if inner[:2] in ("a ", "an")
                else f"list of {inner}"
            )
        return f"list of {len(arguments)}: {', '.join(map(name_type, arguments))}"
    if arguments and origin is not dict:
        return " | ".join(name_type(a) for a in arguments if a is not type(None))
    return WORDS.get(hint, "table" if origin is dict else str(getattr(hint, "__name__", hint)))


def fragment(entry: Entry, *, example: bool = True) -> str:
    """A piece of a recipe that uses the component, with example values of required options.

    Without any, `example` adds the first optional one and its default.
    """
    component = entry.component
    fields = dataclasses.fields(component.options)
    types = field_types(component.options)
    pairs = [f"{key_of(f.name)} = {example_of(types[f.name])}" for f in fields if _is_required(f)]
    if example and isinstance(component, ObjectiveComponent) and component.teacher:
        pairs.append(f"{component.teacher} = {example_of(types[component.teacher])}")
    if example and not pairs:
        shown = [f for f in fields if default_of(f) is not None]
        pairs = [f"{key_of(f.name)} = {write_value(default_of(f))}" for f in shown[:1]]
    use = f'use = "{entry.reference}"'
    if entry.kind not in FRAGMENTS:
        return "\n".join([f"[{entry.kind}]", use, *pairs])
    inline = f"{{ {', '.join([use, *pairs])} }}" if pairs else f'"{entry.reference}"'
    text = FRAGMENTS[entry.kind].format(inline)
    if isinstance(component, WrapperComponent) and component.scores:
        text = text.replace('"pretrain"\nepochs = 100', '"prune"\nsparsity = 0.9\nepochs = 20')
    if isinstance(component, RewirerComponent) and component.grows:
        text += f'\nsparsity_schedule = "{component.grows}"'
    learns = isinstance(component, PrunerComponent) and component.learns
    return text.replace("\npruner", "\nepochs = 20\npruner") if learns else text
