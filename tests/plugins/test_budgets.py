"""Budgets by hand, and their totals."""

import pytest
import torch
from prunekit_budgets.budgets import lamp, spread_erk, spread_igq
from torch import nn

from prunekit.contracts import Scores
from prunekit.errors import RunError
from prunekit.pruning.budgets import share_out
from prunekit.pruning.layers import find_prunable
from prunekit.pruning.selection import select_masks


@pytest.fixture
def make_conv_net():
    """A convolution and two layers behind it, of unequal sizes."""

    def make():
        return nn.Sequential(
            nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(12, 3)
        )

    return make


def test_lamp_by_hand():
    """Squares 9, 1, 4: 9 / 9, 1 / 14, 4 / 13."""
    scores = lamp(torch.tensor([[3.0, 1.0], [2.0, 0.0]]))
    expected = torch.tensor([[1.0, 1 / 14], [4 / 13, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(scores, expected)


def test_lamp_keeps_the_largest_weight_of_every_layer(choose):
    values = {"small": torch.rand(20) * 1e-3, "large": torch.rand(20)}
    masks = select_masks(Scores(values), choose(0.95, "lamp"))
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"small": 1, "large": 1}
    for name, mask in masks.items():
        assert mask[values[name].argmax()]


def test_erk_by_hand():
    """Shapes (2, 2) and (10, 10): raw 4 / 4 = 1 and 20 / 100 = 0.2; half of 104 is 52.

    c (4 + 20) = 52 makes the first denser than 1, so it is dense, and c 20 = 48: 0.48.
    """
    shapes = {"a": torch.Size((2, 2)), "b": torch.Size((10, 10))}
    densities = spread_erk(shapes, 0.5)
    assert densities == {"a": 1.0, "b": pytest.approx(0.48)}
    assert share_out(densities, {"a": 4, "b": 100}, 52) == {"a": 4, "b": 48}


@pytest.mark.parametrize(
    ("densities", "total", "expected"),
    [
        ({"a": 0.05, "b": 0.05}, 8, {"a": 4, "b": 4}),  # eight times as dense
        ({"a": 1.0, "b": 1.0}, 3, {"a": 2, "b": 1}),
        ({"a": 0.9, "b": 0.1}, 16, {"a": 10, "b": 6}),  # 14.4 and 1.6: a is full, b has the rest
        ({"a": 0.0, "b": 0.5}, 7, {"a": 0, "b": 7}),
        ({"a": 0.34, "b": 0.36}, 7, {"a": 3, "b": 4}),
    ],
)
def test_shares_sum_to_the_total(densities, total, expected):
    assert share_out(densities, {"a": 10, "b": 10}, total) == expected


@pytest.mark.parametrize(("densities", "total"), [((0.0, 0.0), 8), ((0.0, 1.0), 15), ((1, 1), 21)])
def test_a_total_out_of_reach_is_told(densities, total):
    with pytest.raises(ValueError, match=f"do not reach {total}"):
        share_out(dict(zip("ab", densities, strict=True)), {"a": 10, "b": 10}, total)


def test_erk_of_convolutions_counts_the_kernel():
    """(8, 4, 3, 3): (8 + 4 + 3 + 3) / 288; (16, 8, 3, 3): 30 / 1152; c = 0.1 * 1440 / 48 = 3."""
    shapes = {"a": torch.Size((8, 4, 3, 3)), "b": torch.Size((16, 8, 3, 3))}
    densities = spread_erk(shapes, 0.1)
    assert densities == {"a": pytest.approx(3 * 18 / 288), "b": pytest.approx(3 * 30 / 1152)}


def test_igq_by_hand():
    """With f = 0.1, 10 and 90 weights keep 10 / 2 = 5 and 90 / 10 = 9; with f = 0, all."""
    sizes = {"a": 10, "b": 90}
    assert spread_igq(sizes, 14) == {"a": pytest.approx(0.5), "b": pytest.approx(0.1)}
    assert spread_igq(sizes, 100) == {"a": pytest.approx(1), "b": pytest.approx(1)}
    assert share_out(spread_igq(sizes, 14), sizes, 14) == {"a": 5, "b": 9}


@pytest.mark.parametrize("budget", ["global", "erk", "igq", "lamp"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.97])
def test_the_total_is_exact_under_every_budget(budget, sparsity, make_conv_net, choose):
    torch.manual_seed(1)
    values = {n: torch.rand_like(w) for n, w in find_prunable(make_conv_net()).items()}
    masks = select_masks(Scores(values, layerwise=True), choose(sparsity, budget))
    total = sum(v.numel() for v in values.values())
    assert sum(int(m.sum()) for m in masks.values()) == total - int(sparsity * total)


@pytest.mark.parametrize("budget", ["layer", "global", "erk", "igq", "lamp"])
@pytest.mark.parametrize("structure", ["element", "channel"])
def test_what_is_gone_stays_gone_and_the_rest_is_chosen_among(
    budget, structure, make_conv_net, choose
):
    torch.manual_seed(2)
    values = {n: torch.rand_like(w) for n, w in find_prunable(make_conv_net()).items()}
    first = select_masks(Scores(values), choose(0.5, budget, structure))
    again = select_masks(Scores(values), choose(0.75, budget, structure), first)
    fresh = select_masks(Scores(values), choose(0.75, budget, structure))
    for name, mask in again.items():
        assert not (mask & ~first[name]).any()
        # The same scores in the same order: the highest quarter is within the highest half.
        assert int(mask.sum()) == int(fresh[name].sum()) or budget != "layer"
    assert sum(int(m.sum()) for m in again.values()) == sum(int(m.sum()) for m in fresh.values())


def test_lamp_refuses_scores_whose_squares_mislead(choose):
    with pytest.raises(RunError, match="lamp"):
        select_masks(Scores({"w": torch.tensor([1.0, -2.0])}), choose(0.5, "lamp"))
