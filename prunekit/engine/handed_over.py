"""What a Python program hands over: plans with it, and a stage alone that stores nothing."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.catalog.component import Use
from prunekit.catalog.kinds import ArchitectureComponent
from prunekit.catalog.registry import load_registry
from prunekit.contexts import DatasetContext
from prunekit.contracts import Data
from prunekit.data.batches import Arrays, to_device
from prunekit.engine.stages import STAGES
from prunekit.engine.work import Loaded, Outcome, Work
from prunekit.errors import Place, UserError, lacks_memory
from prunekit.evaluation import eval_mode, own_generators
from prunekit.models.building import count_outputs
from prunekit.models.contract import check_scripted, check_tensors, copy_network, find_logits
from prunekit.pruning.layers import watch_network
from prunekit.pruning.masks import State, take_zeros
from prunekit.recipe.plan import Plan, make_plan
from prunekit.recipe.toml.document import Recipe, Setting, apply
from prunekit.report import Event, Note, Stop
from prunekit.store.layout import RECIPE
from prunekit.store.records import open_recipe
from prunekit.store.stages import StageFolder
from prunekit.training.compute import open_compute


def plan_recipe(
    source: str | Path | Mapping[str, Any],
    model: nn.Module | None,
    data: Any,
    settings: Mapping[str, Any] | None,
    device: str | None = None,
    *,
    trust: bool = False,
) -> Plan:
    """The plan of a recipe, a file or its tables, in which a network and data take the places of
    its components; `trust` as in `open_recipe`."""
    if isinstance(source, Mapping):
        recipe = Recipe(Path.cwd() / RECIPE, copy.deepcopy(dict(source)), written=False)
    else:
        recipe = open_recipe(Path(source), trust=trust)
    chosen = [Setting(a, v, Place(f"settings {a}")) for a, v in (settings or {}).items()]
    if device is not None:
        chosen.append(Setting("compute.device", device, Place("device")))
    handed: dict[str, Any] = {}
    unique = None
    if model is not None:
        check_model(model)
        given = load_registry().find("architecture", "given").component
        assert isinstance(given, ArchitectureComponent)
        module, _, function = given.identify.partition(":")
        known = getattr(importlib.import_module(module), function)(model)
        unique = known.get("unique")
        chosen.append(Setting("architecture", {"use": "given", **known}, Place("model")))
        handed["architecture"] = model
    if data is not None:
        chosen.append(Setting("dataset", {"use": "given"}, Place("data")))
        handed["dataset"] = data
    apply(recipe, chosen)
    plan = make_plan(recipe, load_registry())
    notes = (f"no stored stage can serve this network: {unique}",) if unique else ()
    runs = []
    for run in plan.runs:
        uses: dict[str, Any] = {
            key: dataclasses.replace(getattr(run, key), value=value)
            for key, value in handed.items()
        }
        runs.append(dataclasses.replace(run, **uses))
    return dataclasses.replace(plan, runs=tuple(runs), notes=(*plan.notes, *notes))


def check_model(model: Any) -> None:
    """Raise `UserError` for anything but an `nn.Module` of plain tensors."""
    if not isinstance(model, nn.Module):
        raise UserError(f"model must be an nn.Module, got {type(model).__name__}")
    check_tensors(model, "the network")


def read_images(data: Any, model: nn.Module | None = None) -> Data:
    """Images to look at, (x, y) or more, by the component that reads what Python hands over.

    Raises `UserError` where a network does not take them, or has fewer classes.
    """
    entry = load_registry().find("dataset", "given")
    use: Use[Data] = Use(entry.component, entry.component.options(), entry.owner, value=data)
    outputs = None if model is None else partial(count_outputs, model)
    found = use.build(DatasetContext(seed=0, folder=Path.cwd(), test_only=True, outputs=outputs))
    if model is None:
        return found
    classes = find_logits(model, found.shape, "the network").shape[1]
    if (largest := int(found.test.labels.max())) >= classes:
        raise UserError(
            f"data: there is a label {largest}, and the network has {classes} classes: 0 to "
            f"{classes - 1}"
        )
    return dataclasses.replace(found, classes=classes)


def do_stage(
    model: nn.Module, data: Data, sections: Mapping[str, Any], batch_size: int, device: str
) -> tuple[State, Outcome, list[Note]]:
    """One stage, alone, on a copy of the network; nothing of it is stored."""
    tables = {
        "dataset": {"use": "given", "batch_size": batch_size, "validation": 0},
        "architecture": {"use": "given", "name": type(model).__qualname__},
        "compute": {"device": device},
        **sections,
    }
    plan = make_plan(Recipe(Path.cwd() / RECIPE, tables, written=False), load_registry())
    (chosen,) = plan.runs
    (stage,) = chosen.stages
    compute = open_compute(plan.compute.device)
    notes: list[Note] = []

    def report(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event)

    train, test = (to_device(part, compute.device) for part in (data.train, data.test))
    nobody = Arrays(torch.empty(0), torch.empty(0, dtype=torch.int64))
    loaded = Loaded(dataclasses.replace(data, train=train, test=test), nobody)
    state = State(compute.place(copy_network(model, "the network")))
    if stage.prunes:
        check_scripted(model, "the network")
        shape = data.shape if any(data.shape) else _guess_shape(state.model)
        if shape:
            watch_network(state.model, shape)
        else:
            report(Note("looked at each layer alone; data=(x, y) shows how the network uses them"))
        take_zeros(state, trained=False)
    with tempfile.TemporaryDirectory(prefix="prunekit-") as scratch, own_generators():
        work = Work(chosen, loaded, compute, StageFolder(Path(scratch)), "", report, Stop())
        outcome = STAGES[stage.kind](state, stage, work)
    outcome = dataclasses.replace(outcome, notes=(*plan.notes, *outcome.notes))
    return state, outcome, notes


SIZES = (32, 28, 8, 64, 224, 16, 96, 128, 256, 299, 384)
"""Heights and widths of images that networks are often made for."""


def _guess_shape(model: nn.Module) -> tuple[int, ...] | None:
    """The shape of an image that the network takes; None if none of the usual ones suits it."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)
    shapes: list[tuple[int, ...]] = []
    if isinstance(first, nn.Linear):
        n = first.in_features
        sides = [(c, math.isqrt(n // c)) for c in (1, 3)]
        shapes = [*((c, side, side) for c, side in sides if c * side * side == n), (n,)]
    channels = dict.fromkeys((first.in_channels if isinstance(first, nn.Conv2d) else 3, 3, 1))
    shapes += [(c, size, size) for c in channels for size in SIZES]
    like = next(model.parameters())
    with eval_mode(model), torch.no_grad(), own_generators():
        for shape in shapes:
            try:
                model(torch.zeros(2, *shape, device=like.device))
                return shape
            except Exception as error:  # layers may raise anything for images of the wrong size
                if lacks_memory(error):
                    raise
    return None


class NoImages:
    """Stands in for images that were not given; raises `UserError` when they are needed."""

    @property
    def labels(self) -> Tensor:
        raise UserError("this pruner looks at images: give data=(x, y)")

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        yield self.labels
