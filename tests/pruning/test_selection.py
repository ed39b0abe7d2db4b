"""Scores -> masks: counts, ties and what layers share."""

import pytest
import torch

from prunekit.contracts import Scores
from prunekit.errors import RunError
from prunekit.pruning import selection as module
from prunekit.pruning.budgets import count_kept
from prunekit.pruning.selection import Selection, check_layers, meets, select_masks

INFINITY = float("inf")


@pytest.mark.parametrize(
    ("n", "sparsity", "kept"),
    [
        *((1000, 0.9, 100), (10, 0.7, 3), (10, 0.1, 9), (9, 0.999, 1), (7, 0.5, 4), (10, 0.01, 10)),
        # Where a product of floats falls short of a whole number.
        *((90, 0.7, 27), (100, 0.29, 71), (100, 0.57, 43), (1000, 0.017, 983), (35, 0.6, 14)),
    ],
)
def test_recipes_keep_n_minus_the_rounded_down(n, sparsity, kept):
    """k = 0.1 of 1000 keeps 100, k = 0.3 of 10 keeps 3, k = 0.9 of 10 keeps 9."""
    assert count_kept(n, sparsity) == kept
    torch.manual_seed(n)
    mask = select_masks(Scores({"w": torch.rand(n)}), Selection(sparsity))["w"]
    assert (mask.dtype, int(mask.sum())) == (torch.bool, kept)


def test_the_largest_are_kept():
    scores = Scores({"w": torch.tensor([[0.3, 0.0, 0.1], [0.9, 0.5, 0.2]])})
    expected = torch.tensor([[True, False, False], [True, True, False]])
    assert torch.equal(select_masks(scores, Selection(0.5))["w"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sparsity", [0.0005, 0.1, 0.5, 0.9, 0.9995])
@pytest.mark.parametrize("signed", [False, True])
def test_selection_agrees_with_sorting(dtype, sparsity, signed):
    torch.manual_seed(0)
    values = torch.randn(4096, dtype=dtype) * torch.randn(4096, dtype=dtype).exp()
    values = values if signed else values.abs()
    kept = count_kept(4096, sparsity)
    expected = torch.zeros(4096, dtype=torch.bool)
    expected[values.argsort(descending=True)[:kept]] = True
    assert torch.equal(select_masks(Scores({"w": values}), Selection(sparsity))["w"], expected)


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(1000),
        torch.full((1000,), -1.0),
        torch.arange(10.0).repeat(100),
        torch.full((1000,), 1.0) + torch.arange(1000) % 2 * 2**-23,  # neighbours in float32
        torch.tensor([-INFINITY] * 990 + [INFINITY] * 5 + [0.0] * 5),
        torch.tensor([-0.0, 0.0] * 500),
    ],
    ids=["zeros", "equal", "ten levels", "neighbours", "infinite", "signed zeros"],
)
@pytest.mark.parametrize("sparsity", [0.001, 0.25, 0.995])
def test_ties_keep_the_exact_count_and_nothing_smaller(values, sparsity):
    mask = select_masks(Scores({"w": values}), Selection(sparsity))["w"]
    assert int(mask.sum()) == count_kept(1000, sparsity)
    assert values[mask].min() >= values[~mask].max()
    assert torch.equal(mask, select_masks(Scores({"w": values.clone()}), Selection(sparsity))["w"])


@pytest.mark.parametrize("misleading", [1e30, 1e-30, -1e30])
def test_a_sample_that_misleads_changes_no_mask(misleading):
    torch.manual_seed(0)
    values = torch.rand(5000)
    values[:: module.STRIDE] = misleading
    expected = torch.zeros(5000, dtype=torch.bool)
    expected[values.argsort(descending=True)[:500]] = True
    assert torch.equal(module.keep_top(values, 500), expected)


def test_nothing_removed(choose):
    assert select_masks(Scores({"w": torch.rand(10)}), Selection(0.05))["w"].all()
    assert select_masks(Scores({"w": torch.rand(10)}), choose(0.05, "global"))["w"].all()


@pytest.mark.parametrize("kept", [-1, 11])
def test_a_budget_that_keeps_what_is_not_there_is_refused(kept):
    with pytest.raises(RunError, match=f"w cannot keep {kept} of 10"):
        select_masks(Scores({"w": torch.rand(10)}), Selection(0.5, lambda layers: {"w": kept}))


def test_counts_of_the_scores_replace_the_budget():
    values = {"a": torch.arange(10.0), "b": torch.arange(10.0)}
    scores = Scores(values, keep={"a": 1, "b": 9})
    masks = select_masks(scores, Selection(0.5))
    assert masks["a"].nonzero().flatten().tolist() == [9]
    assert masks["b"].nonzero().flatten().tolist() == list(range(1, 10))
    assert meets(scores, Selection(0.5))
    assert not meets(scores, Selection(0.6))


def test_counts_of_channels():
    """Channel means 0.5, 2.5, 4.5 of a, and of b: one and two of them."""
    values = {n: torch.arange(6.0).view(3, 2) for n in "ab"}
    scores = Scores(values, keep={"a": 1, "b": 2})
    selection = Selection(0.5, structure="channel")
    masks = select_masks(scores, selection)
    assert masks["a"].tolist() == [[False, False], [False, False], [True, True]]
    assert masks["b"].tolist() == [[False, False], [True, True], [True, True]]
    assert meets(scores, selection)


def test_layer_budget_takes_the_same_fraction_of_each():
    masks = select_masks(
        Scores({"a": torch.arange(10.0), "b": torch.arange(20.0) + 100}), Selection(0.8)
    )
    assert {name: int(m.sum()) for name, m in masks.items()} == {"a": 2, "b": 4}


def test_global_budget_lets_layers_compete(choose):
    values = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([10.0, 0.5, 20.0, 30.0])}
    masks = select_masks(Scores(values), choose(0.5, "global"))
    assert masks["a"].tolist() == [False, False, False, True]
    assert masks["b"].tolist() == [True, False, True, True]


def test_global_budget_divides_layerwise_scores_by_their_rms(choose):
    """RMS: a = sqrt(50 / 2) = 5 -> 0.2, 1.4; b = sqrt(5e4 / 2) = 158.1 -> 0.632, 1.265."""
    values = {"a": torch.tensor([1.0, 7.0]), "b": torch.tensor([100.0, 200.0])}
    plain = select_masks(Scores(values), choose(0.5, "global"))
    assert plain["b"].tolist() == [True, True]
    masks = select_masks(Scores(values, layerwise=True), choose(0.5, "global"))
    assert masks["a"].tolist() == [False, True]
    assert masks["b"].tolist() == [False, True]


def test_the_rms_is_that_of_the_weights_still_alive(choose):
    """Dead, the 100 of a does not count: a -> 1, b -> 0.63, 1.26."""
    values = {"a": torch.tensor([100.0, 1.0]), "b": torch.tensor([1.0, 2.0])}
    alive = {"a": torch.tensor([False, True])}
    masks = select_masks(Scores(values, layerwise=True), choose(0.5, "global"), alive)
    assert masks["a"].tolist() == [False, True]
    assert masks["b"].tolist() == [False, True]


def test_a_layer_of_zeros_does_not_spoil_the_global_budget(choose):
    values = {"a": torch.zeros(4), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    masks = select_masks(Scores(values, layerwise=True), choose(0.5, "global"))
    assert (int(masks["a"].sum()), int(masks["b"].sum())) == (0, 4)


@pytest.mark.parametrize("budget", ["layer", "global"])
def test_pruned_weights_stay_pruned(budget, choose):
    values = {"a": torch.tensor([9.0, 8.0, 1.0, 2.0, 3.0, 4.0])}
    alive = {"a": torch.tensor([False, False, True, True, True, True])}
    mask = select_masks(Scores(values), choose(0.5, budget), alive)["a"]
    assert mask.tolist() == [False, False, False, True, True, True]
    # Asked for more than is alive: nothing comes back to life.
    assert torch.equal(select_masks(Scores(values), choose(0.1, budget), alive)["a"], alive["a"])


def test_a_layer_that_keeps_nothing_is_named(choose):
    masks = select_masks(
        Scores({"a": torch.zeros(4), "b.weight": torch.ones(4)}), choose(0.5, "global")
    )
    with pytest.raises(RunError, match=r"no weight of a \(4 weights\).*exclude = \[\"a\"\]"):
        check_layers(masks, 0.5)
    check_layers({"b.weight": masks["b.weight"]}, 0.5)


def test_selection_never_sorts(monkeypatch, choose):
    def refuse(*_, **__):
        raise AssertionError("sorted")

    monkeypatch.setattr(module.torch, "sort", refuse)
    monkeypatch.setattr(module.torch, "argsort", refuse)
    monkeypatch.setattr(torch.Tensor, "sort", refuse)
    monkeypatch.setattr(torch.Tensor, "argsort", refuse)
    select_masks(Scores({"w": torch.rand(100)}), choose(0.5, "global"))
