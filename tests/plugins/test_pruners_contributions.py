"""Movement and FaShapley by hand."""

import copy
from math import exp, log

import pytest
import torch
from prunekit_pruners import FaShapleyOptions, MovementOptions
from prunekit_pruners.contributions import (
    build_fashapley,
    build_movement,
    measure_contributions,
)
from torch import nn

from prunekit import UserError
from prunekit.contexts import PrunerContext
from prunekit.contracts import Loss
from prunekit.pruning.selection import Selection, select_masks
from prunekit.testing import example_context


def make_context(model, *epochs, objective=None):
    """A prune stage whose epochs are the given lists of batches."""
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() > 1}
    left = iter(epochs)
    given = {"model": model.train(), "weights": weights, "batches": lambda: iter(next(left))}
    return example_context(PrunerContext, objective=objective, **given)


def make_linear(*rows):
    model = nn.Linear(len(rows[0]), len(rows), bias=False)
    model.weight.data = torch.tensor(rows)
    return model


TWO = (torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([0, 1]))


@pytest.mark.parametrize(("batches", "times"), [(None, 1), (1, 1), (3, 3)])
def test_movement_by_hand(batches, times):
    """Logits 0: dL/dW = mean of (p - onehot(y)) x^T = ((1/4, 1/4), (-1/4, -1/4)), a batch."""
    context = make_context(make_linear([3.0, -3.0], [3.0, -3.0]), [TWO], [TWO], [TWO])
    scores = build_movement(MovementOptions(batches=batches), context)(context)
    expected = torch.tensor([[-0.75, 0.75], [0.75, -0.75]])  # positive: away from zero
    torch.testing.assert_close(scores.values["weight"], times * expected)
    kept = select_masks(scores, Selection(0.5))["weight"]
    assert kept.tolist() == [[False, True], [True, False]]


def test_fashapley_adds_up_to_what_the_weights_lower_the_loss_by():
    """ln 2 at zero, ln(1 + e^-3) at logits (2, -1) of class 0; they share it 2 : 1."""
    context = make_context(make_linear([2.0], [-1.0]), [(torch.ones(1, 1), torch.tensor([0]))])
    scores = build_fashapley(FaShapleyOptions(steps=2000, batches=1), context)(context)
    gained = log(2) - log(1 + exp(-3))
    expected = torch.tensor([[gained * 2 / 3], [gained / 3]])
    torch.testing.assert_close(scores.values["weight"], expected, atol=1e-3, rtol=0)


def test_fashapley_takes_the_objective_at_its_end_at_scaled_weights():
    """L = |W|^2 / 2 has dL/d(t W) = t W: at t = 1/2 and 1 the mean is 3/4 W. Its size counts."""
    model, clocks = make_linear([2.0, -4.0]), []

    def objective(x, y, clock):
        ramp = 5 * clock.steps / clock.epochs  # five epochs, in steps
        clocks.append((clock.fraction, min(1, clock.step / ramp)))
        return Loss(model.weight.square().sum() / 2, model(x))

    context = make_context(model, [TWO], objective=objective)
    scores = build_fashapley(FaShapleyOptions(steps=2, batches=1), context)(context)
    torch.testing.assert_close(scores.values["weight"], torch.tensor([[3.0, 12.0]]))
    assert clocks == [(1, 1), (1, 1)]


@pytest.mark.parametrize("fails", [False, True])
def test_they_leave_the_network_as_it_was(fails):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))

    def objective(x, y, clock):
        logits = model(x)
        if fails:
            raise UserError("no")
        return Loss(nn.functional.cross_entropy(logits, y), logits)

    before = copy.deepcopy(model.state_dict())
    batch = (torch.rand(5, 3), torch.tensor([0, 1, 1, 0, 1]))
    context = make_context(model, [batch], objective=objective)
    if fails:
        with pytest.raises(UserError):
            measure_contributions(context, [0.5, 1.0], None)
    else:
        assert all(v.any() for v in measure_contributions(context, [0.5, 1.0], None).values())
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
