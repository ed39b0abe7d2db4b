"""Masks applied, counted and told apart."""

import pytest
import torch
from torch import nn

from prunekit.errors import RunError, UserError
from prunekit.pruning.masks import (
    State,
    apply_masks,
    assert_masked,
    count_weights,
    find_broken,
    find_zeros,
    hash_masks,
    measure_sparsity,
    take_zeros,
)


def test_apply_count_and_hash():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    net[0].weight.data.copy_(torch.tensor([[-1.0, 2.0], [float("inf"), float("nan")]]))
    masks = {"0.weight": torch.tensor([[False, True], [False, False]])}
    with pytest.raises(RunError, match=r"0\.weight are not zero"):
        assert_masked(net, masks)
    apply_masks(net, masks)
    assert_masked(net, masks)
    assert net[0].weight.tolist() == [[0.0, 2.0], [0.0, 0.0]]
    assert not net[0].weight.signbit().any()  # no -0.0
    counts = count_weights(net, masks)
    assert counts == {
        "0.weight": {"kept": 1, "weights": 4},
        "1.weight": {"kept": 6, "weights": 6},
    }
    assert measure_sparsity(counts) == pytest.approx(0.3)
    same = {"0.weight": masks["0.weight"].clone()}
    assert hash_masks(masks) == hash_masks(same)
    same["0.weight"][0, 0] = True
    assert hash_masks(masks) != hash_masks(same)
    assert hash_masks(masks) != hash_masks({"other": masks["0.weight"]})


@pytest.mark.parametrize(
    ("name", "mask", "words"),
    [
        ("zz", torch.ones(2, 3, dtype=torch.bool), "is of no parameter"),
        ("0.weight", torch.ones(3, 2, dtype=torch.bool), "give booleans of the weight's shape"),
        ("0.weight", torch.ones(2, 3), "give booleans of the weight's shape"),
    ],
)
def test_masks_that_do_not_fit_change_nothing(name, mask, words):
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    good = torch.zeros(2, 2, dtype=torch.bool)
    with pytest.raises(UserError, match=words):
        apply_masks(net, {"1.weight": good, name: mask})
    assert all(torch.equal(before[n], p) for n, p in net.named_parameters())


@pytest.mark.parametrize(
    ("zeros", "trained", "kept", "words"),
    [
        ({"0.weight": 60}, False, {"0.weight": 40}, "54.5% of its weights are zero: taken"),
        ({"0.weight": 60}, True, {}, "54.5% of its weights are zero: pretrain trains them"),
        # As a whole, beside others that are zero in part; alone, it is a start like any other.
        ({"0.weight": 60, "1.weight": 10}, False, {"0.weight": 40, "1.weight": 0}, "of 1.weight"),
        ({"1.weight": 10}, False, {}, ""),
        ({"0.weight": 1}, False, {}, ""),
        ({"1.weight": 1}, False, {}, ""),
        ({}, False, {}, ""),
    ],
)
def test_zeros_of_a_network_without_masks(zeros, trained, kept, words):
    net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 1))
    for name, n in zeros.items():
        net.get_parameter(name).data.view(-1)[:n] = 0
    state = State(net)
    take_zeros(state, trained=trained)
    assert {name: int(mask.sum()) for name, mask in state.masks.items()} == kept
    assert words in " ".join(state.notes)
    assert bool(state.notes) is bool(words)


def test_zeros_count_in_a_layer_and_in_all():
    """10,000 weights and 100: 34 zeros are 0.3 % of all, and 110 are 1.1 %."""
    net = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 1))
    weights = {"0.weight": net[0].weight.data, "1.weight": net[1].weight.data}
    weights["0.weight"].view(-1)[:1] = 0
    weights["1.weight"].view(-1)[:33] = 0
    assert {name: int(mask.sum()) for name, mask in find_zeros(weights).items()} == {"1.weight": 67}
    weights["0.weight"].view(-1)[:77] = 0
    found = {name: int(mask.sum()) for name, mask in find_zeros(weights).items()}
    assert found == {"0.weight": 9923, "1.weight": 67}


@pytest.mark.parametrize(
    ("name", "values", "broken"),
    [
        ("weight", [3e38, 3e38], False),  # their sum is infinity
        ("weight", [torch.inf, -torch.inf], True),
        ("weight", [1.0, -torch.inf], True),
        ("hidden", [0.0, -torch.inf], False),  # as masks of attention
        ("hidden", [torch.inf, -torch.inf], True),
    ],
)
def test_what_cannot_be_computed_with_is_named(name, values, broken):
    net = nn.Linear(2, 1)
    net.register_buffer("hidden", torch.zeros(1, 2))
    getattr(net, name).data.copy_(torch.tensor([values]))
    assert find_broken(net) == (f"NaN or infinity in {name}" if broken else "")
