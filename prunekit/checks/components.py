"""What every component must do, kind by kind; `prunekit.testing` checks plugins with it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunekit.catalog.component import Use
from prunekit.checks import moving, training
from prunekit.checks.backends import check_backend
from prunekit.checks.examples import BATCH, example_events, tiny_batches, tiny_network
from prunekit.checks.methods import build, check_methods
from prunekit.checks.training import same, snapshot
from prunekit.contexts import (
    ArchitectureContext,
    BackendContext,
    Context,
    DatasetContext,
    EvaluatorContext,
    NetworkContext,
    ObjectiveContext,
    PrunerContext,
    ReporterContext,
)
from prunekit.contracts import Augmenting, Data, Result, Split
from prunekit.data.batches import eval_batches
from prunekit.data.seeds import seed_all
from prunekit.errors import DataMissingError
from prunekit.report import Closing


def _check_architecture(use: Use[Any], context: ArchitectureContext) -> None:
    seed_all(0)
    model = build(use, context)
    assert isinstance(model, nn.Module), "is not an nn.Module"
    seed_all(0)
    twin = build(use, context)
    assert same(model.state_dict(), twin.state_dict()), "weights do not follow the seed"
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
    before, batches = snapshot(model), tiny_batches()
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
    if verdict := use.component.verdict:
        kept = np.asarray(result.records.get(verdict, ()))
        assert kept.dtype == bool, f"lacks the boolean record {verdict!r}"
    assert result.metrics == results[1].metrics, "not repeatable under one seed"
    for key, record in result.records.items():
        assert len(record) == 2 * BATCH, f"{len(record)} records {key!r}, not one an image"
        assert np.asarray(record).dtype != object, f"records {key!r} are objects"
    assert same(before, model.state_dict()), "changed the network"
    assert not any(m.training for m in model.modules()), "left evaluation mode"


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
    "objective": (ObjectiveContext, training.check_objective),
    "pruner": (PrunerContext, training.check_pruner),
    "architecture": (ArchitectureContext, _check_architecture),
    "dataset": (DatasetContext, _check_dataset),
    "evaluator": (EvaluatorContext, _check_evaluator),
    "optimizer": (Context, training.check_optimizer),
    "schedule": (Context, training.check_schedule),
    "budget": (Context, moving.check_budget),
    "sparsity_schedule": (Context, moving.check_sparsity_schedule),
    "rewirer": (NetworkContext, moving.check_rewirer),
    "wrapper": (NetworkContext, moving.check_wrapper),
    "reporter": (ReporterContext, _check_reporter),
    "backend": (BackendContext, check_backend),
}
"""Kind -> (the context that such a component is built with, what it must do in it)."""
