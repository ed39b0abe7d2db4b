"""pretrain, prune, finetune: (State, Stage, Work) -> Outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.contracts import Context, Objective, ObjectiveContext, PrunerContext, Scores
from prunekit.data import seeds
from prunekit.engine.evaluating import evaluate
from prunekit.engine.work import Outcome, Work, describe_masks
from prunekit.errors import RunError
from prunekit.evaluation import eval_mode
from prunekit.pruning.layers import find_prunable, find_unprunable
from prunekit.pruning.learning import LearnedScores
from prunekit.pruning.masks import (
    State,
    apply_masks,
    count_weights,
    measure_sparsity,
)
from prunekit.pruning.selection import Selection, check_layers, select_masks
from prunekit.pruning.structures import find_followers, find_structured, follow
from prunekit.recipe.stages import Stage
from prunekit.report import Note, StageStarted
from prunekit.training.loop import Fit, fit
from prunekit.training.variables import Variables, Weights


def train(state: State, stage: Stage, work: Work) -> Outcome:
    """Pretrain or finetune: train the weights; removed ones stay zero."""
    variables = Weights(state.model, state.masks)
    context = ObjectiveContext(**vars(work.context(stage, state)))
    objective = stage.options.objective.build(context)
    history = _fit(variables, objective, stage, work)
    return Outcome({**_best(history, stage), **describe_masks(state)}, history)


def prune(state: State, stage: Stage, work: Work) -> Outcome:
    """Score the weights, select masks, and set the removed weights to zero."""
    options = stage.options
    history: list[dict[str, Any]] = []
    # Whatever stages came before.
    state.model.requires_grad_(True)
    state.model.train()
    selection = Selection(stage.sparsity, options.budget, options.structure)
    weights, followers = _find_structured(state, stage, work, selection)
    frozen = {name: weight.detach().clone() for name, weight in weights.items()}
    context = vars(work.context(stage, state))
    # Before scores are attached: an objective may trace the plain network.
    objective = options.objective and options.objective.build(ObjectiveContext(**context))

    def learn(start: Scores) -> Scores:
        _check_scores(start, frozen, options.pruner.component.name)
        if history:
            raise RunError(f"pruner {options.pruner.component.name!r} learns twice in one stage")
        variables = LearnedScores(state.model, start, selection, state.masks, options.bn, followers)
        try:
            history.extend(_fit(variables, objective, stage, work))
            return variables.scores()
        finally:
            variables.detach()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        seed = seeds.derive_seed(work.run.seed, stage.position, "score")
        return replace(work.feed(stage), extra=None).epoch(seed)

    if not options.pruner.component.learns:
        work.report(StageStarted(stage.name, stage.kind, work.key))
    scoring = PrunerContext(
        **{**context, "threat": options.pruner.threat},
        weights=frozen,
        generator=seeds.generator(work.run.seed, stage.position, "pruner"),
        objective=objective,
        batches=batches,
        learn=learn,
    )
    seeds.seed_all(work.run.seed, stage.position, "pruner")
    scores = options.pruner.build(scoring)(scoring)
    _check_scores(scores, frozen, options.pruner.component.name)
    masks = select_masks(scores, selection, state.masks)
    check_layers(masks, selection.sparsity)
    state.masks = {**state.masks, **masks, **follow(masks, followers)}
    apply_masks(state.model, state.masks)
    got = measure_sparsity(count_weights(state.model, state.masks))
    if abs(got - stage.sparsity) > 0.005:
        work.report(Note(f"asked for sparsity {stage.sparsity:g}, got {got:.4g} of all weights"))
    if options.bn == "recalibrate":
        seeds.seed_all(work.run.seed, stage.position, "recalibrate")
        _recalibrate(state.model, batches)
    return Outcome({**_best(history, stage), **describe_masks(state)}, history)


def _find_structured(
    state: State, stage: Stage, work: Work, selection: Selection
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """(weights that the stage prunes, vectors that go with their channels)."""
    weights = _find_unstructured(state.model, stage.options.exclude, work)
    if selection.structure == "element":
        return weights, {}
    with eval_mode(state.model):
        example = torch.zeros(1, *work.loaded.data.shape, device=work.device)
        followers = find_followers(state.model, example)
    names = find_structured(weights, selection.structure, list(followers))
    if not names:
        raise RunError(f"structure {selection.structure!r} fits no layer of this network")
    if left := [name for name in weights if name not in names]:
        work.report(Note(f"structure {selection.structure!r} leaves dense: {', '.join(left)}"))
    chosen = followers if selection.structure == "channel" else {}
    return {name: weights[name] for name in names}, {n: v for n, v in chosen.items() if n in names}


def _find_unstructured(
    model: nn.Module, exclude: Sequence[str] | None, work: Work
) -> dict[str, Tensor]:
    """The prunable weights without those that `exclude`, or the architecture, leaves dense."""
    if others := find_unprunable(model):
        named = ", ".join(f"{name} ({layer})" for name, layer in others.items())
        work.report(Note(f"cannot be pruned, by the kind of their layer: {named}"))
    if exclude is not None:
        return find_prunable(model, exclude)
    left: Sequence[str] = getattr(model, "leave_dense", ())
    weights = find_prunable(model, left)
    if left:
        dense = ", ".join(name for name in find_prunable(model) if name not in weights)
        work.report(Note(f"left dense by the architecture (exclude = [] prunes them too): {dense}"))
    return weights


@torch.no_grad()
def _recalibrate(model: nn.Module, batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> None:
    """Reset the statistics of batch normalization to the average over training images.

    The images are augmented and not attacked; everything but batch normalization is in eval mode.
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


STAGES: dict[str, Callable[[State, Stage, Work], Outcome]] = {
    "pretrain": train,
    "prune": prune,
    "finetune": train,
    "evaluate": evaluate,
}


def _fit(
    variables: Variables, objective: Objective, stage: Stage, work: Work
) -> list[dict[str, Any]]:
    options = stage.options
    return fit(
        Fit(
            variables=variables,
            objective=objective,
            optimizer=options.optimizer.build(Context(seed=work.run.seed, folder=work.run.folder)),
            feed=work.feed(stage),
            epochs=stage.epochs,
            seed=(work.run.seed, stage.position),
            stage=stage.name,
            kind=stage.kind,
            key=work.key,
            report=work.report,
            stop=work.stop,
            checkpoint=work.folder.progress,
            select=_selecting_metric(stage),
            clip_norm=options.clip_norm,
            replays=stage.replays,
        )
    )


def _best(history: list[dict[str, Any]], stage: Stage) -> dict[str, Any]:
    """The row of the epoch whose weights are kept, and the metric that chose it."""
    rows = [row for row in history if row["best"]]
    if not rows:
        return {}
    return {
        **{k: v for k, v in rows[-1].items() if k != "best"},
        "select": _selecting_metric(stage),
    }


def _selecting_metric(stage: Stage) -> str:
    """The validation metric that chooses the best epoch of a stage."""
    options = stage.options
    return options.select or str(options.objective.component.select)


def _check_scores(scores: Scores, weights: Mapping[str, Tensor], pruner: str) -> None:
    if scores.values.keys() != weights.keys():
        wrong = sorted(scores.values.keys() ^ weights.keys())
        raise RunError(
            f"pruner {pruner!r} must score every weight it is given, and no other; wrong: "
            f"{', '.join(wrong)}"
        )
    for name, value in scores.values.items():
        if value.shape != weights[name].shape:
            raise RunError(
                f"pruner {pruner!r}: the scores of {name} are {tuple(value.shape)}, its weights "
                f"{tuple(weights[name].shape)}"
            )
        if value.isnan().any():
            raise RunError(f"pruner {pruner!r}: the scores of {name} hold NaN")
