"""Structures by hand, and what they leave of a network that was pruned under them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from prunekit.contracts import Clock, Loss, Scores
from prunekit.evaluation import eval_mode
from prunekit.graph.groups import find_groups, follow
from prunekit.pruning.layers import find_prunable
from prunekit.pruning.masks import apply_masks, assert_masked
from prunekit.pruning.selection import Selection, select_masks
from prunekit.pruning.structures import fits, keep_n_of_m, score_channels
from prunekit.store.tensors.checkpoint import read_model, write_model
from prunekit.training.masking import LearnedScores, Weights

CLOCK = Clock(0, 10, 0, 2)


def flat(masking):
    return [p for group in masking.parameters() for p in group.parameters]


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


def test_what_a_structure_does_not_suit_stays_dense(make_conv_net):
    net = make_conv_net()
    weights = find_prunable(net)
    groups, dense = find_groups(net, torch.zeros(1, 4, 6, 6), weights)
    assert [group.name for group in groups] == ["0.weight", "3.weight"]
    assert dense == {"7.weight": "the output of the network"}
    assert all(fits(weight, "2:4") for weight in weights.values())
    assert [name for name in weights if fits(weights[name], "1:8")] == ["3.weight"]


@pytest.mark.parametrize(
    ("structure", "budget"),
    [
        *((s, b) for s in ("channel", "element") for b in ("layer", "erk", "lamp", "global")),
        # A ratio is a budget by itself.
        ("2:4", "layer"),
        ("1:4", "layer"),
    ],
)
def test_learned_structures_are_exact_after_finetuning(structure, budget, make_conv_net, choose):
    """Scores learn, the mask is applied, weights train: the structure holds to the last bit."""
    net = make_conv_net()
    x, y = torch.rand(16, 4, 6, 6), torch.randint(3, (16,))
    weights = find_prunable(net)
    groups, dense = find_groups(net, x[:1], weights) if structure == "channel" else ([], {})
    names = [name for name in weights if name not in dense]
    start = {name: 1e-3 * torch.randn_like(weights[name]) for name in names}
    selection = replace(choose(0.5, budget, structure), groups=groups)
    learned = LearnedScores(net, Scores(start, True), selection, {}, "train")
    optimizer = torch.optim.SGD(flat(learned), lr=0.5, momentum=0.9)
    before = {name: part.mask.clone() for name, part in learned.parts.items()}

    def step(variables):
        optimizer.zero_grad()
        with variables.effective(CLOCK):
            logits = net(x)
            Loss(nn.functional.cross_entropy(logits, y), logits).value.backward()
        variables.after_backward()
        optimizer.step()

    for _ in range(20):
        step(learned)
    learned.check()
    assert any(not torch.equal(before[n], part.mask) for n, part in learned.parts.items())
    with learned.effective(CLOCK), eval_mode(net), torch.no_grad():
        expected = net(x)
    scores = learned.scores()
    learned.detach()
    masks = select_masks(scores, selection)
    masks |= follow(masks, groups)
    apply_masks(net, masks)
    # What was learned is what is applied, biases and normalisation of removed channels included.
    with eval_mode(net), torch.no_grad():
        torch.testing.assert_close(net(x), expected, atol=1e-4, rtol=0)

    finetuned = Weights(net, masks)
    optimizer = torch.optim.SGD(flat(finetuned), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(5):
        step(finetuned)
    assert_masked(net, masks)
    named = dict(net.named_parameters())
    for name in names:
        kept = named[name].detach() != 0
        if structure == "channel":
            assert torch.equal(kept.flatten(1).any(1), masks[name].flatten(1).all(1))
            (group,) = (group for group in groups if group.name == name)
            for vector in group.vectors:
                assert not named[vector][~masks[vector]].any()
        elif ":" in structure:
            n, m = map(int, structure.split(":"))
            assert (kept.unflatten(1, (-1, m)).sum(2) <= n).all()
            assert int(masks[name].sum()) * m == n * kept.numel()


def test_a_channel_without_its_shift_is_zero_in_the_next_layer(make_conv_net):
    """Without the vectors a removed channel would still hand on its BN shift."""
    net = make_conv_net().eval()
    groups, _ = find_groups(net, torch.zeros(1, 4, 6, 6), ["0.weight"])
    nn.init.ones_(net[1].bias)
    masks = {"0.weight": torch.zeros(8, 4, 3, 3, dtype=torch.bool)}
    apply_masks(net, {**masks, **follow(masks, groups)})
    assert not net[:3](torch.rand(2, 4, 6, 6)).any()


def test_dead_channels_come_after_negative_scores():
    values = {"w": -torch.rand(10, 4)}
    alive = {"w": torch.ones(10, 4, dtype=torch.bool)}
    alive["w"][:5] = False
    mask = select_masks(Scores(values), Selection(0.5, structure="channel"), alive)["w"]
    assert torch.equal(mask, alive["w"])


@pytest.mark.parametrize("structure", ["channel", "2:4", "element"])
def test_masks_come_back_from_a_file(tmp_path, structure, make_conv_net):
    net = make_conv_net()
    weights = find_prunable(net)
    groups, dense = find_groups(net, torch.zeros(1, 4, 6, 6), weights)
    names = [name for name in weights if structure != "channel" or name not in dense]
    masks = select_masks(
        Scores({n: weights[n].abs() for n in names}), Selection(0.5, structure=structure)
    )
    if structure == "channel":
        masks |= follow(masks, groups)
    apply_masks(net, masks)
    write_model(tmp_path / "model.safetensors", net, masks, {})
    found = read_model(tmp_path / "model.safetensors", make_conv_net())
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
