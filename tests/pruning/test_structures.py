"""Budgets and structures by hand, and what they leave of a network that was pruned under them."""

import pytest
import torch
from torch import nn

from prunekit.contracts import Loss, Scores
from prunekit.errors import RunError
from prunekit.evaluation import eval_mode
from prunekit.pruning.budgets import lamp, share_out, spread_erk
from prunekit.pruning.layers import find_prunable
from prunekit.pruning.learning import LearnedScores
from prunekit.pruning.masks import apply_masks, assert_masked
from prunekit.pruning.selection import Selection, select_masks
from prunekit.pruning.structures import (
    find_followers,
    find_structured,
    follow,
    keep_n_of_m,
    score_channels,
)
from prunekit.store.checkpoint import read_model, write_model
from prunekit.training.variables import Weights


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def test_lamp_by_hand():
    """Squares 9, 1, 4: 9 / 9, 1 / 14, 4 / 13."""
    scores = lamp(torch.tensor([[3.0, 1.0], [2.0, 0.0]]))
    expected = torch.tensor([[1.0, 1 / 14], [4 / 13, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(scores, expected)


def test_lamp_keeps_the_largest_weight_of_every_layer():
    values = {"small": torch.rand(20) * 1e-3, "large": torch.rand(20)}
    masks = select_masks(Scores(values), Selection(0.95, "lamp"))
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


def test_erk_of_convolutions_counts_the_kernel():
    """(8, 4, 3, 3): (8 + 4 + 3 + 3) / 288; (16, 8, 3, 3): 30 / 1152; c = 0.1 * 1440 / 48 = 3."""
    shapes = {"a": torch.Size((8, 4, 3, 3)), "b": torch.Size((16, 8, 3, 3))}
    densities = spread_erk(shapes, 0.1)
    assert densities == {"a": pytest.approx(3 * 18 / 288), "b": pytest.approx(3 * 30 / 1152)}


@pytest.mark.parametrize("budget", ["global", "erk", "lamp"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.97])
def test_the_total_is_exact_under_every_budget(budget, sparsity):
    torch.manual_seed(1)
    values = {n: torch.rand_like(w) for n, w in find_prunable(make_net()).items()}
    masks = select_masks(Scores(values, layerwise=True), Selection(sparsity, budget))
    total = sum(v.numel() for v in values.values())
    assert sum(int(m.sum()) for m in masks.values()) == total - int(sparsity * total)


def test_n_of_m_by_hand():
    values = torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0, 9.0, 8.0, 7.0]])
    expected = torch.tensor([[1, 0, 1, 0, 0, 1, 1, 0]], dtype=torch.bool)
    assert torch.equal(keep_n_of_m(values, 2, 4), expected)


def test_n_of_m_groups_the_inputs_of_a_kernel_position():
    values = torch.rand(3, 8, 2, 2)
    mask = keep_n_of_m(values, 1, 4)
    assert torch.equal(mask[:, :4].sum(1), torch.ones(3, 2, 2, dtype=torch.int64))
    assert torch.equal(mask[:, 4:].sum(1), torch.ones(3, 2, 2, dtype=torch.int64))
    best = values[1, 4:, 0, 1].argmax()
    assert mask[1, 4 + best, 0, 1]


def test_channels_are_scored_by_their_mean():
    assert score_channels(torch.tensor([[[1.0, 3.0]], [[0.0, 1.0]]])).tolist() == [2.0, 0.5]


def test_channels_removed_are_rounded_down():
    """int(0.55 * 7) = 3 of 7 channels go."""
    masks = select_masks(
        Scores({"w": torch.rand(7, 2, 3, 3)}), Selection(0.55, structure="channel")
    )
    channels = masks["w"].flatten(1)
    assert torch.equal(channels.all(1), channels.any(1))
    assert int(channels.any(1).sum()) == 4


def test_followers_are_found_by_a_forward():
    net = make_net().eval()
    assert find_followers(net, torch.zeros(1, 4, 6, 6)) == {
        "0.weight": ["1.weight", "1.bias"],
        "3.weight": ["3.bias"],
        "7.weight": ["7.bias"],
    }


def test_what_a_structure_does_not_suit_stays_dense():
    weights = find_prunable(make_net())
    assert find_structured(weights, "channel", list(weights)) == ["0.weight", "3.weight"]
    assert find_structured(weights, "2:4", []) == ["0.weight", "3.weight", "7.weight"]
    assert find_structured(weights, "1:8", []) == ["3.weight"]


@pytest.mark.parametrize(
    ("structure", "budget"),
    [
        *((s, b) for s in ("channel", "element") for b in ("layer", "erk", "lamp", "global")),
        # A ratio is a budget by itself.
        ("2:4", "layer"),
        ("1:4", "layer"),
    ],
)
def test_learned_structures_are_exact_after_finetuning(structure, budget):
    """Scores learn, the mask is applied, weights train: the structure holds to the last bit."""
    net = make_net()
    x, y = torch.rand(16, 4, 6, 6), torch.randint(3, (16,))
    weights = find_prunable(net)
    followers = find_followers(net.eval(), x[:1]) if structure == "channel" else {}
    names = find_structured(weights, structure, list(weights))
    followers = {name: vectors for name, vectors in followers.items() if name in names}
    start = {name: 1e-3 * torch.randn_like(weights[name]) for name in names}
    selection = Selection(0.5, budget, structure)
    learned = LearnedScores(net, Scores(start, True), selection, {}, "train", followers)
    optimizer = torch.optim.SGD(learned.parameters(), lr=0.5, momentum=0.9)
    before = {name: part.mask.clone() for name, part in learned.parts.items()}

    def step(variables):
        optimizer.zero_grad()
        with variables.effective():
            logits = net(x)
            Loss(nn.functional.cross_entropy(logits, y), logits).value.backward()
        variables.after_backward()
        optimizer.step()

    for _ in range(20):
        step(learned)
    learned.refresh()
    assert any(not torch.equal(before[n], part.mask) for n, part in learned.parts.items())
    with learned.effective(), eval_mode(net), torch.no_grad():
        expected = net(x)
    scores = learned.scores()
    learned.detach()
    masks = select_masks(scores, selection)
    masks |= follow(masks, followers)
    apply_masks(net, masks)
    # What was learned is what is applied, biases and normalisation of removed channels included.
    with eval_mode(net), torch.no_grad():
        torch.testing.assert_close(net(x), expected, atol=1e-4, rtol=0)

    finetuned = Weights(net, masks)
    optimizer = torch.optim.SGD(finetuned.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(5):
        step(finetuned)
    assert_masked(net, masks)
    named = dict(net.named_parameters())
    for name in names:
        kept = named[name].detach() != 0
        if structure == "channel":
            assert torch.equal(kept.flatten(1).any(1), masks[name].flatten(1).all(1))
            for vector in followers[name]:
                assert not named[vector][~masks[vector]].any()
        elif ":" in structure:
            n, m = map(int, structure.split(":"))
            assert (kept.unflatten(1, (-1, m)).sum(2) <= n).all()
            assert int(masks[name].sum()) * m == n * kept.numel()


def test_a_channel_without_its_shift_is_zero_in_the_next_layer():
    """Without the followers a removed channel would still hand on its BN shift."""
    net = make_net().eval()
    followers = find_followers(net, torch.zeros(1, 4, 6, 6))
    nn.init.ones_(net[1].bias)
    masks = {"0.weight": torch.zeros(8, 4, 3, 3, dtype=torch.bool)}
    apply_masks(net, {**masks, **follow(masks, followers)})
    assert not net[:3](torch.rand(2, 4, 6, 6)).any()


def test_a_removed_channel_gets_a_gradient_behind_normalisation_and_relu():
    """Else no removed channel could come back, and learning channels would be magnitude pruning."""
    net = make_net()
    x, y = torch.rand(16, 4, 6, 6), torch.randint(3, (16,))
    followers = find_followers(net.eval(), x[:1])
    start = {"0.weight": dict(net.named_parameters())["0.weight"].detach().clone()}
    selection = Selection(0.5, structure="channel")
    learned = LearnedScores(net, Scores(start), selection, {}, "train", followers)
    with learned.effective():
        nn.functional.cross_entropy(net(x), y).backward()
    part = learned.parts["0.weight"]
    removed = ~part.mask.flatten(1).any(1)
    assert int(removed.sum()) == 4
    gradient = part.score.grad[removed].flatten(1)
    assert (gradient.abs().sum(1) > 1e-7).all()
    # Within a channel it is dL/dm sign(s) / n: of one size, with the signs of the scores.
    size = gradient.abs()
    torch.testing.assert_close(size, size[:, :1].expand_as(size))


def test_gate_gradients_by_hand():
    """L = sum of 3 y over 2 images, y = z m: dL/dm = 3 * (sum of z), shared by n = 2 scores."""
    layer = nn.Linear(2, 2, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    scores = Scores({"0.weight": torch.tensor([[2.0, -2.0], [1.0, 0.5]])})
    net = nn.Sequential(layer)
    selection = Selection(0.5, structure="channel")
    learned = LearnedScores(net, scores, selection, {}, "train", {"0.weight": []})
    x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])  # z = 3 and 1 in both channels
    with learned.effective():
        out = net(x)
        (3 * out).sum().backward()
    torch.testing.assert_close(out, torch.tensor([[3.0, 3e-6], [1.0, 1e-6]]))
    expected = torch.tensor([[6.0, -6.0], [6.0, 6.0]])
    torch.testing.assert_close(learned.parts["0.weight"].score.grad, expected)
    learned.detach()
    assert list(net.state_dict()) == ["0.weight"]
    assert torch.equal(net(x), torch.tensor([[3.0, 3.0], [1.0, 1.0]]))


@pytest.mark.parametrize("budget", ["layer", "global", "erk", "lamp"])
@pytest.mark.parametrize("structure", ["element", "channel"])
def test_what_is_gone_stays_gone_and_the_rest_is_chosen_among(budget, structure):
    torch.manual_seed(2)
    values = {n: torch.rand_like(w) for n, w in find_prunable(make_net()).items()}
    first = select_masks(Scores(values), Selection(0.5, budget, structure))
    again = select_masks(Scores(values), Selection(0.75, budget, structure), first)
    fresh = select_masks(Scores(values), Selection(0.75, budget, structure))
    for name, mask in again.items():
        assert not (mask & ~first[name]).any()
        # The same scores in the same order: the highest quarter is within the highest half.
        assert int(mask.sum()) == int(fresh[name].sum()) or budget != "layer"
    assert sum(int(m.sum()) for m in again.values()) == sum(int(m.sum()) for m in fresh.values())


def test_dead_channels_come_after_negative_scores():
    values = {"w": -torch.rand(10, 4)}
    alive = {"w": torch.ones(10, 4, dtype=torch.bool)}
    alive["w"][:5] = False
    mask = select_masks(Scores(values), Selection(0.5, structure="channel"), alive)["w"]
    assert torch.equal(mask, alive["w"])


def test_lamp_refuses_scores_whose_squares_mislead():
    with pytest.raises(RunError, match="lamp"):
        select_masks(Scores({"w": torch.tensor([1.0, -2.0])}), Selection(0.5, "lamp"))


@pytest.mark.parametrize("structure", ["channel", "2:4", "element"])
def test_masks_come_back_from_a_file(tmp_path, structure):
    net = make_net()
    weights = find_prunable(net)
    followers = find_followers(net.eval(), torch.zeros(1, 4, 6, 6))
    names = find_structured(weights, structure, list(followers))
    masks = select_masks(
        Scores({n: weights[n].abs() for n in names}), Selection(0.5, "layer", structure)
    )
    if structure == "channel":
        masks |= follow(masks, followers)
    apply_masks(net, masks)
    write_model(tmp_path / "model.safetensors", net, masks, {})
    found = read_model(tmp_path / "model.safetensors", make_net())
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
