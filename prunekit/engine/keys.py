"""The keys of a run's results: what decides each, gathered."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunekit.catalog.component import Use
from prunekit.catalog.containment import ask
from prunekit.engine.work import Loaded
from prunekit.errors import UserError
from prunekit.models.stored import find_architecture
from prunekit.reading import hash_file
from prunekit.recipe.describing import describe, uses_in
from prunekit.recipe.plan import Run
from prunekit.recipe.stages import Stage
from prunekit.store.keys import hash_stage, version_of
from prunekit.store.networks import read_network
from prunekit.training.compute import Compute


@dataclass(frozen=True)
class StageKey:
    """The hash of a stage, and the keys under which its results are stored: `parts` is the hash
    itself, or for an evaluate stage one for each evaluator."""

    key: str
    parts: tuple[str, ...]


def make_keys(run: Run, loaded: Loaded, compute: Compute) -> list[StageKey]:
    """The key of every stage of a run, over everything that decides its result."""
    start = {
        "seed": run.seed,
        # By content, not by where the files are or how many processes read them.
        "data": [loaded.fingerprints, loaded.data.shape, loaded.data.classes],
        "use": [loaded.data.augment, describe(run.data, hash_file)],
        **_describe_network(run),
    }
    keys, upstream = [], ""
    for stage in run.stages:
        if stage.kind == "evaluate":
            parts = [
                _key_evaluator(run, stage, use, upstream, loaded, compute)
                for use in stage.options.with_
            ]
            named = [[use.name, part] for use, part in zip(stage.options.with_, parts, strict=True)]
            keys.append(StageKey(hash_stage(upstream, {"evaluators": named}, set(), {}), (*parts,)))
            continue
        content = {"start": start, **describe_stage(stage)}
        uses = [*uses_in((run.dataset, run.data, run.architecture)), *stage.uses()]
        upstream = _hash_uses(upstream, content, uses, compute)
        keys.append(StageKey(upstream, (upstream,)))
    return keys


def _describe_network(run: Run) -> dict[str, Any]:
    init = hash_file(run.init) if run.init else None
    known = {"architecture": describe(run.architecture, hash_file), "init": init}
    # Whether its zeros are masks.
    return known | ({"trained": run.trains_first} if run.starts_given else {})


def _key_evaluator(
    run: Run, stage: Stage, use: Use[Any], upstream: str, loaded: Loaded, compute: Compute
) -> str:
    """The key of one evaluator's result: not of what it is called, nor of where it stands."""
    threats = [
        [u.kind, u.component.name, u.threat.norm, u.threat.eps] for u in uses_in(use) if u.threat
    ]
    content = {
        "kind": "evaluate",
        "seed": run.seed,
        # The test images, not what else a training reads.
        "data": [loaded.fingerprints[:1], loaded.data.shape, loaded.data.classes],
        "batch_size": run.data.batch_size,
        "images": stage.options.images,
        "limit": stage.limit,
        "component": [use.component.name, describe(use.options, hash_file)],
        "threats": threats,
        **({} if upstream else _describe_network(run)),
    }
    uses = list(uses_in((run.dataset, run.architecture, use)))
    return _hash_uses(upstream, content, uses, compute)


def _hash_uses(
    upstream: str, content: Mapping[str, Any], uses: Sequence[Use[Any]], compute: Compute
) -> str:
    """The hash of what a stage or an evaluator computes, and of the files and the code it uses."""
    networks = list(_find_networks(uses))
    backend = [] if compute.sparse is None else [compute.sparse.use]
    uses = [*uses, *networks, *backend]
    files: list[Any] = [describe(use, hash_file) for use in (*networks, *backend)]
    for paths in (ask(u, "files") for u in uses):
        files += map(hash_file, paths[:1])
        # The first may call the others by their names.
        files += [[os.path.relpath(p, paths[0].parent), hash_file(p)] for p in paths[1:]]
    versions = {name: version_of(name) for u in uses for name in u.component.needs}
    return hash_stage(
        upstream,
        {**content, "files": files},
        {name for u in uses for name in (u.component.package, *u.component.sources)},
        {"torch": torch.__version__, **compute.key(), **versions},
    )


def _find_networks(uses: Sequence[Use[Any]]) -> Iterator[Use[Any]]:
    """The architectures of model files that are options, such as a distillation's teacher."""
    for use in uses:
        for field in dataclasses.fields(use.options):
            value = getattr(use.options, field.name)
            if isinstance(value, Path) and value.suffix == ".safetensors":
                # What cannot be read has no result either: who opens it says why.
                with suppress(UserError):
                    yield from uses_in(find_architecture(read_network(value)))


def describe_stage(stage: Stage) -> dict[str, Any]:
    """What a stage computes, threats resolved: part of its key, and of what is stored of it."""
    threats = [
        [use.kind, use.name, use.threat.norm, use.threat.eps]
        for use in stage.uses()
        if use.threat is not None
    ]
    return {
        "kind": stage.kind,
        "position": stage.position,
        "options": stage.describe_options(hash_file),
        "threats": threats,
        "limit": stage.limit,
    }
