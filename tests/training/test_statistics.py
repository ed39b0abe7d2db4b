"""Statistics of batch normalization: what they are, and that measuring them leaves no trace."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from prunekit.catalog.component import Use
from prunekit.catalog.registry import load_registry
from prunekit.contexts import ObjectiveContext
from prunekit.contracts import Clock, Threat
from prunekit.data.batches import Arrays, Feed
from prunekit.testing import example_context
from prunekit.training.statistics import recalibrate, recalibrated

OBJECTIVES = {
    entry.component.name: entry.component
    for entry in load_registry().entries
    if entry.component.kind == "objective"
}


def test_they_are_the_average_over_batches():
    """Means 1 and 5; one that trains nothing keeps what it has, and dropout lets all through."""
    norm, still = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    still.requires_grad_(False)
    model = nn.Sequential(nn.Dropout(0.9), norm, still)
    batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [7.0]])]
    recalibrate(model, (partial(model, x) for x in batches))
    assert (norm.running_mean.item(), norm.running_var.item()) == (3, 5)
    assert (still.running_mean.item(), still.running_var.item()) == (0, 1)
    assert norm.momentum == 0.1
    assert all(module.training for module in model.modules())


class Asking:
    """An average that is only asked for batches."""

    after_step = judged = staticmethod(nullcontext)
    batches = staticmethod(lambda clock: 2)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_under_every_objective_they_are_measured_without_a_trace(name):
    component = OBJECTIVES[name]
    context = example_context(ObjectiveContext)
    model = context.model.train()
    objective = Use(component, component.options(), threat=Threat("linf", 0.1)).build(context)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (16, 1, 8, 8), generator=draw, dtype=torch.uint8)
    part = Arrays(images, torch.arange(16) % 3)
    feed = Feed(part, part, 8, torch.device("cpu"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with recalibrated(model, objective, feed, Clock(9, 10, 4, 5), (0, 0), [Asking()]):
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
        assert int(model[1].num_batches_tracked) in (2, 4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
