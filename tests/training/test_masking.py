"""What a training changes, and what it must leave alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prunekit.contracts import Clock, Scores
from prunekit.errors import RunError
from prunekit.evaluation import eval_mode
from prunekit.pruning.layers import find_prunable
from prunekit.pruning.masks import State, apply_masks
from prunekit.pruning.selection import Selection
from prunekit.training.masking import LearnedScores, Weights

CLOCK = Clock(0, 10, 0, 2)


def flat(masking):
    return [p for group in masking.parameters() for p in group.parameters]


def snapshot(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def changed(before, net):
    return {n for n, value in net.state_dict().items() if not torch.equal(before[n], value)}


def train(trained, optimizer, steps=3, harm=None, clip=None):
    torch.manual_seed(1)
    for _ in range(steps):
        x, y = torch.rand(8, 6), torch.randint(3, (8,))
        optimizer.zero_grad(set_to_none=True)
        with trained.effective(CLOCK):
            F.cross_entropy(trained.model(x), y).backward()
        if harm is not None:
            harm()
        trained.after_backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(flat(trained), clip)
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
}


NORMS = {"1.weight", "1.bias", "3.weight", "3.bias"}


STATISTICS = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", [None, float("inf"), float("nan"), float("-inf")])
def test_pruned_weights_stay_exactly_zero(optimizer, bad, make_normed_net):
    net = make_normed_net()
    chosen = {"0.weight": torch.rand(8, 6) > 0.6, "4.weight": torch.rand(3, 8) > 0.3}
    apply_masks(net, chosen)
    before = snapshot(net)
    trained = Weights(net, chosen)

    def harm():
        if bad is not None:
            net[0].weight.grad[~chosen["0.weight"]] = bad

    train(trained, OPTIMIZERS[optimizer](flat(trained)), harm=harm, clip=1.0)
    trained.check()
    for name, mask in chosen.items():
        weight = dict(net.named_parameters())[name].detach()
        assert not weight[~mask].any()
        assert not weight[~mask].signbit().any()
        assert weight[mask].isfinite().all()
        assert (weight[mask] != before[name][mask]).all()


def test_a_broken_promise_is_loud(make_normed_net):
    net = make_normed_net()
    chosen = {"0.weight": torch.zeros(8, 6, dtype=torch.bool)}
    with pytest.raises(RunError, match=r"pruned weights of 0\.weight are not zero"):
        Weights(net, chosen).check()


def test_weights_train_all_that_the_network_trains(make_normed_net):
    net = make_normed_net()
    state = State(net)
    net.requires_grad_(False).eval()  # as an earlier stage may have left it
    state.thaw()
    before = snapshot(net)
    trained = Weights(net, {})
    train(trained, OPTIMIZERS["sgd"](flat(trained)))
    assert changed(before, net) == set(before)
    assert all(m.training for m in net.modules())


def train_once(net, kind):
    """What moves when weights, or scores of the last ones, are trained."""
    before = snapshot(net)
    if kind == "weights":
        trained = Weights(net, {})
    else:
        start = {"4.weight": net[4].weight.detach().clone()}
        trained = LearnedScores(net, Scores(start, layerwise=True), Selection(0.5), {})
    train(trained, OPTIMIZERS["sgd"](flat(trained)))
    trained.detach()
    return changed(before, net)


@pytest.mark.parametrize("kind", ["weights", "scores"])
def test_what_the_network_freezes_no_stage_trains(kind, make_normed_net):
    """A weight, and the scale of a normalization."""
    net = make_normed_net()
    net[0].weight.requires_grad_(False)
    net[1].weight.requires_grad_(False)
    state = State(net)
    assert state.frozen == ("0.weight", "1.weight")
    net.requires_grad_(True)
    state.thaw()
    moved = train_once(net, kind)
    assert not {"0.weight", "1.weight"} & moved
    assert {"1.bias", "3.weight"} <= moved


@pytest.mark.parametrize("kind", ["weights", "scores"])
def test_a_frozen_normalization_keeps_its_statistics(kind, make_normed_net):
    net = make_normed_net()
    net[1].requires_grad_(False)
    state = State(net)
    state.thaw()
    assert not {name for name in train_once(net, kind) if name.startswith("1.")}


@pytest.mark.parametrize(
    ("bn", "moves"), [("train", NORMS | STATISTICS), ("freeze", set())], ids=["train", "freeze"]
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_and_biases_are_frozen_to_the_bit(bn, moves, optimizer, make_normed_net):
    net = make_normed_net()
    before = snapshot(net)
    start = {name: weight.detach().clone() for name, weight in find_prunable(net).items()}
    trained = LearnedScores(net, Scores(start, layerwise=True), Selection(0.5), {}, bn)
    scores = {name: part.score.detach().clone() for name, part in trained.parts.items()}
    train(trained, OPTIMIZERS[optimizer](flat(trained)))
    with trained.effective(CLOCK), eval_mode(net), torch.no_grad():
        net(torch.rand(2, 6))
    if bn == "freeze":
        assert not net[1].training
    assert all((part.score != scores[name]).all() for name, part in trained.parts.items())
    trained.detach()
    assert changed(before, net) == moves
