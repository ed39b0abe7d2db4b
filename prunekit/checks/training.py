"""What objectives, pruners, optimizers and schedules must do."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.catalog.component import Use
from prunekit.checks.examples import BATCH, CLASSES, tiny_batches, tiny_network, train_once
from prunekit.checks.methods import build, check_methods
from prunekit.contexts import Context, ObjectiveContext, PrunerContext
from prunekit.contracts import Attacking, Clock, Loss, OptimizerChoice, Scores, Validating
from prunekit.data.seeds import seed_all
from prunekit.errors import RunError
from prunekit.evaluation import eval_mode
from prunekit.pruning.selection import Selection, check_keep, check_scores
from prunekit.steps import Masking
from prunekit.training.learned_weights import LearnedWeights
from prunekit.training.masking import LearnedScores


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return not differing(a, b)


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that are in one only, or not equal."""
    for name, value in (*a.items(), *b.items()):
        assert isinstance(value, Tensor), f"{name} is a {type(value).__name__}, not a tensor"
    return sorted(
        {n for n in a.keys() | b.keys() if n not in a or n not in b}
        | {n for n in a.keys() & b.keys() if not torch.equal(a[n], b[n])}
    )


def check_objective(use: Use[Any], context: ObjectiveContext) -> None:
    model = tiny_network()
    (x, y), _ = tiny_batches()
    images = x.clone()
    objective = build(use, dataclasses.replace(context, model=model))
    model.train()

    def step() -> Loss:
        seed_all(1)
        loss = objective(x, y, Clock(0, 10, 0, 2))
        assert isinstance(loss, Loss), f"the step gives a {type(loss).__name__}, not a Loss"
        return loss

    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss = step()
    assert loss.value.shape == (), "the loss is not a scalar"
    assert loss.value.isfinite(), "the loss is not finite"
    assert loss.logits.shape == (BATCH, CLASSES), f"logits are {tuple(loss.logits.shape)}"
    assert all(t.numel() == 1 for t in loss.terms.values()), "a term is not a scalar"
    assert all(p.grad is None for p in model.parameters()), "the step left gradients"
    assert all(torch.equal(parameters[n], p) for n, p in model.named_parameters()), (
        "the step changed the weights; that is the optimizer's"
    )
    assert torch.equal(x, images), "the step changed the images in place"
    assert all(m.training for m in model.modules()), "the step left train mode"
    loss.value.backward()
    assert all(p.grad is not None for p in model.parameters()), "a weight gets no gradient"
    model.load_state_dict(tiny_network().state_dict())
    first = float(step().value.detach())
    model.load_state_dict(tiny_network().state_dict())
    assert first == float(step().value.detach()), "not repeatable under one seed"
    if isinstance(objective, Attacking):
        model.load_state_dict(tiny_network().state_dict())
        seed_all(1)
        prepared = objective.prepare(x, y, Clock(0, 10, 0, 2))
        again = objective.loss(prepared, Clock(0, 10, 0, 2)).value
        assert first == float(again.detach()), "`prepare` and `loss` are not what calling it does"
    _check_scores_learn(use, context, x, y)
    if isinstance(objective, Validating):
        before = snapshot(model)
        with eval_mode(model):
            values = objective.validate(x, y)
        assert all(v.shape == (BATCH,) for v in values.values()), "validate is per image"
        assert same(before, model.state_dict()), "validate changed the network"
        names = set(values)
    else:
        names = {"accuracy"}
    declared = use.component.validates
    assert names == set(declared), f"validates {sorted(names)}, but declares {sorted(declared)}"
    assert use.component.select in {*names, "last"}, "select is not a validation metric"


def _check_scores_learn(use: Use[Any], context: ObjectiveContext, x: Tensor, y: Tensor) -> None:
    """Scores get gradients through the objective, whichever forward pass comes first."""
    model = tiny_network()
    start = {n: torch.randn_like(p) for n, p in model.named_parameters() if p.dim() > 1}
    # As in a stage: before scores are attached.
    objective = build(use, dataclasses.replace(context, model=model, stage="prune"))
    variables = LearnedScores(model, Scores(start), Selection(0.5), {}, "train")
    with variables.effective(Clock(0, 10, 0, 2)):
        objective(x, y, Clock(0, 10, 0, 2)).value.backward()
    assert all(part.score.grad is not None for part in variables.parts.values()), (
        "scores get no gradient"
    )


def check_pruner(use: Use[Any], context: PrunerContext) -> None:
    """Scores that fit; what it trains gets gradients; weights that it does not train stay."""
    model, weights = context.model, context.weights
    before = snapshot(model)
    given = {name: weight.clone() for name, weight in weights.items()}
    learned: list[Masking] = []
    trained: set[Tensor] = set()
    live = {name: p for name, p in model.named_parameters() if name in weights}

    def train(masking: Masking) -> Scores:
        learned.append(masking)
        trained.update(p for group in masking.parameters() for p in group.parameters)
        own = [kind for kind in (LearnedScores, LearnedWeights) if isinstance(masking, kind)]
        check_methods(masking, Masking, *own)
        return train_once(masking)

    model.train()
    scoring = dataclasses.replace(context, stage="prune", threat=use.threat, train=train)
    scores = build(use, scoring)(scoring)
    assert isinstance(scores, Scores), f"gives a {type(scores).__name__}, not Scores"
    assert bool(learned) == use.component.learns, "`learns` and what it does disagree"
    try:
        check_scores(scores, weights, "it", allocates=use.component.allocates)
        check_keep(scores, Selection(context.sparsity), "it")
    except RunError as error:
        raise AssertionError(str(error)) from None
    after = snapshot(model)
    left = sorted(before.keys() ^ after.keys())
    assert not left, f"leaves another network behind: {', '.join(left)} came or went"
    assert all(torch.equal(before[n], after[n]) for n in weights if live[n] not in trained), (
        "scoring changed the weights"
    )
    assert same(given, context.weights), "changed the weights of its context; copy them"


def check_schedule(use: Use[Any], context: Context) -> None:
    schedule = build(use, context)
    clocks = [Clock(step, 12, step // 3, 4) for step in range(12)]
    factors = [schedule(clock) for clock in clocks]
    assert all(np.isfinite(f) and f >= 0 for f in factors), "a factor is negative or not a number"
    assert factors == [schedule(clock) for clock in clocks], "is not a function of the clock alone"


def check_optimizer(use: Use[Any], context: Context) -> None:
    """A step moves the weights, and a restored state continues to the same weights."""
    choice = build(use, context)
    assert isinstance(choice, OptimizerChoice), "does not give an OptimizerChoice"
    assert choice.lr > 0, "its rate is not above 0"

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        (x, y), _ = tiny_batches()
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    model, twin = tiny_network(), tiny_network()
    optimizer = choice.make([{"params": list(model.parameters()), "weight_decay": 0.5}])
    assert optimizer.param_groups[0]["weight_decay"] == 0.5, "a group's own weight decay is lost"
    before = snapshot(model)
    train(model, optimizer)
    assert not same(before, model.state_dict()), "a step changes nothing"
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = choice.make(list(twin.parameters()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer)
    train(twin, resumed)
    assert same(model.state_dict(), twin.state_dict()), "its state does not restore it"
