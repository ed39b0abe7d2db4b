"""Fractions, their intervals, and what unbalanced classes do to them."""

import numpy as np
import pytest
import torch
from torch import nn

from prunekit.evaluation import (
    Z95,
    balance,
    balanced_proportion,
    eval_mode,
    frozen,
    is_unbalanced,
    proportion,
    wilson,
)


def test_wilson_of_eight_in_ten():
    # Newcombe 1998, table I: 0.490 to 0.943.
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)


@pytest.mark.parametrize(("count", "bound"), [(0, 0.0), (10, 1.0)])
def test_wilson_stays_inside(count, bound):
    assert bound in [pytest.approx(end) for end in wilson(count, 10)]
    assert proportion(np.arange(10) < count) == bound


def test_a_class_of_one_and_a_half_times_another_unbalances():
    assert not is_unbalanced(np.array([0, 0, 1, 1, 1, 1][1:]) // 2)  # one class alone
    assert is_unbalanced(np.array([0, 0, 1, 1, 1]))
    assert not is_unbalanced(np.array([0, 0, 0, 1, 1, 1, 1]))


def test_a_constant_answer_scores_one_class_in_the_balanced_mean():
    labels = np.array([0] * 6 + [1] * 3 + [2])
    mean, error = balance(labels == 0, labels)
    assert mean == pytest.approx(1 / 3)
    # Wilson's centres of 6 of 6, 0 of 3 and 0 of 1, by hand.
    half = Z95**2 / 2
    centres = [(6 + half) / (6 + 2 * half), half / (3 + 2 * half), half / (1 + 2 * half)]
    variances = [p * (1 - p) / n for p, n in zip(centres, (6, 3, 1), strict=True)]
    assert error == pytest.approx(np.sqrt(sum(variances)) / 3)
    told = balanced_proportion(labels == 0, labels)
    assert told == mean
    assert told.low == max(0, mean - Z95 * error)
    assert told.high == mean + Z95 * error


def test_the_balanced_interval_covers():
    """Of 2,000 draws, 95 % of the intervals hold the truth (2 % more or less)."""
    draw = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [200, 80, 40])
    chances = np.array([0.9, 0.5, 0.3])
    inside = 0
    for _ in range(2000):
        told = balanced_proportion(draw.random(320) < chances[labels], labels)
        inside += told.low <= chances.mean() <= told.high
    assert inside / 2000 == pytest.approx(0.95, abs=0.02)


def test_a_frozen_network_is_a_function_of_pixels(make_normed_net):
    net = make_normed_net().train()
    net[1].eval()
    net[4].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.rand(4, 6, requires_grad=True)
    with frozen(net) as network:
        network(x).sum().backward()
        assert not any(m.training for m in net.modules())
    assert x.grad is not None
    assert all(p.grad is None for p in net.parameters())
    assert [m.training for m in (net, net[0], net[1], net[3])] == [True, True, False, True]
    assert [p.requires_grad for p in net[4].parameters()] == [False, True]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_frozen_network_that_makes_its_weights_stays_what_it_is():
    """Spectral normalization moves its buffers whenever it is read in training mode."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.rand(2, 4)
    with eval_mode(net):
        expected = net(x)
    for _ in range(2):
        with frozen(net) as network:
            assert torch.equal(network(x), expected)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
