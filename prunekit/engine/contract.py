"""What every component must do, kind by kind; `prunekit.testing` checks plugins with it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.catalog.component import Use
from prunekit.contracts import (
    ArchitectureContext,
    Augmenting,
    Clock,
    Context,
    Data,
    DatasetContext,
    EvaluatorContext,
    Loss,
    ObjectiveContext,
    OptimizerChoice,
    PrunerContext,
    ReporterContext,
    Result,
    Scores,
    Split,
    Validating,
)
from prunekit.data.batches import eval_batches
from prunekit.data.seeds import seed_all
from prunekit.engine.examples import BATCH, CLASSES, example_events, tiny_batches, tiny_network
from prunekit.engine.methods import build, check_methods
from prunekit.errors import DataMissingError
from prunekit.evaluation import eval_mode
from prunekit.pruning.learning import LearnedScores
from prunekit.pruning.selection import Selection
from prunekit.report import Closing


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def _check_objective(use: Use[Any], context: ObjectiveContext) -> None:
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
    _check_scores_learn(use, context, x, y)
    if isinstance(objective, Validating):
        before = _snapshot(model)
        with eval_mode(model):
            values = objective.validate(x, y)
        assert all(v.shape == (BATCH,) for v in values.values()), "validate is per image"
        assert _same(before, model.state_dict()), "validate changed the network"
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
    variables = LearnedScores(model, Scores(start), Selection(0.5), {}, "train")
    objective = build(use, dataclasses.replace(context, model=model, stage="prune"))
    with variables.effective():
        objective(x, y, Clock(0, 10, 0, 2)).value.backward()
    assert all(part.score.grad is not None for part in variables.parts.values()), (
        "scores get no gradient"
    )


def _check_pruner(use: Use[Any], context: PrunerContext) -> None:
    model, weights = context.model, context.weights
    before = _snapshot(model)
    learned: list[Scores] = []

    def learn(start: Scores) -> Scores:
        learned.append(start)
        return context.learn(start)

    model.train()
    scoring = dataclasses.replace(context, stage="prune", threat=use.threat, learn=learn)
    scores = build(use, scoring)(scoring)
    assert isinstance(scores, Scores), f"gives a {type(scores).__name__}, not Scores"
    assert bool(learned) == use.component.learns, "`learns` and what it does disagree"
    assert scores.values.keys() == weights.keys(), "must score every weight, and no other"
    for n, value in scores.values.items():
        assert value.shape == weights[n].shape, f"shape of the scores of {n}"
        assert not value.isnan().any(), f"NaN among the scores of {n}"
    after = _snapshot(model)
    same = [torch.equal(before[n], after[n]) for n in weights]
    assert all(same), "scoring changed the weights"


def _check_architecture(use: Use[Any], context: ArchitectureContext) -> None:
    seed_all(0)
    model = build(use, context)
    assert isinstance(model, nn.Module), "is not an nn.Module"
    seed_all(0)
    twin = build(use, context)
    assert _same(model.state_dict(), twin.state_dict()), "weights do not follow the seed"
    x = torch.rand(2, *context.shape, requires_grad=True)
    model.eval()
    logits = model(x)
    assert logits.shape == (2, context.classes), f"logits are {tuple(logits.shape)}"
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert gradient.isfinite().all(), "the gradient at the input is not finite"
    assert gradient.abs().sum() > 0, "the gradient at the input is zero"
    alone = model(x[:1])
    assert torch.allclose(alone, logits[:1], atol=1e-4), "images influence each other"
    assert next(model.parameters(), None) is not None, "has no weights"
    twin.load_state_dict(copy.deepcopy(model.state_dict()))


def _check_dataset(use: Use[Any], context: DatasetContext) -> None:
    try:
        data = build(use, context)
    except DataMissingError:
        return
    assert isinstance(data, Data), f"gives a {type(data).__name__}, not Data"
    for split in (data.train, data.test):
        check_methods(split, Split, Augmenting)
    if use.component.facts is not None:
        facts = use.component.facts(use.options)
        declared = (facts.shape, facts.classes)
        assert declared == (data.shape, data.classes), "differs from what it declares"
    # Images to train on beside those of another data set come without a test part.
    for part in (data.train, data.test) if len(data.test.labels) else (data.train,):
        assert part.labels.dtype == torch.int64, "labels are not int64"
        assert int(part.labels.min()) >= 0, "a label below 0"
        assert int(part.labels.max()) < data.classes, "a label beyond the classes"
        index = torch.tensor([1, 0])
        (images,) = part.batches([index])
        assert images.dtype == torch.uint8, "images are not uint8"
        assert images.shape == (2, *data.shape), f"images are {tuple(images.shape)}"
        (swapped,) = part.batches([index.flip(0)])
        assert torch.equal(images, swapped.flip(0)), "images do not follow the index"
        x, y = next(iter(eval_batches(part, 2, torch.device("cpu"))))
        assert torch.equal(y, part.labels[:2]), "labels do not follow the index"
        assert 0 <= float(x.min()) <= float(x.max()) <= 1, "pixels outside [0, 1]"


def _check_evaluator(use: Use[Any], context: EvaluatorContext) -> None:
    model = tiny_network().eval()
    before, batches = _snapshot(model), tiny_batches()
    results = []
    context = dataclasses.replace(context, model=model, stage="evaluate")
    for _ in range(2):
        with tempfile.TemporaryDirectory() as scratch:
            seed_all(3)
            evaluate = build(use, dataclasses.replace(context, scratch=Path(scratch)))
            results.append(evaluate(model, iter(batches)))
    result = results[0]
    assert isinstance(result, Result), f"gives a {type(result).__name__}, not a Result"
    assert result.metrics, "no metric"
    assert all(np.isfinite(v) for v in result.metrics.values()), "a metric is not finite"
    if verdict := {"attack": "correct", "proof": "verified"}.get(use.component.judges):
        kept = np.asarray(result.records.get(verdict, ()))
        assert kept.dtype == bool, f"lacks the boolean record {verdict!r}"
    assert result.metrics == results[1].metrics, "not repeatable under one seed"
    for key, record in result.records.items():
        assert len(record) == 2 * BATCH, f"{len(record)} records {key!r}, not one an image"
        assert np.asarray(record).dtype != object, f"records {key!r} are objects"
    assert _same(before, model.state_dict()), "changed the network"
    assert not any(m.training for m in model.modules()), "left evaluation mode"


def _check_schedule(use: Use[Any], context: Context) -> None:
    schedule = build(use, context)
    clocks = [Clock(step, 12, step // 3, 4) for step in range(12)]
    factors = [schedule(clock) for clock in clocks]
    assert all(np.isfinite(f) and f >= 0 for f in factors), "a factor is negative or not a number"
    assert factors == [schedule(clock) for clock in clocks], "is not a function of the clock alone"


def _check_optimizer(use: Use[Any], context: Context) -> None:
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
    optimizer = choice.make(list(model.parameters()))
    before = _snapshot(model)
    train(model, optimizer)
    assert not _same(before, model.state_dict()), "a step changes nothing"
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = choice.make(list(twin.parameters()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer)
    train(twin, resumed)
    assert _same(model.state_dict(), twin.state_dict()), "its state does not restore it"


def _check_reporter(use: Use[Any], context: ReporterContext) -> None:
    out = io.StringIO()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(out):
        report = build(use, dataclasses.replace(context, folder=Path(scratch)))
        for event in example_events(Path(scratch)):
            report(event)
        if isinstance(report, Closing):
            report.close()
    assert not out.getvalue(), "writes to stdout, which is for results"


CHECKS: dict[str, tuple[type[Context], Callable[[Use[Any], Any], None]]] = {
    "objective": (ObjectiveContext, _check_objective),
    "pruner": (PrunerContext, _check_pruner),
    "architecture": (ArchitectureContext, _check_architecture),
    "dataset": (DatasetContext, _check_dataset),
    "evaluator": (EvaluatorContext, _check_evaluator),
    "optimizer": (Context, _check_optimizer),
    "schedule": (Context, _check_schedule),
    "reporter": (ReporterContext, _check_reporter),
}
"""Kind -> (the context that such a component is built with, what it must do in it)."""
