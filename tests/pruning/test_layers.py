"""Which weights can be pruned, and by what name."""

import re
from collections import OrderedDict

import pytest
import torch
from torch import nn

from prunekit.errors import RunError
from prunekit.pruning.layers import find_prunable, find_unprunable, watch_network
from prunekit.pruning.masks import (
    apply_masks,
    count_weights,
)


class StdConv2d(nn.Conv2d):
    pass


def test_prunable_are_convolutions_and_linear_layers():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), StdConv2d(2, 2, 1), nn.Flatten(), nn.Linear(2, 3)
    )
    found = find_prunable(net)
    # Not by the name of a class.
    assert list(found) == ["0.weight", "2.weight", "4.weight"]
    assert found["4.weight"] is net[4].weight
    assert list(find_prunable(nn.Linear(2, 2))) == ["weight"]


def test_exclude_patterns():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert list(find_prunable(net, ["[02].*"])) == ["1.weight"]
    with pytest.raises(RunError, match=r"'fc\.\*' matches no.*0\.weight, 1\.weight"):
        find_prunable(net, ["fc.*"])
    with pytest.raises(RunError, match="nothing to prune"):
        find_prunable(net, ["*"])
    with pytest.raises(RunError, match="nothing to prune"):
        find_prunable(nn.BatchNorm2d(2))


def test_an_exclude_pattern_that_matches_nothing_says_what_to_write():
    net = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), fc=nn.Linear(2, 3)))
    for pattern, advice in (("fc", 'write "fc.*"'), ("fcc.*", "there are: conv.weight, fc.weight")):
        told = f"exclude pattern {pattern!r} matches no prunable weight; {advice}"
        with pytest.raises(RunError, match=f"^{re.escape(told)}$"):
            find_prunable(net, [pattern])


def test_a_weight_tied_to_an_embedding_goes_by_the_models_name():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    net[1].weight = net[0].weight
    (name,) = find_prunable(net)
    apply_masks(net, {name: torch.zeros(5, 3, dtype=torch.bool)})
    assert not net[1].weight.any()


def test_projections_of_attention_are_prunable(make_attention, attention_weights):
    net = make_attention()
    assert list(find_prunable(net)) == attention_weights
    assert [tuple(w.shape) for w in find_prunable(net).values()] == [
        (12, 4), (4, 4), (4, 4), (4, 6), (4, 6), (4, 4), (2, 4)
    ]  # fmt: skip
    assert list(find_prunable(net, ["*.in_proj_weight", "other.*"])) == [
        attention_weights[1],
        attention_weights[6],
    ]
    masks = {"packed.in_proj_weight": torch.zeros(12, 4, dtype=torch.bool)}
    masks["packed.in_proj_weight"][0] = True
    assert count_weights(net, masks)["packed.in_proj_weight"] == {"kept": 4, "weights": 48}


def test_what_cannot_be_pruned_is_found():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
            self.line = nn.Conv1d(2, 2, 3)
            self.table = nn.Parameter(torch.zeros(1, 3, 4))
            self.token = nn.Parameter(torch.zeros(1, 1, 4))
            self.norm = nn.LayerNorm(4)
            self.up = nn.ConvTranspose2d(2, 2, 3)
            self.linear = nn.Linear(3, 3)
            self.words = nn.Embedding(3, 3)
            self.words.weight = self.linear.weight
            self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))

    net = Layers()
    assert find_unprunable(net) == {
        "table": "Layers", "line.weight": "Conv1d", "up.weight": "ConvTranspose2d",
        "computed.parametrizations.weight.original1": "ParametrizationList",
    }  # fmt: skip
    assert list(find_prunable(net)) == [
        "attention.in_proj_weight", "attention.out_proj.weight", "linear.weight"
    ]  # fmt: skip


def test_every_projection_of_attention_arrives(make_attention, attention_weights):
    net = make_attention().requires_grad_(False)  # as torch's own fast path would want it
    watch_network(net, (3, 4))
    assert list(find_prunable(net)) == attention_weights
    assert torch.backends.mha.get_fastpath_enabled()
