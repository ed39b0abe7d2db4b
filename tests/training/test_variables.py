"""What a training changes, and what it must leave alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prunekit.contracts import Scores
from prunekit.errors import RunError
from prunekit.evaluation import eval_mode
from prunekit.pruning import learning
from prunekit.pruning.layers import find_prunable
from prunekit.pruning.learning import LearnedScores
from prunekit.pruning.masks import apply_masks
from prunekit.pruning.selection import Selection
from prunekit.training.variables import Weights


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)
    )


def snapshot(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def changed(before, net):
    return {n for n, value in net.state_dict().items() if not torch.equal(before[n], value)}


def train(trained, optimizer, steps=3, harm=None, clip=None):
    torch.manual_seed(1)
    for _ in range(steps):
        x, y = torch.rand(8, 6), torch.randint(3, (8,))
        optimizer.zero_grad(set_to_none=True)
        with trained.effective():
            F.cross_entropy(trained.model(x), y).backward()
        if harm is not None:
            harm()
        trained.after_backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(trained.parameters(), clip)
        optimizer.step()


def learned(net, sparsity=0.5, budget="layer", alive=None, bn="train"):
    start = {name: weight.detach().clone() for name, weight in find_prunable(net).items()}
    selection = Selection(sparsity, budget)
    return LearnedScores(net, Scores(start, layerwise=True), selection, alive or {}, bn)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
}

NORMS = {"1.weight", "1.bias", "3.weight", "3.bias"}
STATISTICS = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


# Weights under a mask


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", [None, float("inf"), float("nan"), float("-inf")])
def test_pruned_weights_stay_exactly_zero(optimizer, bad):
    net = make_net()
    chosen = {"0.weight": torch.rand(8, 6) > 0.6, "4.weight": torch.rand(3, 8) > 0.3}
    apply_masks(net, chosen)
    before = snapshot(net)
    trained = Weights(net, chosen)

    def harm():
        if bad is not None:
            net[0].weight.grad[~chosen["0.weight"]] = bad

    train(trained, OPTIMIZERS[optimizer](trained.parameters()), harm=harm, clip=1.0)
    trained.check()
    for name, mask in chosen.items():
        weight = dict(net.named_parameters())[name].detach()
        assert not weight[~mask].any()
        assert not weight[~mask].signbit().any()
        assert weight[mask].isfinite().all()
        assert (weight[mask] != before[name][mask]).all()


def test_a_broken_promise_is_loud():
    net = make_net()
    chosen = {"0.weight": torch.zeros(8, 6, dtype=torch.bool)}
    with pytest.raises(RunError, match=r"pruned weights of 0\.weight are not zero"):
        Weights(net, chosen).check()


def test_weights_train_everything():
    net = make_net().requires_grad_(False).eval()
    trained = Weights(net, {})
    before = snapshot(net)
    train(trained, OPTIMIZERS["sgd"](trained.parameters()))
    assert changed(before, net) == set(before)
    assert all(m.training for m in net.modules())


# Scores


def test_masks_follow_the_scores_once_a_step(monkeypatch):
    calls = []
    original = learning.select_masks
    monkeypatch.setattr(learning, "select_masks", lambda *a: calls.append(1) or original(*a))
    made = []
    forward = learning.ScoredWeight.forward
    monkeypatch.setattr(
        learning.ScoredWeight, "forward", lambda s, w: made.append(1) or forward(s, w)
    )
    net = make_net()
    trained = learned(net)
    optimizer = OPTIMIZERS["sgd"](trained.parameters())
    calls.clear()
    made.clear()
    for number in range(1, 4):
        with trained.effective():
            for _ in range(5):  # an attack
                x = torch.rand(4, 6, requires_grad=True)
                with eval_mode(net):
                    torch.autograd.grad(net(x).sum(), x)
            net(torch.rand(4, 6)).square().sum().backward()
        optimizer.step()
        assert (len(calls), len(made)) == (number, 2 * number)
    with trained.effective():
        for name, part in trained.parts.items():
            expected = original(Scores({name: part.score.abs()}), Selection(0.5))[name]
            assert torch.equal(part.mask, expected)


@pytest.mark.parametrize(
    ("bn", "moves"), [("train", NORMS | STATISTICS), ("freeze", set())], ids=["train", "freeze"]
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_and_biases_are_frozen_to_the_bit(bn, moves, optimizer):
    net = make_net()
    before = snapshot(net)
    trained = learned(net, bn=bn)
    scores = {name: part.score.detach().clone() for name, part in trained.parts.items()}
    train(trained, OPTIMIZERS[optimizer](trained.parameters()))
    with trained.effective(), eval_mode(net), torch.no_grad():
        net(torch.rand(2, 6))
    if bn == "freeze":
        assert not net[1].training
    assert all((part.score != scores[name]).all() for name, part in trained.parts.items())
    trained.detach()
    assert changed(before, net) == moves


def test_the_effective_weights_have_the_sparsity():
    net = make_net()
    trained = learned(net, 0.75)
    with trained.effective():
        assert [int((net[i].weight != 0).sum()) for i in (0, 4)] == [12, 6]


def test_importance_is_the_absolute_score():
    net = make_net()
    weight = net[0].weight.detach().clone()
    scores = learned(net).scores()
    assert scores.layerwise
    assert torch.equal(scores.values["0.weight"], weight.abs())
    assert (weight < 0).any()


def test_a_prune_after_a_prune_keeps_the_zeros():
    net = make_net()
    alive = {"0.weight": torch.rand(8, 6) > 0.3}
    apply_masks(net, alive)
    trained = learned(net, 0.5, alive=alive)
    with torch.no_grad():  # whatever the scores say
        trained.parts["0.weight"].score[~alive["0.weight"]] = 100.0
    with trained.effective():
        assert not (trained.parts["0.weight"].mask & ~alive["0.weight"]).any()


def test_an_empty_layer_is_told_at_the_start_and_after_an_epoch():
    net = make_net()
    with torch.no_grad():
        net[4].weight.zero_()
    with pytest.raises(RunError, match=r"no weight of 4\.weight"):
        learned(net, 0.6, "global")
    trained = learned(make_net(), 0.5, "global")
    trained.check()
    with torch.no_grad():
        trained.parts["4.weight"].score.zero_()
    with pytest.raises(RunError, match=r"no weight of 4\.weight"):
        trained.check()
