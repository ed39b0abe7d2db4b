"""The stages of a recipe: resolved, and in an order that makes sense. No torch here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.catalog.component import Use
from prunekit.catalog.containment import ask
from prunekit.errors import suggest
from prunekit.recipe.describing import describe, key_of, uses_in
from prunekit.recipe.resolver import Resolver
from prunekit.recipe.toml.lines import KeyPath
from prunekit.recipe.toml.sections import SELECTION_KEYS, STAGE_OPTIONS, FitOptions
from prunekit.recipe.values import NAME, NAME_RULE, Mistake

TRAINING_KEYS = (
    "epochs",
    *(f.name for f in dataclasses.fields(FitOptions) if f.name != "objective"),
    "sparsity_schedule",
)
"""Keys of a prune stage that only pruners that learn their scores use."""

DECIDES = {
    "allocates": ("budget", "says itself what each layer keeps"),
    "paces": ("sparsity_schedule", "decides itself what it removes by when"),
}
"""Declared flag -> the key that has no effect then, and why."""

REWIRING = ("pretrain", "finetune")
"""Kinds of stages that may have a rewirer."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run, resolved."""

    kind: str
    name: str
    position: int
    options: Any
    sparsity: float = 0.0
    """Sparsity of the network after this stage."""
    limit: int | None = None
    """The most batches in an epoch, for `--smoke`."""

    @property
    def replays(self) -> int:
        """Optimizer steps on each batch."""
        use = self.options.objective
        return ask(use, "replays") if use else 1

    @property
    def select(self) -> str:
        """The validation metric that chooses the best epoch, or "last"."""
        judged = self.options.validate and name_verdict(self.options.validate)
        return str(self.options.select or judged or self.options.objective.component.select)

    @property
    def accuracy_of(self) -> str:
        """Of what the accuracy of an epoch is, such as "attacked training images"."""
        use = self.options.objective
        return str(use.component.accuracy_of(use.options))

    @property
    def epochs(self) -> int:
        """Passes over the training images: the recipe's `epochs` divided by the replays."""
        return -(-(self.options.epochs or 0) // self.replays)

    def describe(self) -> dict[str, Any]:
        """The stage as a recipe would write it, defaults included."""
        return {"kind": self.kind, "name": self.name, **self.describe_options()}

    def describe_options(self, of_path: Callable[[Path], Any] = str) -> dict[str, Any]:
        """Its options as plain data, without those that have no effect in it; see `describe`."""
        table = describe(self.options, of_path)
        return {key: value for key, value in table.items() if key not in self._unused}

    def uses(self) -> Iterator[Use[Any]]:
        """The components that it names, at any depth, without those that have no effect in it."""
        for field in dataclasses.fields(self.options):
            if key_of(field.name) not in self._unused:
                yield from uses_in(getattr(self.options, field.name))

    @property
    def _unused(self) -> set[str]:
        """Keys that a recipe cannot give to this stage, as its kind has them for others."""
        if self.kind in REWIRING and self.options.rewire is None:
            return set(SELECTION_KEYS)
        unused: set[str] = set()
        if self.kind == "prune" and not self.options.pruner.component.learns:
            unused |= set(find_unused(describe(self.options)))
        return unused.union(*(find_decided(use.component) for use in self.choosing))

    @property
    def choosing(self) -> list[Use[Any]]:
        """The pruner or the rewirer."""
        named = (getattr(self.options, key, None) for key in ("pruner", "rewire"))
        return [use for use in named if use is not None]

    @property
    def trains(self) -> bool:
        """Whether it trains the weights, and not only scores of them."""
        pruner = getattr(self.options, "pruner", None)
        return self.kind in REWIRING or (pruner is not None and pruner.component.trains_weights)

    @property
    def prunes(self) -> bool:
        """Whether masks come out of this stage, with a pruner or with a rewirer."""
        return bool(self.choosing)


def name_verdict(use: Use[Any]) -> str:
    """What a stage's validation calls the images that withstand an evaluator: as it does itself."""
    return f"{use.name}.{use.component.verdict.replace('correct', 'accuracy')}"


def find_decided(component: Any) -> dict[str, str]:
    """Keys whose part a pruner or a rewirer does itself, and why they have no effect."""
    return {key: why for flag, (key, why) in DECIDES.items() if getattr(component, flag, False)}


def find_unused(table: Mapping[str, Any]) -> list[str]:
    """Keys of a prune stage that have no effect with a one-shot pruner."""
    trained = [key for key in TRAINING_KEYS if key in table]
    return [*trained, *(["bn"] if table.get("bn", "recalibrate") != "recalibrate" else [])]


def resolve_stages(
    recipe: Mapping[str, Any], resolver: Resolver, swept: bool, notes: list[str]
) -> tuple[Stage, ...]:
    """The stages that a recipe's data describes; the resolver collects the problems.

    Where a sweep makes options of a stage useless, that is added to `notes`.
    """
    tables = recipe.get("stage", [])
    if isinstance(tables, dict):
        resolver.problem(("stage",), "stages are a list; write [[stage]], with two brackets")
        return ()
    if not isinstance(tables, list) or not tables:
        resolver.problem(("stage",), 'a recipe needs stages; write [[stage]] and kind = "pretrain"')
        return ()
    objective = None
    if "objective" in recipe:
        objective = resolver.use("objective", recipe["objective"], ("objective",))
    stages: list[Stage] = []
    names: set[str] = set()
    sparsity = 0.0
    architecture = recipe.get("architecture")
    # The file of `init`, or a network from Python, may be pruned already.
    may_be_pruned = isinstance(architecture, dict) and (
        "init" in architecture or architecture.get("use") == "given"
    )
    for position, table in enumerate(tables):
        path: KeyPath = ("stage", position)
        try:
            kind, name = _identify(table, path)
        except Mistake as mistake:
            resolver.problem(mistake.path, str(mistake))
            may_be_pruned = True  # this may have been meant as a prune stage
            continue
        if name in names:
            resolver.problem(path, f'there are two stages {name!r}; give each a name = "..."')
        may_be_pruned |= kind == "prune" or "rewire" in table
        if kind == "finetune" and not may_be_pruned:
            resolver.problem(path, "finetune before any prune; put a prune stage before it")
        names.add(name)
        own = {k: v for k, v in table.items() if k not in ("kind", "name")}
        own = _drop_misplaced(kind, own, resolver, path)
        own = _drop_unused(kind, own, resolver, path, name, swept, notes)
        options = resolver.options(STAGE_OPTIONS[kind], own, path, f"stage {name!r}")
        if options is None:
            continue
        if kind == "prune":
            _check_prune(options, sparsity, resolver, path, name)
            sparsity = max(sparsity, options.sparsity)
        elif kind in REWIRING and options.rewire is not None:
            sparsity = options.sparsity
        if kind != "evaluate" and options.objective is None:
            learns = kind != "prune" or options.pruner.component.learns
            if learns and "objective" not in recipe:
                message = f"stage {name!r} has no objective; write [objective] and "
                message += 'use = "trades" for all stages, or objective = "..." in this one'
                resolver.problem(path, message)
            options = dataclasses.replace(options, objective=objective)
        if kind != "evaluate" and options.objective is not None:
            _check_select(options, resolver, path, name)
        stages.append(Stage(kind, name, position, options, sparsity))
    return tuple(stages)


def _identify(table: Any, path: KeyPath) -> tuple[str, str]:
    """(kind, name) of a stage. Raises `Mistake`."""
    if not isinstance(table, dict):
        message = f"a stage must be a table, got {table!r}; write [[stage]] and kind = ..."
        raise Mistake(path, message)
    if "kind" not in table:
        kinds = ", ".join(STAGE_OPTIONS)
        raise Mistake(path, f'stage without a kind; write kind = "pretrain" (or: {kinds})')
    kind = table["kind"]
    if not isinstance(kind, str) or kind not in STAGE_OPTIONS:
        advice = suggest(str(kind), STAGE_OPTIONS)
        raise Mistake((*path, "kind"), f"the kind of a stage cannot be {kind!r}; {advice}")
    name = table.get("name", kind)
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise Mistake((*path, "name"), f"the name of a stage {NAME_RULE}, got {name!r}")
    return kind, name


def _check_prune(options: Any, before: float, resolver: Resolver, path: KeyPath, name: str) -> None:
    if options.sparsity <= before:
        resolver.problem(
            (*path, "sparsity"),
            f"sparsity counts all weights of the dense network: {options.sparsity:g} after "
            f"{before:g} removes nothing; write a larger one",
        )
    if options.pruner.component.learns and options.epochs is None:
        resolver.problem(
            path,
            f"pruner {options.pruner.component.name!r} learns its scores, so stage {name!r} needs "
            "epochs; write epochs = 20",
        )


def _check_select(options: Any, resolver: Resolver, path: KeyPath, name: str) -> None:
    component = options.objective.component
    judged = [name_verdict(options.validate)] if options.validate else []
    known = [*component.validates, *judged, "last"]
    # The core adds it where the classes of the images are unbalanced.
    if options.select not in (None, *known) and not (
        options.select == "balanced_accuracy" and "accuracy" in known
    ):
        resolver.problem(
            (*path, "select"),
            f"stage {name!r}: objective {component.name!r} has no validation metric "
            f"{options.select!r}; {suggest(options.select, known)}",
        )


def _drop_misplaced(kind: str, own: Any, resolver: Resolver, path: KeyPath) -> dict[str, Any]:
    """The keys of a stage, without those that only other kinds have: mistakes."""
    known = {k: [key_of(f.name) for f in dataclasses.fields(o)] for k, o in STAGE_OPTIONS.items()}
    kept = {}
    for key, value in own.items():
        owners = [other for other, keys in known.items() if key in keys]
        if kind in owners or not owners:
            kept[key] = value
            continue
        told = f"{key} is for stages of kind {', '.join(owners)}, not {kind}; remove it"
        resolver.problem((*path, key), told)
    return kept


def _drop_unused(
    kind: str,
    own: dict[str, Any],
    resolver: Resolver,
    path: KeyPath,
    stage: str,
    swept: bool,
    notes: list[str],
) -> dict[str, Any]:
    """The keys of a stage, without those that its pruner or rewirer, or none, does not use.

    Such a key is a mistake where it is written beside the pruner. It is only noted if the pruner
    comes from elsewhere: from a sweep, `--set`, or a recipe that extends this one.
    """
    if kind == "evaluate":
        return own
    if kind in REWIRING and "rewire" not in own:
        for key in [key for key in SELECTION_KEYS if key in own]:
            message = f"{key} is for stages that prune; remove it, or name a rewirer: rewire = ..."
            resolver.problem((*path, key), message)
        return {k: v for k, v in own.items() if k not in SELECTION_KEYS}
    key = "rewire" if "rewire" in own else "pruner"
    value = own.get(key, "score")
    name = str(value.get("use") if isinstance(value, dict) else value)
    named = "rewirer" if key == "rewire" else "pruner"
    found: list[Any] = [e.component for e in resolver.registry.search(name, named)]
    unused: dict[str, str] = {}
    if kind == "prune" and found and not found[0].learns:
        unused |= dict.fromkeys(find_unused(own), "is one-shot")
    if found:
        unused |= {k: why for k, why in find_decided(found[0]).items() if k in own}
    chosen = resolver.locate((*path, key)).file
    noted: dict[str, list[str]] = {}
    for key, why in unused.items():
        if not swept and resolver.locate((*path, key)).file == chosen:
            message = f"{named} {name!r} {why}: {key} has no effect; remove it"
            resolver.problem((*path, key), message)
        else:
            noted.setdefault(why, []).append(key)
    for why, keys in noted.items():
        told = f"{named} {name!r} {why} and does not use {', '.join(keys)}"
        notes.append(f"stage {stage!r}: {told}")
    return {k: v for k, v in own.items() if k not in unused}
