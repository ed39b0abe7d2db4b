"""The stages of a recipe: resolved, and in an order that makes sense. No torch here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prunekit.catalog.component import Use
from prunekit.recipe.resolver import Resolver, describe
from prunekit.recipe.sections import STAGE_OPTIONS
from prunekit.recipe.values import KeyPath, suggest

TRAINING_KEYS = ("epochs", "optimizer", "select", "clip_norm")
"""Keys of a prune stage that serve the learning of scores."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run, resolved. `limit`: the most batches of an epoch (smoke)."""

    kind: str
    name: str
    position: int
    options: Any
    sparsity: float = 0.0
    """Of the network after this stage."""
    limit: int | None = None

    @property
    def replays(self) -> int:
        """Optimiser steps on each batch."""
        use = self.options.objective
        return use.component.replays(use.options) if use else 1

    @property
    def epochs(self) -> int:
        """Passes over the training images: a recipe's `epochs` is the budget before replays."""
        return -(-(self.options.epochs or 0) // self.replays)

    def describe(self) -> dict[str, Any]:
        """The stage as a recipe would say it, defaults written out."""
        table = {"kind": self.kind, "name": self.name, **describe(self.options)}
        if self.kind == "prune" and not self.options.pruner.component.learns:
            # A recipe that says these of a one-shot pruner is refused.
            table = {k: v for k, v in table.items() if k not in find_idle(table)}
        return table


def find_idle(table: Mapping[str, Any]) -> list[str]:
    """Keys of a prune stage that do nothing for a one-shot pruner."""
    trained = [key for key in TRAINING_KEYS if key in table]
    return [*trained, *(["bn"] if table.get("bn", "recalibrate") != "recalibrate" else [])]


def uses_in(value: Any) -> Iterator[Use[Any]]:
    """All components that options name, at any depth."""
    if isinstance(value, Use):
        yield value
        yield from uses_in(value.options)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from uses_in(getattr(value, f.name))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from uses_in(item)


def resolve_stages(
    recipe: Mapping[str, Any], resolver: Resolver, swept: bool, notes: list[str]
) -> tuple[Stage, ...]:
    """The stages of a recipe's data, as far as they are right; problems go to the resolver."""
    tables = recipe.get("stage", [])
    if isinstance(tables, dict):
        resolver.problem(("stage",), "a recipe has several stages; write [[stage]], two brackets")
        return ()
    if not isinstance(tables, list) or not tables:
        resolver.problem(("stage",), 'a recipe needs stages; write [[stage]] and kind = "pretrain"')
        return ()
    objective = None
    if "objective" in recipe:
        objective = resolver.use("objective", recipe["objective"], ("objective",))
    stages: list[Stage] = []
    known: dict[str, str] = {}
    unclear = False
    sparsity = 0.0
    architecture = recipe.get("architecture")
    started = isinstance(architecture, dict) and "init" in architecture  # with masks, maybe
    for position, table in enumerate(tables):
        path: KeyPath = ("stage", position)
        identity = _identify(table, path, resolver)
        if identity is None:
            unclear = True
            continue
        kind, name = identity
        if name in known:
            resolver.problem(path, f'there are two stages {name!r}; give each a name = "..."')
        if kind == "finetune" and not (started or unclear or "prune" in known.values()):
            resolver.problem(path, "finetune before any prune; put a prune stage before it")
        known[name] = kind
        own = {k: v for k, v in table.items() if k not in ("kind", "name")}
        if kind == "prune":
            own = _drop_idle(own, resolver, path, name, swept, notes)
        options = resolver.options(STAGE_OPTIONS[kind], own, path, f"stage {name!r}")
        if options is None:
            continue
        if kind == "prune":
            _check_prune(options, sparsity, resolver, path, name)
            sparsity = max(sparsity, options.sparsity)
        if kind != "evaluate" and options.objective is None:
            learns = kind != "prune" or options.pruner.component.learns
            if learns and "objective" not in recipe:
                resolver.problem(
                    path, f"stage {name!r} has no objective; write [objective] and "
                    'use = "trades" for all stages, or objective = "..." in this one'
                )  # fmt: skip
            options = dataclasses.replace(options, objective=objective)
        stages.append(Stage(kind, name, position, options, sparsity))
    return tuple(stages)


def _identify(table: Any, path: KeyPath, resolver: Resolver) -> tuple[str, str] | None:
    """(kind, name) of a stage; None where a problem was recorded."""
    if not isinstance(table, dict):
        resolver.problem(path, f"a stage is a table, got {table!r}; write [[stage]] and kind = ...")
        return None
    if "kind" not in table:
        kinds = ", ".join(STAGE_OPTIONS)
        resolver.problem(path, f'stage without a kind; write kind = "pretrain" (or: {kinds})')
        return None
    kind = table["kind"]
    if not isinstance(kind, str) or kind not in STAGE_OPTIONS:
        message = f"a stage's kind cannot be {kind!r}; {suggest(str(kind), STAGE_OPTIONS)}"
        resolver.problem((*path, "kind"), message)
        return None
    name = table.get("name", kind)
    if not isinstance(name, str) or not re.fullmatch(r"[\w+-]+", name):
        message = f"name of a stage is letters, digits, '-', '_' and '+', got {name!r}"
        resolver.problem((*path, "name"), message)
        return None
    return kind, name


def _check_prune(options: Any, before: float, resolver: Resolver, path: KeyPath, name: str) -> None:
    if options.sparsity <= before:
        resolver.problem(
            (*path, "sparsity"),
            f"sparsity is of the dense network: {options.sparsity:g} after {before:g} removes "
            "nothing; write more than that",
        )
    if options.pruner.component.learns and options.epochs is None:
        resolver.problem(
            path,
            f"pruner {options.pruner.component.name!r} learns its scores, so stage {name!r} needs "
            "epochs; write epochs = 20",
        )


def _drop_idle(
    own: dict[str, Any],
    resolver: Resolver,
    path: KeyPath,
    name: str,
    swept: bool,
    notes: list[str],
) -> dict[str, Any]:
    """Without what a one-shot pruner has no use for.

    That is a mistake where it is written beside it, and noted where a sweep, `--set` or a recipe
    that extends this one put the pruner there.
    """
    pruner = own.get("pruner", "score")
    used = str(pruner.get("use") if isinstance(pruner, dict) else pruner)
    found = [e for e in resolver.registry.entries if (e.kind, e.component.name) == (
        "pruner", used.rpartition(":")[2])]  # fmt: skip
    if not found or found[0].component.learns:
        return own
    idle = find_idle(own)
    chosen = resolver.locate((*path, "pruner")).file
    wrong = [k for k in idle if not swept and resolver.locate((*path, k)).file == chosen]
    for key in wrong:
        message = f"pruner {used!r} is one-shot: {key} does nothing; remove it"
        resolver.problem((*path, key), message)
    if idle and not wrong:
        keys = ", ".join(idle)
        notes.append(f"stage {name!r}: pruner {used!r} is one-shot and does not use {keys}")
    return {k: v for k, v in own.items() if k not in idle}
