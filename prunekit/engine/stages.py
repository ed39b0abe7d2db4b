"""pretrain, prune, finetune: (State, Stage, Work) -> Outcome."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.catalog.containment import ask
from prunekit.contexts import NetworkContext, ObjectiveContext, PrunerContext
from prunekit.contracts import Objective, Scores
from prunekit.data import seeds
from prunekit.engine.evaluating import evaluate
from prunekit.engine.others import open_network
from prunekit.engine.validating import make_judge
from prunekit.engine.work import Outcome, Work, describe_masks
from prunekit.errors import RunError
from prunekit.graph.groups import Group, find_groups, follow
from prunekit.pruning.layers import describe_faults, find_prunable, tell_unprunable
from prunekit.pruning.masks import (
    State,
    apply_masks,
    count_weights,
    measure_sparsity,
)
from prunekit.pruning.selection import (
    Selection,
    check_keep,
    check_layers,
    check_scores,
    count_units,
    select_masks,
)
from prunekit.pruning.structures import fits
from prunekit.recipe.agreement import tell_validation
from prunekit.recipe.stages import Stage
from prunekit.report import Note, StageStarted
from prunekit.steps import Masking
from prunekit.training.loop import Fit, fit
from prunekit.training.masking import LearnedScores, Weights
from prunekit.training.progress import label_metrics
from prunekit.training.rewiring import Rewired, Rewiring
from prunekit.training.statistics import recalibrate


def train(state: State, stage: Stage, work: Work) -> Outcome:
    """Pretrain or finetune: train the weights; removed ones stay zero, or a rewirer moves masks."""
    _thaw(state, work)
    masking = Weights(state.model, state.masks)
    if stage.prunes:
        masking = _rewire(state, stage, work)
    context = work.context(stage, state)
    objective = stage.options.objective.build(_objective_context(context, work))
    try:
        history = _fit(masking, objective, stage, work, context)
    finally:
        masking.detach()
    state.masks = masking.masks
    if stage.prunes:
        _tell_sparsity(state, stage, work)
    return Outcome({**_best(history, stage), **describe_masks(state)}, history)


def _objective_context(context: NetworkContext, work: Work) -> ObjectiveContext:
    return ObjectiveContext(**vars(context), network=partial(open_network, work))


def _rewire(state: State, stage: Stage, work: Work) -> Rewired:
    """The masking of a stage whose masks a rewirer changes."""
    use = stage.options.rewire
    weights, selection = _find_structured(state, stage, work)
    groups = selection.groups
    if not groups and any(mask.dim() == 1 for mask in state.masks.values()):
        # A channel that an earlier stage removed comes back with its bias, scale and shift.
        groups = _find_groups(state, weights, work)[0]
    rewiring = Rewiring(
        rewirer=use.build(work.context(stage, state)),
        name=use.name,
        selection=selection,
        schedule=stage.options.sparsity_schedule.build(work.plain_context()),
        weights=list(weights),
        seed=(work.run.seed, stage.position),
        gradients=ask(use, "gradients"),
        allocates=use.component.allocates,
        groups=groups,
        trained=work.run.starts_given
        or any(s.trains for s in work.run.stages if s.position < stage.position),
        rehearsed=stage.limit is not None,
    )
    return Rewired(state.model, state.masks, rewiring)


def prune(state: State, stage: Stage, work: Work) -> Outcome:
    """Score the weights, select masks, and set the removed weights to zero."""
    options = stage.options
    named = f"pruner {options.pruner.component.name!r}"
    history: list[dict[str, Any]] = []
    _thaw(state, work)
    context = work.context(stage, state)
    weights, selection = _find_structured(state, stage, work)
    frozen = {name: weight.detach().clone() for name, weight in weights.items()}
    entries = state.model.state_dict().keys()
    # Before scores are attached: an objective may trace the plain network.
    objective = options.objective and options.objective.build(_objective_context(context, work))
    schedule = options.sparsity_schedule.build(work.plain_context())

    def attach(start: Scores, kind: Callable[..., Masking] = LearnedScores, **more: Any) -> Masking:
        check_scores(start, frozen, named, allocates=start.keep is not None)
        bn, alive = options.bn, state.masks
        return kind(state.model, start, selection, alive, bn, schedule, **more)

    def train(masking: Masking) -> Scores:
        if history:
            raise RunError(f"{named} trains twice in one stage")
        try:
            masking.check()
            history.extend(_fit(masking, objective, stage, work, context))
            return masking.scores()
        finally:
            masking.detach()

    def batches(epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        number = (epoch,) if epoch else ()
        seed = seeds.derive_seed(work.run.seed, stage.position, "score", *number)
        return replace(work.feed(stage), extra=None).epoch(seed)

    epochs = itertools.count()

    if not options.pruner.component.learns:
        work.report(StageStarted(stage.name, stage.kind, work.key))
    scoring = PrunerContext(
        **{**vars(context), "threat": options.pruner.threat},
        weights=frozen,
        masks=state.masks,
        generator=seeds.generator(work.run.seed, stage.position, "pruner"),
        objective=objective,
        batches=lambda: batches(next(epochs)),
        attach=attach,
        train=train,
    )
    seeds.seed_all(work.run.seed, stage.position, "pruner")
    scores = options.pruner.build(scoring)(scoring)
    if left := sorted(state.model.state_dict().keys() ^ entries):
        raise RunError(
            f"{named} leaves another network behind: {', '.join(left)} came or went; what its "
            "masking adds to the network, its detach() takes away"
        )
    check_scores(scores, frozen, named, allocates=options.pruner.component.allocates)
    check_keep(scores, selection, named)
    masks = select_masks(scores, selection, state.masks)
    check_layers(masks, selection.sparsity)
    for name, kept in count_units(masks, selection).items():
        if scores.keep is not None and scores.keep[name] != kept:
            raise RunError(
                f"{named} keeps {scores.keep[name]} of {name}, where earlier stages left {kept}; "
                "what is left is in context.masks"
            )
    if all(n in state.masks and torch.equal(mask, state.masks[n]) for n, mask in masks.items()):
        told = "as much was removed before; write a larger sparsity"
        work.report(Note(f"stage {stage.name!r} removes nothing: {told}", warning=True))
    state.masks = {**state.masks, **masks, **follow(masks, selection.groups)}
    apply_masks(state.model, state.masks)
    _tell_sparsity(state, stage, work)
    if options.bn == "recalibrate":
        seeds.seed_all(work.run.seed, stage.position, "recalibrate")
        recalibrate(state.model, (partial(state.model, x) for x, _ in batches()))
    return Outcome({**_best(history, stage), **describe_masks(state)}, history)


def _tell_sparsity(state: State, stage: Stage, work: Work) -> None:
    got = measure_sparsity(count_weights(state.model, state.masks))
    if abs(got - stage.sparsity) > 0.005:
        of = "the weights of all Conv2d, Linear and attention layers, left dense or not"
        work.report(Note(f"asked for sparsity {stage.sparsity:g}, got {got:.4g} of {of}"))


def _find_structured(state: State, stage: Stage, work: Work) -> tuple[dict[str, Tensor], Selection]:
    """(weights that the stage prunes, how): those that the structure does not suit stay dense."""
    options = stage.options
    budget, compares = options.budget.build(work.plain_context()), options.budget.component.compares
    selection = Selection(stage.sparsity, budget, options.structure, compares)
    found = _find_unstructured(state.model, options.exclude, work)
    weights = {name: weight for name, weight in found.items() if name not in state.frozen}
    if not weights:
        raise RunError(
            "there is nothing to prune: the network freezes every weight; set requires_grad where "
            "it may change"
        )
    dense = {
        name: f"{weight.shape[1]} inputs make no whole groups"
        for name, weight in weights.items()
        if not fits(weight, selection.structure)
    }
    if selection.structure == "channel":
        groups, dense = _find_groups(state, weights, work)
        selection = replace(selection, groups=groups)
    reasons = {why: [n for n, reason in dense.items() if reason == why] for why in dense.values()}
    told = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
    if len(dense) == len(weights):
        told = "; ".join(filter(None, (told, describe_faults(state.model))))
        raise RunError(f"structure {selection.structure!r} fits no layer of this network: {told}")
    if dense:
        work.report(Note(f"structure {selection.structure!r} leaves dense: {told}"))
    return {name: weight for name, weight in weights.items() if name not in dense}, selection


def _thaw(state: State, work: Work) -> None:
    """Begin a stage that trains; tells what the network itself keeps as it is."""
    state.thaw()
    while state.notes:
        work.report(Note(state.notes.pop(0)))
    if state.frozen:
        named = ", ".join(state.frozen[:8])
        more = f" and {len(state.frozen) - 8} more" if len(state.frozen) > 8 else ""
        work.report(Note(f"frozen by the network, neither trained nor pruned: {named}{more}"))


def _find_groups(
    state: State, weights: Collection[str], work: Work
) -> tuple[list[Group], dict[str, str]]:
    example = torch.zeros(1, *work.loaded.data.shape, device=work.device)
    return find_groups(state.model, example, weights)


def _find_unstructured(
    model: nn.Module, exclude: Sequence[str] | None, work: Work
) -> dict[str, Tensor]:
    """The prunable weights without those that `exclude`, or the architecture, leaves dense."""
    for text in tell_unprunable(model):
        work.report(Note(text))
    if exclude is not None:
        return find_prunable(model, exclude)
    left: Sequence[str] = getattr(model, "leave_dense", ())
    weights = find_prunable(model, left)
    if left:
        dense = ", ".join(name for name in find_prunable(model) if name not in weights)
        work.report(Note(f"left dense by the architecture (exclude = [] prunes them too): {dense}"))
    return weights


STAGES: dict[str, Callable[[State, Stage, Work], Outcome]] = {
    "pretrain": train,
    "prune": prune,
    "finetune": train,
    "evaluate": evaluate,
}


def _fit(
    masking: Masking, objective: Objective, stage: Stage, work: Work, context: NetworkContext
) -> list[dict[str, Any]]:
    options = stage.options
    if stage.limit is None and not work.run.dataset.component.facts:  # else the plan has said it
        for note in tell_validation(stage, len(work.loaded.validation.labels)):
            work.report(Note(note))
    job = Fit(
        masking=masking,
        objective=objective,
        optimizer=options.optimizer.build(work.plain_context()),
        feed=work.feed(stage),
        epochs=stage.epochs,
        seed=(work.run.seed, stage.position),
        stage=stage.name,
        kind=stage.kind,
        key=work.key,
        report=work.report,
        stop=work.stop,
        checkpoint=work.folder.progress,
        select=stage.select,
        clip_norm=options.clip_norm,
        replays=stage.replays,
        wrappers=[use.build(context) for use in options.wrap],
        images=stage.accuracy_of,
        judge=make_judge(stage, context),
        patience=options.patience,
    )
    return fit(job)


def _best(history: list[dict[str, Any]], stage: Stage) -> dict[str, Any]:
    """The row of the epoch whose weights are kept, what chose it, and why no more were trained."""
    rows = [row for row in history if row["best"]]
    if not rows:
        return {}
    found = label_metrics(rows[-1], stage.accuracy_of)
    ended = {key: value for key, value in history[-1].items() if key == "ended"}
    return {"epoch": rows[-1]["epoch"], **found, "select": stage.select, **ended}
