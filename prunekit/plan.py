"""Recipe + registry -> Plan: names resolved, options typed, sweeps unrolled. No torch here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.component import Use
from prunekit.contracts import Architecture, Data, Objective, Reporter, Threat
from prunekit.errors import Problem, RecipeError
from prunekit.options import KeyPath, Resolver, describe, suggest
from prunekit.recipe import FORMAT, Recipe
from prunekit.registry import Registry
from prunekit.settings import (
    STAGES,
    ArchitectureOptions,
    DataOptions,
    FitOptions,
    ThreatOptions,
)
from prunekit.sweep import label, unroll


@dataclass(frozen=True)
class Stage:
    """One stage of a run, resolved. `batches` limits an epoch or an evaluation (smoke)."""

    kind: str
    name: str
    position: int
    options: Any
    sparsity: float = 0.0
    """Of the network after this stage."""
    batches: int | None = None


@dataclass(frozen=True)
class Run:
    """One combination of a sweep, or the only run of a recipe."""

    label: str
    settings: Mapping[str, Any]
    folder: Path
    """Of the recipe: where its relative paths start."""
    seed: int
    dataset: Use[Data]
    data: DataOptions
    architecture: Use[Architecture]
    init: Path | None
    threat: Threat | None
    stages: tuple[Stage, ...]

    def uses(self) -> list[Use[Any]]:
        """All components it names, at any depth."""
        return list(uses_in((self.dataset, self.architecture, [s.options for s in self.stages])))

    def describe(self) -> dict[str, Any]:
        """The run as a recipe: defaults written out, sweep and overrides taken in."""
        threat = {"norm": self.threat.norm, "eps": self.threat.eps} if self.threat else None
        sections = {
            "dataset": {**describe(self.dataset), **describe(self.data)},
            "architecture": {
                **describe(self.architecture),
                **({"init": str(self.init)} if self.init else {}),
            },
            **({"threat": threat} if threat else {}),
            "stage": [{"kind": s.kind, "name": s.name, **describe(s.options)} for s in self.stages],
        }
        return {"seed": self.seed, **sections}


@dataclass(frozen=True)
class Plan:
    """All that is to be done. `document` is the recipe with overrides and `extends` taken in."""

    name: str
    path: Path
    runs: tuple[Run, ...]
    reporters: tuple[Use[Reporter], ...]
    document: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    smoke: bool = False

    @property
    def swept(self) -> bool:
        return "sweep" in self.document


def make_plan(recipe: Recipe, registry: Registry) -> Plan:
    """Resolve a recipe.

    Raises `RecipeError` with every problem that was found.
    """
    problems = _check_top(recipe)
    notes: list[str] = []
    combinations = list(unroll(recipe, problems))
    runs, labels = [], label([settings for settings, _ in combinations])
    for name, (settings, variant) in zip(labels, combinations, strict=True):
        resolver = Resolver(registry, recipe.path.parent, variant.locate)
        run = _resolve_run(variant, resolver, name, settings, notes)
        problems += resolver.problems
        if run is not None:
            runs.append(run)
    resolver = Resolver(registry, recipe.path.parent, recipe.locate)
    reporters = _resolve_reporters(recipe, resolver)
    problems += resolver.problems
    if problems:
        raise RecipeError(problems)
    name = recipe.data.get("name", recipe.path.stem)
    return Plan(name, recipe.path, tuple(runs), reporters, recipe.data, tuple(dict.fromkeys(notes)))


# The recipe's tables


TOP_KEYS = (
    "format", "name", "seed", "dataset", "architecture", "threat", "objective", "stage", "sweep",
    "report",
)  # fmt: skip


def _check_top(recipe: Recipe) -> list[Problem]:
    problems = []

    def problem(path: KeyPath, message: str) -> None:
        problems.append(Problem(recipe.locate(path), message))

    for key in recipe.data:
        if key not in TOP_KEYS:
            problem((key,), f"unknown key {key!r}; {suggest(key, TOP_KEYS)}")
    version = recipe.data.get("format", FORMAT)
    if version != FORMAT:
        problem(("format",), f"format {version!r} is not known to this prunekit; write {FORMAT}")
    name = recipe.data.get("name", "")
    if not isinstance(name, str) or not re.fullmatch(r"[\w .+-]*", name):
        problem(("name",), f"name is letters, digits, '.', '-' and '_', got {name!r}")
    return problems


def _resolve_reporters(recipe: Recipe, resolver: Resolver) -> tuple[Use[Reporter], ...]:
    named = recipe.data.get("report", ["console", "jsonl"])
    if not isinstance(named, list):
        resolver.problem(("report",), 'report is a list, such as ["console", "jsonl"]')
        return ()
    uses = [resolver.use("reporter", value, ("report", i)) for i, value in enumerate(named)]
    return tuple(use for use in uses if use)


def _resolve_run(
    recipe: Recipe, resolver: Resolver, label: str, settings: Mapping[str, Any], notes: list[str]
) -> Run | None:
    data = recipe.data
    before = len(resolver.problems)
    seed = data.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        resolver.problem(("seed",), f"seed is a whole number from 0 on, got {seed!r}")
        seed = 0
    if "threat" in data:
        table = data["threat"]
        if isinstance(table, dict):
            found = resolver.options(ThreatOptions, table, ("threat",), "[threat]")
            # A broken threat must not also be reported as a missing one.
            resolver.threat = Threat(found.norm, found.eps) if found else Threat("linf", 0.0)
        else:
            resolver.problem(("threat",), 'write [threat] with norm = "linf" and eps = "8/255"')
    dataset, data_options = _section(data, resolver, "dataset", DataOptions)
    architecture, net_options = _section(data, resolver, "architecture", ArchitectureOptions)
    objective = None
    if "objective" in data:
        objective = resolver.use("objective", data["objective"], ("objective",))
    stages = _resolve_stages(recipe, resolver, objective, settings, notes)
    if len(resolver.problems) > before:
        return None
    if data_options.validation == 0:
        for stage in stages:
            if isinstance(stage.options, FitOptions) and stage.options.select != "last":
                resolver.problem(
                    ("dataset", "validation"),
                    f"validation = 0 leaves nothing to choose the best epoch of stage "
                    f'{stage.name!r} with; write select = "last" in it',
                )
                return None
    _note_threats(resolver.threat, stages, notes)
    return Run(
        label, settings, recipe.path.parent, seed, dataset, data_options, architecture,
        net_options.init, resolver.threat, stages,
    )  # fmt: skip


def _section(data: Mapping[str, Any], resolver: Resolver, key: str, core: type) -> tuple[Any, Any]:
    """A section that has keys of the core's beside those of its component."""
    if key not in data:
        names = resolver.registry.names(key)
        resolver.problem(
            (), f'there is no [{key}]; write [{key}] and use = "{names[0] if names else "..."}"'
        )
        return None, None
    table = {"use": data[key]} if isinstance(data[key], str) else data[key]
    if not isinstance(table, dict):
        resolver.problem((key,), f'write [{key}] with use = "..."')
        return None, None
    own = {f.name for f in dataclasses.fields(core)}
    options = resolver.options(
        core, {k: v for k, v in table.items() if k in own}, (key,), f"[{key}]"
    )
    use = resolver.use(key, {k: v for k, v in table.items() if k not in own}, (key,))
    return use, options


def _resolve_stages(
    recipe: Recipe,
    resolver: Resolver,
    objective: Use[Objective] | None,
    settings: Mapping[str, Any],
    notes: list[str],
) -> tuple[Stage, ...]:
    tables = recipe.data.get("stage", [])
    if not isinstance(tables, list) or not tables:
        resolver.problem(("stage",), 'a recipe needs stages; write [[stage]] and kind = "pretrain"')
        return ()
    stages: list[Stage] = []
    names: set[str] = set()
    sparsity = 0.0
    for position, table in enumerate(tables):
        path: KeyPath = ("stage", position)
        kind = table.get("kind") if isinstance(table, dict) else None
        if not isinstance(kind, str) or kind not in STAGES:
            way = (
                f'write kind = "{next(iter(STAGES))}"'
                if kind is None
                else suggest(str(kind), STAGES)
            )
            resolver.problem((*path, "kind"), f"a stage's kind cannot be {kind!r}; {way}")
            continue
        name = table.get("name", kind)
        if not isinstance(name, str) or not re.fullmatch(r"[\w+-]+", name):
            resolver.problem(
                (*path, "name"), f"name of a stage is letters and digits, got {name!r}"
            )
            continue
        if name in names:
            resolver.problem(path, f'there are two stages {name!r}; give each a name = "..."')
        names.add(name)
        if kind == "finetune" and not any(t.get("kind") == "prune" for t in tables[:position]):
            resolver.problem(path, "finetune before any prune; put a prune stage before it")
        own = {k: v for k, v in table.items() if k not in ("kind", "name")}
        if kind == "prune":
            own = _drop_unneeded(own, table, resolver, path, name, settings, notes)
        options = resolver.options(STAGES[kind], own, path, f"stage {name!r}")
        if options is None:
            continue
        if kind == "prune":
            if options.sparsity <= sparsity:
                resolver.problem(
                    (*path, "sparsity"),
                    f"sparsity is of the dense network: {options.sparsity} after {sparsity} "
                    "removes nothing; write more than that",
                )
            sparsity = max(sparsity, options.sparsity)
            if options.pruner.component.learns and options.epochs is None:
                resolver.problem(
                    path, f"pruner {options.pruner.component.name!r} learns its scores, so stage "
                    f"{name!r} needs epochs; write epochs = 20"
                )  # fmt: skip
        if kind != "evaluate" and options.objective is None:
            if objective is None and (kind != "prune" or options.pruner.component.learns):
                if "objective" not in recipe.data:
                    resolver.problem(
                        path, f"stage {name!r} has no objective; write [objective] and "
                        'use = "trades" for all stages, or objective = "..." in this one'
                    )  # fmt: skip
                continue
            options = dataclasses.replace(options, objective=objective)
        stages.append(Stage(kind, name, position, options, sparsity))
    return tuple(stages)


TRAINING_KEYS = ("epochs", "optimizer", "select", "clip_norm", "bn")


def _drop_unneeded(
    own: dict[str, Any],
    table: Mapping[str, Any],
    resolver: Resolver,
    path: KeyPath,
    name: str,
    settings: Mapping[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    """What a one-shot pruner has no use for: noted where a sweep puts it beside learned ones."""
    pruner = table.get("pruner", "score")
    used = pruner.get("use") if isinstance(pruner, dict) else pruner
    found = [
        e.component
        for e in resolver.registry.entries
        if e.kind == "pruner" and e.component.name == str(used).rpartition(":")[2]
    ]
    if not found or found[0].learns:
        return own
    idle = [key for key in TRAINING_KEYS if key in own]
    written = resolver.locate((*path, "pruner"))
    if idle and (settings or written.file.startswith("--set")):
        notes.append(f"stage {name!r}: pruner {used!r} is one-shot and does not use "
                     f"{', '.join(idle)}")  # fmt: skip
    else:
        for key in idle:
            resolver.problem(
                (*path, key), f"pruner {used!r} is one-shot: {key} does nothing; remove it"
            )
    return {k: v for k, v in own.items() if k not in idle}


def _note_threats(threat: Threat | None, stages: tuple[Stage, ...], notes: list[str]) -> None:
    """An eps or norm that differs from [threat] is allowed and flagged."""
    if threat is None:
        return
    for stage in stages:
        for use in uses_in(stage.options):
            if hasattr(use.options, "eps") and use.threat and use.threat != threat:
                notes.append(
                    f"stage {stage.name!r}: {use.name!r} has norm {use.threat.norm}, eps "
                    f"{use.threat.eps:.6g}; the recipe's threat is {threat.norm}, {threat.eps:.6g}"
                )


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
