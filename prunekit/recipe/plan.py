"""Recipe + registry -> Plan: names resolved, options typed, sweeps unrolled. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.catalog.component import Use
from prunekit.catalog.registry import Registry
from prunekit.contracts import Architecture, Data, Threat
from prunekit.errors import Problem, RecipeError, in_order, suggest, translate
from prunekit.recipe.agreement import (
    check_run,
    check_stages,
    note_delays,
    note_extra,
    note_threats,
    note_validation,
)
from prunekit.recipe.computing import find_backend, resolve_compute
from prunekit.recipe.describing import describe, uses_in
from prunekit.recipe.resolver import THREAT_EXAMPLE, Resolver
from prunekit.recipe.stages import Stage, resolve_stages
from prunekit.recipe.toml.addresses import (
    OPTIMIZER_KEYS,
    OPTIONS,
    TOP_KEYS,
    find_name_fault,
    is_misspelt,
    resolve_address,
    takes_list,
)
from prunekit.recipe.toml.document import FORMAT, Recipe
from prunekit.recipe.toml.sections import (
    ArchitectureOptions,
    ComputeOptions,
    DataOptions,
    PruneOptions,
    ThreatOptions,
)
from prunekit.recipe.toml.sweep import label, unroll
from prunekit.report import Reporter
from prunekit.steps import Backend


@dataclass(frozen=True)
class Run:
    """One combination of a sweep, or the only run of a recipe."""

    label: str
    settings: Mapping[str, Any]
    folder: Path
    """Folder of the recipe, where its relative paths start."""
    seed: int
    dataset: Use[Data]
    data: DataOptions
    architecture: Use[Architecture]
    init: Path | None
    threat: Threat | None
    stages: tuple[Stage, ...]

    @property
    def starts_given(self) -> bool:
        """Whether its network comes with weights: from a file, or from a Python program."""
        return self.init is not None or self.architecture.value is not None

    @property
    def trains_first(self) -> bool:
        """Whether the first stage that changes the network trains all of its weights."""
        return next((s.kind for s in self.stages if s.kind != "evaluate"), "") == "pretrain"

    def uses(self) -> list[Use[Any]]:
        """All components that the run names, at any depth."""
        used = [use for stage in self.stages for use in stage.uses()]
        return [*uses_in((self.dataset, self.data, self.architecture)), *used]

    def describe(self) -> dict[str, Any]:
        """The run as a recipe: defaults written out, sweep and overrides applied."""
        start = describe(ArchitectureOptions(init=self.init))
        return {
            "seed": self.seed,
            "dataset": {**describe(self.dataset), **describe(self.data)},
            "architecture": {**describe(self.architecture), **start},
            **({"threat": describe(self.threat)} if self.threat else {}),
            "stage": [stage.describe() for stage in self.stages],
        }


@dataclass(frozen=True)
class Plan:
    """All runs of a recipe, resolved."""

    name: str
    path: Path
    runs: tuple[Run, ...]
    reporters: tuple[Use[Reporter], ...]
    document: Mapping[str, Any]
    """The recipe with overrides and `extends` applied, its sweep kept."""
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    backend: Use[Backend] | None = None
    """What layers with few kept weights run on."""
    notes: tuple[str, ...] = ()
    smoke: bool = False

    @property
    def swept(self) -> bool:
        """Whether the recipe has a sweep, so that each run gets a folder of its own."""
        return "sweep" in self.document

    def permit(self) -> None:
        """Raise `UserError` for a component that must not be built; see `Use.permit`."""
        for use in (*(use for run in self.runs for use in run.uses()), *self.reporters):
            use.permit()

    def describe(self, run: Run) -> dict[str, Any]:
        """The complete recipe of one run; it resolves to this run alone."""
        report = [describe(use) for use in self.reporters]
        place = {} if self.compute == ComputeOptions() else {"compute": describe(self.compute)}
        return {"format": FORMAT, "name": self.name, **place, **run.describe(), "report": report}


def make_plan(recipe: Recipe, registry: Registry) -> Plan:
    """Resolve a recipe.

    Raises `RecipeError` with every problem that was found.
    """
    _sweep_lists(recipe, registry)
    top = Resolver(registry, recipe.path.parent, recipe.locate, foreign=recipe.foreign)
    _check_top(recipe, top)
    reporters = _resolve_reporters(recipe, top)
    compute = resolve_compute(recipe, top)
    backend = find_backend(compute, top)
    combinations = list(unroll(recipe, top.problems))
    addresses = {address for settings, _ in combinations for address in settings}
    top.problems += _find_hidden(recipe, top, addresses)
    if any(address.startswith("compute.") for settings, _ in combinations for address in settings):
        top.problem(("sweep",), "all runs of a sweep share [compute]; take it out of the sweep")
    labels = label([settings for settings, _ in combinations])
    runs: list[Run] = []
    notes: list[str] = []
    for name, (settings, variant) in zip(labels, combinations, strict=True):
        resolver = dataclasses.replace(top, locate=variant.locate)  # with the same problems
        runs += _resolve_run(variant, resolver, name, settings, notes)
    if top.problems:
        raise RecipeError(top.problems)
    name = recipe.data.get("name", recipe.path.stem.lstrip(". "))
    document = {"format": FORMAT, "name": name, **recipe.data}
    document = {key: _with_whole_paths(document[key], top.files) for key in document}
    told = tuple(dict.fromkeys(notes))
    return Plan(name, recipe.path, tuple(runs), reporters, document, compute, backend, told)


def _find_hidden(recipe: Recipe, top: Resolver, addresses: Iterable[str]) -> list[Problem]:
    """Mistakes in components that the recipe names and every combination of its sweep replaces.

    What only a combination can decide is none, such as a sparsity beside a structure.
    """
    plain = {key: value for key, value in recipe.data.items() if key != "sweep"}
    swept = [path for a in addresses if not isinstance(path := resolve_address(plain, a), str)]
    if not swept:
        return []
    base = Resolver(top.registry, top.folder, recipe.locate)
    for _ in _resolve_run(Recipe(recipe.path, plain, recipe.places), base, "", {"sweep": 1}, []):
        pass
    return [
        problem
        for problem in base.problems
        if any(problem.path[: len(s)] == s != problem.path for s in swept)
    ]


def _sweep_lists(recipe: Recipe, registry: Registry) -> None:
    """A list for an option that takes none is a list of values to try; so is a list of lists."""
    for setting in list(recipe.overrides):
        value, path = setting.value, resolve_address(recipe.data, setting.address)
        if not isinstance(value, list) or isinstance(path, str):
            continue
        lists = bool(value) and all(isinstance(item, list) for item in value)
        if lists or not takes_list(recipe.data, path, registry):
            recipe.sweep_over(setting)


def _with_whole_paths(value: Any, files: Mapping[tuple[str, str], str], key: str = "") -> Any:
    """Relative paths made absolute, so that the recipe can be written to another folder."""
    if isinstance(value, dict):
        return {k: _with_whole_paths(v, files, k.rpartition(".")[2]) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_whole_paths(item, files, key) for item in value]
    return files.get((key, value), value)


def _check_top(recipe: Recipe, resolver: Resolver) -> None:
    unknown = {key: recipe.locate((key,)) for key in recipe.data if key not in TOP_KEYS}
    for key, shown in in_order(unknown):
        advice = _advise(key) if shown else ""
        resolver.problem((key,), f"unknown key {key!r}; {advice}")
    version = recipe.data.get("format", FORMAT)
    if version != FORMAT:
        message = f"this prunekit does not read format {version!r}; write {FORMAT}"
        resolver.problem(("format",), message)
    name = recipe.data.get("name", recipe.path.stem.lstrip(". "))
    if fault := find_name_fault(name):
        resolver.problem(("name",), f"name becomes the name of a folder: {fault}, got {name!r}")


def _advise(key: str) -> str:
    """What to write in place of an unknown key at the top of a recipe."""
    advice = suggest(key, (*TOP_KEYS, "extends", "set"))
    for owner, options in (*OPTIONS.items(), ("[stage]", PruneOptions)):
        if meant := translate(key, (field.name for field in dataclasses.fields(options))):
            more = suggest(key, [meant]).partition(",")[2]
            advice = f"it belongs below [{owner}]: {meant} = ...{more and f',{more}'}"
    if meant := translate(key, OPTIMIZER_KEYS):
        advice = f"it belongs below [[stage]]: optimizer = {{ {meant} = ... }}"
    return advice


def _resolve_reporters(recipe: Recipe, resolver: Resolver) -> tuple[Use[Reporter], ...]:
    named = recipe.data.get("report", ["console", "jsonl"])
    if not isinstance(named, list):
        resolver.problem(("report",), 'report must be a list, such as ["console", "jsonl"]')
        return ()
    uses = [resolver.use("reporter", value, ("report", i)) for i, value in enumerate(named)]
    return tuple(use for use in uses if use)


def _resolve_run(
    recipe: Recipe, resolver: Resolver, label: str, settings: Mapping[str, Any], notes: list[str]
) -> Iterator[Run]:
    """The run of one combination; nothing if there was a problem."""
    data = recipe.data
    before = len(resolver.problems)
    seed = data.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        resolver.problem(("seed",), f"seed must be a whole number, at least 0, got {seed!r}")
    if "threat" in data:
        resolver.threat = _resolve_threat(data["threat"], resolver)
    dataset, images = _resolve_section(data, resolver, "dataset", DataOptions)
    architecture, start = _resolve_section(data, resolver, "architecture", ArchitectureOptions)
    if "stage" not in data and is_misspelt(data, "stage"):
        return
    stages = resolve_stages(data, resolver, bool(settings), notes)
    check_stages(stages, resolver)
    if len(resolver.problems) > before or dataset is None or architecture is None:
        return
    check_run(images, stages, resolver)
    threat, folder = resolver.threat, recipe.path.parent
    notes += (*note_extra(dataset, images.extra), *note_threats(threat, stages))
    notes += note_validation(dataset, images, stages)
    notes += note_delays(stages)
    yield Run(
        label, settings, folder, seed, dataset, images, architecture, start.init, threat, stages
    )


def _resolve_threat(table: Any, resolver: Resolver) -> Threat:
    found = None
    if isinstance(table, dict):
        found = resolver.options(ThreatOptions, table, ("threat",), "[threat]")
    else:
        resolver.problem(("threat",), THREAT_EXAMPLE)
    # Only the mistake in the threat model is reported, not also that there is none.
    return Threat(found.norm, found.eps) if found else Threat("linf", 0.0)


def _resolve_section(
    data: Mapping[str, Any], resolver: Resolver, key: str, core: type
) -> tuple[Any, Any]:
    """(component, options of the core) of a section that has both; None for each with problems."""
    if key not in data:
        if is_misspelt(data, key):
            return None, None
        example = next(iter(resolver.registry.names(key)), "...")
        message = f'there is no [{key}]; write [{key}] and use = "{example}"'
        resolver.problem((), message)
        return None, None
    table = {"use": data[key]} if isinstance(data[key], str) else data[key]
    if not isinstance(table, dict):
        resolver.problem((key,), f'write [{key}] with use = "..."')
        return None, None
    names = [field.name for field in dataclasses.fields(core)]
    own = {k: v for k, v in table.items() if k in names}
    options = resolver.options(core, own, (key,), f"[{key}]")
    return resolver.use(key, table, (key,), names), options
