"""prunekit from Python: the same runs, masks and judgements as on the command line.

Everything here is also `prunekit.NAME`. Images are pixels: integers 0 to 255, or floats in [0, 1]
that are multiples of 1/255; as tensors (N, C, H, W), as numpy arrays (N, H, W) or (N, H, W, C).
Where nothing is trained (`make_masks`, `evaluate`), any floats in [0, 1] will do, and a DataLoader.
Labels are integers (N,). A network takes pixels in [0, 1] and normalizes inside. One that is handed
over stays as it is: everything works on copies.

The examples below have such a network and such images:

>>> import tempfile
>>> import torch
>>> from torch import nn
>>> import prunekit
>>> _ = torch.manual_seed(0)
>>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2))
>>> x = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8)
>>> y = torch.arange(40) % 2
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunekit.catalog.kinds import PrunerComponent
from prunekit.catalog.registry import load_registry
from prunekit.contracts import Data, Masks, Threat
from prunekit.engine.handed_over import (
    NoImages,
    check_model,
    do_stage,
    plan_recipe,
    read_images,
)
from prunekit.engine.running import run_plan
from prunekit.errors import Interrupted, RunError, UserError, relative
from prunekit.evaluation import own_generators
from prunekit.models.stored import load_network
from prunekit.recipe.plan import Plan
from prunekit.store.layout import STORE
from prunekit.store.networks import read_network
from prunekit.store.records import read_run, tell_changed

LOG = logging.getLogger("prunekit")
"""Receives what the command line prints besides results and progress."""

Named = str | Mapping[str, Any]
"""A component as in a recipe: a name, or a table with `use` and options."""


@dataclass(frozen=True)
class RunResult:
    """The result of a run: the network in evaluation mode on the CPU, its masks, and its metrics.

    `masks` are bool, True = kept, by parameter name; removed weights are zero in the network.
    `metrics` are those of `run.json`, stage by stage: `metrics["evaluate"]["pgd.accuracy"]`.
    """

    model: Any
    masks: Masks
    metrics: dict[str, dict[str, Any]]
    folder: Path


@dataclass(frozen=True)
class Judgement:
    """What evaluators found: `metrics["pgd.accuracy"]`, and per image (N,) `records`.

    `records["index"]` and `records["label"]` say which image; `notes` are warnings about them.
    """

    metrics: dict[str, Any]
    records: Mapping[str, np.ndarray]
    notes: tuple[str, ...] = ()


def run(
    recipe: str | Path | Mapping[str, Any],
    *,
    model: nn.Module | None = None,
    data: Any = None,
    settings: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    store: str | Path | None = None,
    device: str | None = None,
    force: bool = False,
    quiet: bool = False,
    trust: bool = False,
) -> RunResult:
    """Run a recipe, a file or its tables, as `prunekit run` does; the result is found again.

    `model` takes the place of [architecture], and starts with the weights that it has; `data`,
    (x_train, y_train, x_test, y_test) or a `prunekit.contracts.Data`, that of [dataset]. Stored
    stages are used again as long as the images and the network's weights, classes and values are
    the same; a class that was typed into a notebook has no file to compare, so its runs share
    nothing. The seed of a recipe decides everything but the weights of a `model`.

    `settings` are those of `--set`: {"prune.sparsity": 0.95}. `out`, `store`, `device` and `force`
    are the options of the command, and so is `trust`, for the recipe of a run folder; `quiet` shows
    no progress.

    Raises `UserError` for what is wrong with the recipe or the arguments, `RunError` where the run
    failed, and `KeyboardInterrupt` where it was stopped: the same call goes on from there.

    >>> recipe = {
    ...     "dataset": {"use": "given", "batch_size": 8, "validation": 0.25},
    ...     "objective": "benign",
    ...     "stage": [
    ...         {"kind": "pretrain", "epochs": 1},
    ...         {"kind": "prune", "sparsity": 0.5, "pruner": "lwm"},
    ...         {"kind": "evaluate", "with": ["clean"]},
    ...     ],
    ... }
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     out = Path(folder) / "mine"
    ...     result = prunekit.run(recipe, model=net, data=(x, y, x, y), out=out, quiet=True)
    >>> result.metrics["evaluate"]["sparsity"], int((result.model[1].weight == 0).sum())
    (0.5, 512)
    """
    plan = plan_recipe(recipe, model, data, settings, device, trust=trust)
    if plan.swept:
        raise UserError(
            f"{relative(plan.path)} has a sweep of {len(plan.runs)} runs; call prunekit.run_sweep"
        )
    return _execute(plan, model, out, store, force, quiet)[0]


def run_sweep(
    recipe: str | Path | Mapping[str, Any],
    *,
    model: nn.Module | None = None,
    data: Any = None,
    settings: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    store: str | Path | None = None,
    device: str | None = None,
    force: bool = False,
    quiet: bool = False,
    trust: bool = False,
) -> list[RunResult]:
    """As `run`, for every combination of the recipe's sweep, in order."""
    plan = plan_recipe(recipe, model, data, settings, device, trust=trust)
    return _execute(plan, model, out, store, force, quiet)


def make_masks(
    model: nn.Module,
    sparsity: float | None = None,
    pruner: Named = "lwm",
    *,
    data: Any = None,
    budget: str = "layer",
    structure: str = "element",
    exclude: Sequence[str] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    device: str = "auto",
) -> Masks:
    """The masks that a one-shot pruner gives the network, by parameter name; True = kept.

    `sparsity`, `pruner`, `budget`, `structure` and `exclude` are options of a prune stage (where
    `exclude` is None, the network's own `leave_dense` decides). `data` (x, y) is for pruners that
    look at images, and for structures. `prunekit.apply_masks(model, masks)` then sets the removed
    weights to zero.

    A warning names layers that stay dense although that was not asked for. Raises `UserError`
    for a pruner that learns its scores: that takes a recipe, and `prunekit.run`.

    >>> masks = prunekit.make_masks(net, sparsity=0.9)
    >>> {name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()}
    {'1.weight': (103, 1024), '3.weight': (4, 32)}
    """
    check_model(model)
    name = pruner if isinstance(pruner, str) else str(pruner.get("use"))
    found = load_registry().find("pruner", name).component
    if isinstance(found, PrunerComponent) and found.learns:
        raise UserError(
            f"pruner {name!r} learns its scores, in the prune stage of a recipe: call prunekit.run"
        )
    if data is None and structure != "element":
        raise UserError(f"structure {structure!r} is found by sending an image through: give data")
    stage: dict[str, Any] = {"kind": "prune", "pruner": pruner, "budget": budget}
    stage["structure"] = structure
    if sparsity is not None:  # numpy's number or a tensor, by its own digits: 0.7, not 0.699999988
        number = None if isinstance(sparsity, float) else getattr(sparsity, "item", None)
        stage["sparsity"] = sparsity if number is None else float(f"{number():.6g}")
    stage |= {} if exclude is None else {"exclude": list(exclude)}
    sections = {"stage": [stage], "seed": seed}
    with torch.inference_mode(False):
        images = Data(NoImages(), NoImages(), (0, 0, 0), 0)
        if data is not None:
            images = read_images(data, model)
        state, _, notes = do_stage(model, images, sections, batch_size, device)
    for note in notes:
        warnings.warn(note.text, stacklevel=2)
    return state.masks


def evaluate(
    model: nn.Module,
    data: Any,
    evaluators: Named | Sequence[Named] = ("clean",),
    *,
    threat: Any = None,
    images: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    device: str = "auto",
) -> Judgement:
    """Judge a network on (x, y), a DataLoader, or the test part of a data set, as `eval` does.

    `evaluators` are names or tables, such as ["clean", {"use": "pgd", "steps": 10}], or one of
    them. `threat` is a radius ("8/255", of L-inf) or a table {"norm": "l2", "eps": 0.5}. The
    numbers are those of the command for the same images, `batch_size` and `seed`.

    >>> attack = {"use": "pgd", "steps": 2}
    >>> found = prunekit.evaluate(net, (x, y), ["clean", attack], threat="2/255")
    >>> found.metrics["pgd.accuracy"] <= found.metrics["clean.accuracy"]
    True
    """
    single = isinstance(evaluators, str | Mapping)
    named = [evaluators] if single else list(evaluators)
    stage: dict[str, Any] = {"kind": "evaluate", "with": named}
    stage |= {} if images is None else {"images": images}
    sections: dict[str, Any] = {"stage": [stage], "seed": seed}
    if threat is not None:
        threat = dataclasses.asdict(threat) if isinstance(threat, Threat) else threat
        sections["threat"] = dict(threat) if isinstance(threat, Mapping) else {"eps": threat}
    check_model(model)
    with torch.inference_mode(False):
        judged = read_images(data, model)
        _, outcome, _ = do_stage(model, judged, sections, batch_size, device)
    metrics = {name: value for name, value in outcome.metrics.items() if "." in name}
    return Judgement(metrics, outcome.records, outcome.notes)


def load(path: str | Path, model: nn.Module | None = None, *, trust: bool = False) -> RunResult:
    """Load what a run folder or a model file holds (a file has no metrics).

    `model` is a network to load the weights into, a copy of it; it is needed where the network came
    from Python. Raises `UserError` where it does not fit, and where code would have to run that the
    folder or file names, that no recipe of this user ran before, and that is not to `trust`.
    """
    network = read_network(Path(path))
    with torch.inference_mode(False), own_generators():
        built, masks = load_network(network, model, trust=trust)
    metrics = {}
    if network.run is not None:
        for text in tell_changed(network.run):
            warnings.warn(text, stacklevel=2)
        metrics = {stage.name: dict(stage.metrics) for stage in read_run(network.run).stages}
    return RunResult(built, masks, metrics, network.run or network.file.parent)


def _execute(
    plan: Plan,
    model: nn.Module | None,
    out: str | Path | None,
    store: str | Path | None,
    force: bool,
    quiet: bool,
) -> list[RunResult]:
    folder = Path(out) if out is not None else Path("runs") / plan.name
    if quiet:
        others = [use for use in plan.reporters if use.component.name != "console"]
        plan = dataclasses.replace(plan, reporters=tuple(others))
    root = Path(store) if store is not None else folder.parent / STORE
    try:
        with torch.inference_mode(False), own_generators():
            done = run_plan(
                plan,
                folder,
                root,
                force=force,
                resume="the same call",
                elsewhere="choose another folder with out=...",
                anew="move it aside with force=True",
                tell=LOG.warning,
            )
    except Interrupted:
        raise KeyboardInterrupt from None
    for failed in (f for f in done or [] if f.status == "failed"):
        raise RunError(failed.error) from failed.cause
    paths = [folder / run.label if plan.swept else folder for run in plan.runs]
    # The run was permitted to build this network.
    return [load(path, model, trust=True) for path in paths]
