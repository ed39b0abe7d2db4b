"""pretrain, prune, finetune, evaluate: (State, Stage, Work) -> Outcome."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit import seeds
from prunekit.budgets import find_followers
from prunekit.contracts import Context, Data, Objective, Scores, Split
from prunekit.data import Extra, eval_batches, train_batches
from prunekit.errors import RunError
from prunekit.evaluation import balanced_proportion, eval_mode, is_unbalanced
from prunekit.guards import cross_examine
from prunekit.masks import (
    apply_masks,
    count_weights,
    find_broken,
    find_prunable,
    find_unprunable,
    hash_masks,
    measure_sparsity,
)
from prunekit.plan import Run, Stage
from prunekit.report import Note, Progress, Report, StageStarted
from prunekit.selection import (
    Masks,
    Selection,
    check_layers,
    find_structured,
    follow,
    select,
)
from prunekit.stop import Stop
from prunekit.store import StageFolder
from prunekit.training import Fit, fit
from prunekit.variables import LearnedScores, Variables, Weights


@dataclass
class State:
    """The network between stages; changed in place by them."""

    model: nn.Module
    masks: Masks = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a stage works with: its run, the split data, and where it writes and reports."""

    run: Run
    data: Data
    train: Split
    extra: Extra | None
    validation: Split
    device: torch.device
    folder: StageFolder
    key: str
    report: Report
    stop: Stop

    def context(self, stage: Stage, state: State) -> Context:
        return Context(
            seed=self.run.seed,
            folder=self.run.folder,
            shape=self.data.shape,
            classes=self.data.classes,
            device=self.device,
            stage=stage.kind,
            sparsity=stage.sparsity,
            model=state.model,
        )

    @property
    def augment(self) -> tuple[str, ...]:
        chosen = self.run.data.augment
        return self.data.augment if chosen is None else chosen


@dataclass(frozen=True)
class Outcome:
    """What a stage found."""

    metrics: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    records: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """Warnings that belong to the result."""


def train(state: State, stage: Stage, work: Work) -> Outcome:
    """Pretrain, and finetune: train the weights, masked ones staying zero."""
    variables = Weights(state.model, state.masks)
    context = work.context(stage, state)
    objective = stage.options.objective.build(context)
    history = _fit(variables, objective, stage, work, context)
    return Outcome({**_best(history, stage), **_sparsity(state)}, history)


def prune(state: State, stage: Stage, work: Work) -> Outcome:
    """Score the weights and set all but the chosen ones to zero."""
    options = stage.options
    history: list[dict[str, Any]] = []
    # As a fresh network is, whatever stages came before.
    state.model.requires_grad_(True)
    state.model.train()
    selection = Selection(stage.sparsity, options.budget, options.structure)
    weights, followers = _find_structured(state, stage, work, selection)
    frozen = {name: weight.detach().clone() for name, weight in weights.items()}
    context = work.context(stage, state)
    # Before scores are attached: an objective that traces the network wants the plain one.
    objective = options.objective and options.objective.build(context)

    def learn(start: Scores) -> Scores:
        _check_scores(start, frozen, options.pruner.component.name)
        if history:
            raise RunError(f"pruner {options.pruner.component.name!r} learns twice in one stage")
        variables = LearnedScores(state.model, start, selection, state.masks, options.bn, followers)
        try:
            history.extend(_fit(variables, objective, stage, work, context))
            return variables.scores()
        finally:
            variables.detach()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        seed = seeds.derive(work.run.seed, stage.position, "score")
        size = work.run.data.batch_size
        return train_batches(work.train, size, work.augment, work.device, seed, most=stage.batches)

    if not options.pruner.component.learns:
        work.report(StageStarted(stage.name, stage.kind, work.key))
    scoring = replace(
        context,
        weights=frozen,
        generator=seeds.generator(work.run.seed, stage.position, "pruner"),
        objective=objective,
        batches=batches,
        learn=learn,
    )
    seeds.seed_all(work.run.seed, stage.position, "pruner")
    scores = options.pruner.build(scoring)(scoring)
    _check_scores(scores, frozen, options.pruner.component.name)
    masks = select(scores, selection, state.masks)
    check_layers(masks, selection.sparsity)
    state.masks = {**state.masks, **masks, **follow(masks, followers)}
    apply_masks(state.model, state.masks)
    got = measure_sparsity(count_weights(state.model, state.masks))
    if abs(got - stage.sparsity) > 0.005:
        work.report(Note(f"asked for sparsity {stage.sparsity:g}, got {got:.4g} of all weights"))
    if options.bn == "recalibrate":
        seeds.seed_all(work.run.seed, stage.position, "recalibrate")
        _recalibrate(state.model, batches)
    return Outcome({**_best(history, stage), **_sparsity(state)}, history)


def _find_structured(
    state: State, stage: Stage, work: Work, selection: Selection
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """(weights that the stage prunes, vectors that go with their channels)."""
    weights = _find_unstructured(state.model, stage.options.exclude, work)
    if selection.structure == "element":
        return weights, {}
    with eval_mode(state.model):
        example = torch.zeros(1, *work.data.shape, device=work.device)
        followers = find_followers(state.model, example)
    names = find_structured(weights, selection.structure, list(followers))
    if not names:
        raise RunError(f"structure {selection.structure!r} suits no layer of this network")
    if left := [name for name in weights if name not in names]:
        work.report(Note(f"structure {selection.structure!r} leaves dense: {', '.join(left)}"))
    chosen = followers if selection.structure == "channel" else {}
    return {name: weights[name] for name in names}, {n: v for n, v in chosen.items() if n in names}


def _find_unstructured(
    model: nn.Module, exclude: Sequence[str] | None, work: Work
) -> dict[str, Tensor]:
    """All that `exclude`, or else the architecture, leaves to prune; what it does not is told."""
    if others := find_unprunable(model):
        named = ", ".join(f"{name} ({layer})" for name, layer in others.items())
        work.report(Note(f"not to be pruned by the kind of their layer: {named}"))
    if exclude is not None:
        return find_prunable(model, exclude)
    left: Sequence[str] = getattr(model, "leave_dense", ())
    weights = find_prunable(model, left)
    if left:
        dense = ", ".join(name for name in find_prunable(model) if name not in weights)
        work.report(Note(f"left dense unless the stage says exclude: {dense}"))
    return weights


@torch.no_grad()
def _recalibrate(model: nn.Module, batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> None:
    """Reset the statistics of batch normalisation to the average over training images.

    The images are augmented and not attacked; everything but batch normalisation is in eval mode.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative average
    with eval_mode(model):
        for norm in norms:
            norm.train()
        for x, _ in batches():
            model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def evaluate(state: State, stage: Stage, work: Work) -> Outcome:
    """Judge the network on the test images, each evaluator by itself."""
    options, size = stage.options, work.run.data.batch_size
    if broken := find_broken(state.model):
        raise RunError(f"{broken} of the network holds NaN or infinity: there is nothing to judge")
    index = _choose(len(work.data.test.labels), options.images)
    if stage.batches is not None:
        index = index[: stage.batches * size]
    labels = work.data.test.labels[index]
    unbalanced = is_unbalanced(work.data.test.labels.cpu().numpy())
    metrics: dict[str, Any] = {}
    records: dict[str, np.ndarray] = {"index": index.numpy(), "label": labels.cpu().numpy()}
    notes: list[str] = []
    work.report(StageStarted(stage.name, stage.kind, work.key))
    context = work.context(stage, state)
    state.model.requires_grad_(False)
    for use in options.with_:
        seeds.seed_all(work.run.seed, stage.position, "evaluate", use.name)
        scratch = work.folder.scratch(use.name)
        evaluator = use.build(replace(context, scratch=scratch, pause=work.stop.check))
        with eval_mode(state.model), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = evaluator(state.model, _watched(work, stage, use.name, index))
        notes += [f"{use.name}: {text}" for text in dict.fromkeys(str(w.message) for w in caught)]
        for name, value in result.metrics.items():
            if not math.isfinite(value):
                raise RunError(
                    f"evaluator {use.component.name!r} of plugin {use.plugin} gave {name} = {value}"
                )
            metrics[f"{use.name}.{name}"] = value
        if use.threat is not None and use.component.judges:
            metrics[f"{use.name}.eps"] = use.threat.eps
        for name, values in result.records.items():
            if len(values) != len(labels):
                raise RunError(
                    f"evaluator {use.component.name!r} of plugin {use.plugin} gave "
                    f"{len(values)} records {name!r} for {len(labels)} images"
                )
            records[f"{use.name}.{name}"] = values
        if unbalanced and "accuracy" in result.metrics and "correct" in result.records:
            correct, name = np.asarray(result.records["correct"]), f"{use.name}.balanced_accuracy"
            metrics |= balanced_proportion(name, correct, records["label"])
    notes += cross_examine(options.with_, records)
    return Outcome({**metrics, **_sparsity(state)}, records=records, notes=tuple(notes))


def _choose(n: int, images: int | None) -> Tensor:
    """Indices of the test images that are judged: all, or so many, evenly spaced.

    The first ones would be of a few classes where a data set is sorted.
    """
    if images is None or images >= n:
        return torch.arange(n)
    return torch.arange(images) * n // images


def _watched(work: Work, stage: Stage, name: str, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = work.run.data.batch_size
    total = -(-len(index) // size)
    batches = eval_batches(work.data.test, size, work.device, index)
    for done, batch in enumerate(batches):
        work.stop.check()
        work.report(Progress(stage.name, done, total, label=name))
        yield batch
    work.report(Progress(stage.name, total, total, label=name))


STAGES: dict[str, Callable[[State, Stage, Work], Outcome]] = {
    "pretrain": train,
    "prune": prune,
    "finetune": train,
    "evaluate": evaluate,
}


def _fit(
    variables: Variables, objective: Objective, stage: Stage, work: Work, context: Context
) -> list[dict[str, Any]]:
    options = stage.options
    return fit(
        Fit(
            variables=variables,
            objective=objective,
            optimizer=options.optimizer.build(context),
            train=work.train,
            extra=work.extra,
            validation=work.validation,
            epochs=stage.passes,
            batch_size=work.run.data.batch_size,
            augment=work.augment,
            device=work.device,
            seed=(work.run.seed, stage.position),
            stage=stage.name,
            kind=stage.kind,
            key=work.key,
            report=work.report,
            stop=work.stop,
            progress=work.folder.progress,
            select=_select(stage),
            clip_norm=options.clip_norm,
            most=stage.batches,
            replays=stage.replays,
        )
    )


def _best(history: list[dict[str, Any]], stage: Stage) -> dict[str, Any]:
    """The row of the epoch whose weights are kept, and the metric that chose it."""
    rows = [row for row in history if row["best"]]
    if not rows:
        return {}
    return {**{k: v for k, v in rows[-1].items() if k != "best"}, "select": _select(stage)}


def _select(stage: Stage) -> str:
    """The validation metric that chooses the best epoch of a stage."""
    options = stage.options
    return options.select or str(options.objective.component.select)


def _sparsity(state: State) -> dict[str, Any]:
    counts = count_weights(state.model, state.masks)
    return {"sparsity": measure_sparsity(counts), "masks": hash_masks(state.masks)}


def _check_scores(scores: Scores, weights: Mapping[str, Tensor], pruner: str) -> None:
    if scores.values.keys() != weights.keys():
        wrong = sorted(scores.values.keys() ^ weights.keys())
        raise RunError(f"pruner {pruner!r} must score every weight it is given, and no other; "
                       f"wrong: {', '.join(wrong)}")  # fmt: skip
    for name, value in scores.values.items():
        if value.shape != weights[name].shape:
            raise RunError(
                f"pruner {pruner!r}: the scores of {name} are {tuple(value.shape)}, its weights "
                f"{tuple(weights[name].shape)}"
            )
        if value.isnan().any():
            raise RunError(f"pruner {pruner!r}: the scores of {name} hold NaN")


def describe_counts(state: State) -> dict[str, Any]:
    """Kept and all weights, in total and layer by layer."""
    layers = count_weights(state.model, state.masks)
    return {
        "kept": sum(layer["kept"] for layer in layers.values()),
        "weights": sum(layer["weights"] for layer in layers.values()),
        "layers": layers,
    }
