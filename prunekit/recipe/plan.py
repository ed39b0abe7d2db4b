"""Recipe + registry -> Plan: names resolved, options typed, sweeps unrolled. No torch here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.catalog.component import Use
from prunekit.catalog.registry import Registry
from prunekit.contracts import Architecture, Data, Threat
from prunekit.errors import Problem, RecipeError
from prunekit.recipe.document import FORMAT, Recipe
from prunekit.recipe.resolver import Resolver, describe, key_of
from prunekit.recipe.sections import ArchitectureOptions, DataOptions, ThreatOptions
from prunekit.recipe.stages import Stage, resolve_stages, uses_in
from prunekit.recipe.sweep import label, unroll
from prunekit.recipe.values import KeyPath, suggest
from prunekit.report import Reporter


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
        return list(
            uses_in((self.dataset, self.data, self.architecture, [s.options for s in self.stages]))
        )

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
            "stage": [stage.describe() for stage in self.stages],
        }
        return {"seed": self.seed, **sections}


@dataclass(frozen=True)
class Plan:
    """All that is to be done.

    `document` is the recipe with overrides and `extends` taken in, a sweep left as it is.
    """

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

    def describe(self, run: Run) -> dict[str, Any]:
        """The complete recipe of one run: it resolves to just that run."""
        report = [describe(use) for use in self.reporters]
        return {"format": FORMAT, "name": self.name, **run.describe(), "report": report}


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
    name = recipe.data.get("name", recipe.path.stem.lstrip(". "))
    document = _with_whole_paths({"format": FORMAT, "name": name, **recipe.data}, runs)
    return Plan(name, recipe.path, tuple(runs), reporters, document, tuple(dict.fromkeys(notes)))


def _with_whole_paths(document: dict[str, Any], runs: list[Run]) -> dict[str, Any]:
    """Relative paths made absolute, so that the recipe may be written to another folder."""
    known: dict[str, set[Path]] = {}

    def collect(key: str, value: Any) -> None:
        if isinstance(value, Use):
            value = value.options
        if isinstance(value, Path):
            known.setdefault(key, set()).add(value)
        elif dataclasses.is_dataclass(value):
            for f in dataclasses.fields(value):
                collect(key_of(f.name), getattr(value, f.name))
        elif isinstance(value, tuple):
            for item in value:
                collect(key, item)

    def replace(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: replace(k.rpartition(".")[2], v) for k, v in value.items()}
        if isinstance(value, list):
            return [replace(key, item) for item in value]
        written = Path(value).parts if isinstance(value, str) and key in known else ()
        whole = [p for p in known.get(key, ()) if written and p.parts[-len(written) :] == written]
        return str(whole[0]) if len(whole) == 1 else value

    for run in runs:
        collect("", (run.dataset, run.architecture, *(stage.options for stage in run.stages)))
        collect("init", run.init)
        collect("", run.data)
    return {key: replace(key, value) for key, value in document.items()}


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
            problem((key,), f"unknown key {key!r}; {suggest(key, (*TOP_KEYS, 'extends', 'set'))}")
    version = recipe.data.get("format", FORMAT)
    if version != FORMAT:
        problem(("format",), f"format {version!r} is not known to this prunekit; write {FORMAT}")
    name = recipe.data.get("name", "run")
    # It is the name of a folder.
    if not isinstance(name, str) or not re.fullmatch(r"[^./\\\s][^/\\\x00-\x1f]*", name):
        problem(("name",), f"name is that of a folder: a word without '/', got {name!r}")
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
        resolver.threat = _resolve_threat(data["threat"], resolver)
    dataset, data_options = _section(data, resolver, "dataset", DataOptions)
    architecture, net_options = _section(data, resolver, "architecture", ArchitectureOptions)
    stages = resolve_stages(data, resolver, bool(settings), notes)
    if len(resolver.problems) > before:
        return None
    for stage in stages if data_options.validation == 0 else ():
        if getattr(stage.options, "epochs", None) and stage.options.select != "last":
            resolver.problem(
                ("stage", stage.position),
                f"stage {stage.name!r} has no images to choose its best epoch with, as validation "
                'is 0; write select = "last" in it',
            )
    if len(resolver.problems) > before:
        return None
    _note_threats(resolver.threat, stages, notes)
    return Run(
        label, settings, recipe.path.parent, seed, dataset, data_options, architecture,
        net_options.init, resolver.threat, stages,
    )  # fmt: skip


def _resolve_threat(table: Any, resolver: Resolver) -> Threat:
    found = None
    if isinstance(table, dict):
        found = resolver.options(ThreatOptions, table, ("threat",), "[threat]")
    else:
        resolver.problem(("threat",), 'write [threat] with norm = "linf" and eps = "8/255"')
    # A broken threat must not also be reported as a missing one.
    return Threat(found.norm, found.eps) if found else Threat("linf", 0.0)


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
    use = resolver.use(key, table, (key,), own)
    return use, options


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
