"""Weights that train in a prune stage: what layers compute with, what is judged, what is left."""

import copy

import pytest
import torch
from torch import nn

from prunekit import LearnedWeights
from prunekit.contracts import Clock, Scores
from prunekit.errors import RunError
from prunekit.evaluation import eval_mode
from prunekit.graph.groups import find_groups, follow
from prunekit.pruning.learning import copy_plain, effective_parameters
from prunekit.pruning.masks import apply_masks
from prunekit.pruning.selection import Selection, select_masks
from prunekit.testing import tiny_network

CLOCK = Clock(0, 10, 0, 2)


def attach(net, selection, alive=None, **more):
    start = {n: p.detach().abs() for n, p in net.named_parameters() if p.dim() > 1}
    return LearnedWeights(net, Scores(start), selection, alive or {}, **more)


def test_a_layer_computes_with_its_weight_times_its_factor():
    net = nn.Sequential(nn.Linear(3, 1, bias=False))
    net[0].weight.data = torch.tensor([[1.0, -2.0, 3.0]])
    factor = nn.Parameter(torch.tensor([[4.0, 0.5, -1.0]]))
    alive = {"0.weight": torch.tensor([[True, True, False]])}
    masking = attach(net, Selection(0.67), alive, factors={"0.weight": factor})
    x = torch.tensor([[1.0, 10.0, 100.0]])
    with masking.effective(CLOCK):
        net(x).sum().backward()
        # 1 * 4 and -2 * 0.5; the third is gone.
        assert effective_parameters(net)["0.weight"].tolist() == [[4.0, -1.0, 0.0]]
    assert factor.grad.tolist() == [[1.0, -20.0, 0.0]]
    assert masking.trained["0.weight"].grad.tolist() == [[4.0, 5.0, 0.0]]
    assert masking.scores().values["0.weight"].tolist() == [[4.0, 1.0, 3.0]]
    assert copy_plain(net).state_dict().keys() == {"0.weight"}
    with masking.judged(CLOCK):
        assert net(x).item() == 4.0  # 1 of 3 are kept
    assert masking.masks["0.weight"].tolist() == [[True, True, False]]
    masking.detach()
    assert dict(net.named_parameters()).keys() == {"0.weight"}
    assert net[0].weight.tolist() == [[4.0, -1.0, 0.0]]


def test_what_is_judged_is_what_is_left_also_of_channels():
    """To the bit, with scales and biases of the channels, which training then has back."""
    net = tiny_network()
    weights = [n for n, p in net.named_parameters() if p.dim() > 1]
    groups, _ = find_groups(net, torch.zeros(1, 1, 8, 8), weights[:1])
    selection = Selection(0.5, structure="channel", groups=groups)
    start = {"0.weight": net[0].weight.detach()}
    nn.init.uniform_(net[1].bias)
    masking = LearnedWeights(net, Scores(start), selection, {})
    before = copy.deepcopy(net.state_dict())
    x = torch.rand(2, 1, 8, 8)
    with masking.judged(CLOCK), eval_mode(net):
        judged = net(x)
    assert all(torch.equal(before[n], v) for n, v in net.state_dict().items())
    masks = select_masks(masking.scores(), selection)
    masking.detach()
    apply_masks(net, {**masks, **follow(masks, groups)})
    assert int(masks["0.weight"].flatten(1).any(1).sum()) == 2
    assert not net[1].bias[~masks["0.weight"].flatten(1).any(1)].any()
    with eval_mode(net):
        assert torch.equal(net(x), judged)


@pytest.mark.parametrize(("bn", "moves"), [("train", True), ("freeze", False)])
def test_normalization_is_frozen_on_request(bn, moves):
    net = tiny_network()
    masking = attach(net, Selection(0.5), bn=bn)
    trained = {id(p) for group in masking.parameters() for p in group.parameters}
    assert (id(net[1].weight) in trained) == (id(net[1].bias) in trained) == moves
    assert {id(p) for p in masking.trained.values()} <= trained
    assert net[1].training == moves


def test_a_layer_that_would_be_empty_is_an_error():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net[1].weight.data *= 0
    masking = attach(net, Selection(0.5, lambda layers: layers.scores))
    with pytest.raises(RunError, match=r"leaves no weight of 1\.weight"):
        masking.check()
