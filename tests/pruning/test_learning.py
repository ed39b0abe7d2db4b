"""Scores beside frozen weights: straight-through gradients by hand, gates, and no trace left."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from prunekit.contracts import Clock, Scores
from prunekit.errors import RunError
from prunekit.evaluation import eval_mode
from prunekit.graph.groups import Group, find_groups
from prunekit.graph.leaking import LEAK
from prunekit.pruning import learning
from prunekit.pruning.layers import find_prunable
from prunekit.pruning.learning import (
    GroupOpening,
    ScoredChannels,
    ScoredWeight,
    attach,
    attach_gates,
    copy_plain,
    detach,
    effective_parameters,
    effective_weights,
)
from prunekit.pruning.masks import (
    apply_masks,
)
from prunekit.pruning.selection import Selection, select_masks
from prunekit.training import masking
from prunekit.training.masking import LearnedScores

CLOCK = Clock(0, 10, 0, 2)
GLOBAL = {"budget": lambda layers: layers.scores, "compares": True}


def flat(masking):
    return [p for group in masking.parameters() for p in group.parameters]


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def attach_scores(model, start):
    parts = {name: ScoredWeight(value) for name, value in start.items()}
    attach(model, parts)
    return parts


def tie(net):
    net[2].weight = net[0].weight
    return net


def test_tied_weights_share_one_mask_and_one_score():
    net = tie(nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False)))
    weights = find_prunable(net)
    assert list(weights) == ["0.weight"]
    plain = net[0].weight.detach().clone()
    (part,) = attach_scores(net, {"0.weight": torch.ones(3, 3)}).values()
    part.mask.copy_(torch.eye(3, dtype=torch.bool))
    assert torch.equal(net[0].weight, plain * torch.eye(3))
    assert torch.equal(net[2].weight, plain * torch.eye(3))
    with effective_weights(net):
        net(torch.ones(1, 3)).sum().backward()
    assert part.score.grad is not None
    detach(net)
    assert net[0].weight is net[2].weight
    assert torch.equal(net[0].weight, plain)


def test_foreign_parametrizations_are_left_alone():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    assert list(find_prunable(net)) == ["1.weight"]
    attach_scores(net, {"1.weight": torch.ones(2, 3)})
    detach(net)
    assert parametrize.is_parametrized(net[0], "weight")
    assert not parametrize.is_parametrized(net[1])


def test_straight_through_gradient_by_hand():
    """y = w_eff . x, L = 2 y: dL/dw_eff = 2 x, ds = 2 x w sign(s), masked or not."""
    net = nn.Linear(4, 1, bias=False)
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    net.weight.data.copy_(weight)
    net.requires_grad_(False)
    (part,) = attach_scores(net, {"weight": torch.tensor([[0.5, 0.1, -0.7, -0.2]])}).values()
    part.mask.copy_(torch.tensor([[True, False, True, False]]))
    x = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    with effective_weights(net):
        loss = 2 * net(x).sum()
        loss.backward()
    assert loss.item() == 2 * (1 + 300)
    assert part.score.grad.tolist() == [[2.0, -40.0, -600.0, 8000.0]]
    assert net.parametrizations.weight.original.grad is None


def test_the_gradient_of_scores_can_be_differentiated():
    """L = x w_eff: ds = x w sign(s), whose derivative by x is w sign(s)."""
    part = ScoredWeight(torch.tensor([[1.0, -1.0]]))
    x = torch.tensor([[5.0, 7.0]], requires_grad=True)
    loss = (x * part(torch.tensor([[2.0, 3.0]]))).sum()
    (gradient,) = torch.autograd.grad(loss, part.score, create_graph=True)
    assert gradient.tolist() == [[10.0, -21.0]]
    gradient.sum().backward()
    assert x.grad.tolist() == [[2.0, -3.0]]


def test_a_trained_weight_gets_no_gradient_either():
    part = ScoredWeight(torch.tensor([1.0, -1.0]))
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    part(weight).sum().backward()
    assert weight.grad is None
    assert part.score.grad.tolist() == [2.0, -3.0]


def attack(net, x):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).square().sum(), x)
    return (x + gradient.sign()).detach()


def look(net, x):
    with torch.no_grad():
        net(x)
    return x


def scored_net():
    net = make_net().requires_grad_(False)
    start = {name: weight.clone() for name, weight in find_prunable(net).items()}
    parts = attach_scores(net, start)
    for part in parts.values():
        part.mask.copy_(part.score.detach().abs() > 0.2)
    return net, parts


@pytest.mark.parametrize("before", [attack, look], ids=["attack", "no_grad"])
def test_scores_get_gradients_whatever_forward_came_first(before):
    net, parts = scored_net()
    x = torch.rand(5, 4)
    y = torch.tensor([0, 1, 2, 0, 1])
    with effective_weights(net):
        x = before(net, x)
        F.cross_entropy(net(x), y).backward()
    got = {name: part.score.grad.clone() for name, part in parts.items()}
    for part in parts.values():
        part.score.grad = None
    F.cross_entropy(net(x), y).backward()  # computed anew for each access: no cache to trap it
    for name, part in parts.items():
        assert part.score.grad.any()
        torch.testing.assert_close(got[name], part.score.grad)


def test_the_trap_that_effective_weights_avoids():
    """With the cache alone, a first access under no_grad leaves the scores without gradients."""
    net, parts = scored_net()
    with parametrize.cached():
        look(net, torch.rand(5, 4))
        loss = net(torch.rand(5, 4)).sum()
        assert not loss.requires_grad
    with effective_weights(net):
        look(net, torch.rand(5, 4))
        net(torch.rand(5, 4)).sum().backward()
    assert all(part.score.grad is not None for part in parts.values())


def test_masked_weights_are_made_once_a_step(monkeypatch):
    calls = []
    original = ScoredWeight.forward
    monkeypatch.setattr(
        ScoredWeight, "forward", lambda self, w: calls.append(1) or original(self, w)
    )
    net, _ = scored_net()
    calls.clear()
    with effective_weights(net):
        for _ in range(5):
            attack(net, torch.rand(2, 4))
        net(torch.rand(2, 4)).sum().backward()
    assert len(calls) == 2  # layers
    net(torch.rand(2, 4))
    assert len(calls) == 4  # outside, nothing is kept


def test_attach_and_detach_leave_no_trace():
    net = make_net()
    before, outputs = copy.deepcopy(net.state_dict()), net(torch.ones(1, 4))
    detach(net)
    attach_scores(net, {name: torch.ones_like(w) for name, w in find_prunable(net).items()})
    assert not (net.state_dict().keys() & find_prunable(make_net()).keys())
    detach(net)
    assert list(before) == list(net.state_dict())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(net(torch.ones(1, 4)), outputs)
    assert type(net[0]) is nn.Linear


def test_effective_parameters_of_a_plain_network_are_its_own():
    net = make_net()
    values = effective_parameters(net)
    assert list(values) == [name for name, _ in net.named_parameters()]
    assert all(values[name] is parameter for name, parameter in net.named_parameters())


def test_effective_parameters_are_masked_and_made_once_a_step(monkeypatch):
    net, parts = scored_net()
    calls = []
    original = ScoredWeight.forward
    monkeypatch.setattr(
        ScoredWeight, "forward", lambda self, w: calls.append(1) or original(self, w)
    )
    with effective_weights(net):
        values = effective_parameters(net)
        for name, part in parts.items():
            assert torch.equal(values[name] != 0, part.mask)
        net(torch.rand(2, 4))
        values["2.weight"].sum().backward()
    assert len(calls) == 2  # layers
    assert values.keys() == dict(make_net().named_parameters()).keys()
    assert values["0.bias"] is net[0].bias
    assert parts["2.weight"].score.grad is not None


def together(weight, size, module):
    """A group of one weight, with a gate behind a module."""
    units = torch.arange(size)
    return Group(size, {weight: units}, {}, {module: (1, units)}, {})


def test_a_gate_multiplies_weight_and_bias_along_the_outputs():
    """Gate (1, LEAK, 1): what y = gate * (W x + b) does, (gate W) x + gate b does as well."""
    net = nn.Linear(2, 3)
    weight, bias = net.weight.detach().clone(), net.bias.detach().clone()
    part = ScoredChannels(torch.ones(3, 2))
    part.mask[1] = False
    attach_gates(net, {"weight": part}, [together("weight", 3, "")])
    values = effective_parameters(net)
    opened = torch.tensor([1.0, LEAK, 1.0])
    assert values.keys() == {"weight", "bias"}
    torch.testing.assert_close(values["weight"], opened[:, None] * weight)
    torch.testing.assert_close(values["bias"], opened * bias)
    x = torch.rand(4, 2)
    torch.testing.assert_close(F.linear(x, values["weight"], values["bias"]), net(x))
    F.linear(x, values["weight"], values["bias"]).square().sum().backward()
    through = part.score.grad.clone()
    part.score.grad = None
    net(x).square().sum().backward()
    torch.testing.assert_close(through, part.score.grad)


def test_a_gate_behind_a_normalisation_multiplies_its_scale_and_shift():
    net = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.BatchNorm2d(2)).eval()
    part = ScoredChannels(torch.ones(2, 1, 2, 2))
    part.mask[0] = False
    attach_gates(net, {"0.weight": part}, [together("0.weight", 2, "1")])
    values = effective_parameters(net)
    assert values["0.weight"] is net[0].weight
    torch.testing.assert_close(values["1.weight"], torch.tensor([LEAK, 1.0]))
    plain = copy_plain(net)
    plain.load_state_dict({**plain.state_dict(), **values})
    x = torch.rand(3, 1, 4, 4)
    torch.testing.assert_close(plain(x), net(x))


def test_a_copy_makes_openings_of_its_own():
    """Two gates share one opening while a step lasts; the copy's follows the copy's mask."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Identity())
    units = torch.arange(3)
    group = Group(3, {"0.weight": units}, {}, {"0": (1, units), "1": (1, units)}, {})
    attach_gates(net, {"0.weight": ScoredChannels(torch.ones(3, 2))}, [group])
    with effective_weights(net):
        twin = copy.deepcopy(net)
        torch.testing.assert_close(twin(torch.ones(1, 2)), net(torch.ones(1, 2)))
        twin[1].channel_gate.homes[0].parts[0].mask.fill_(False)
        assert twin(torch.ones(1, 2)).abs().max() <= LEAK < net(torch.ones(1, 2)).abs().max()
    assert all(m.made is None for m in net.modules() if isinstance(m, GroupOpening))


def test_a_plain_copy_is_as_if_nothing_had_been_attached():
    net, _ = scored_net()
    part = ScoredChannels(torch.ones(3, 6))
    attach_gates(net, {"2.weight": part}, [together("2.weight", 3, "2")])
    masked = net(torch.ones(1, 4))
    plain = copy_plain(net)
    fresh = make_net()
    assert [type(module) for module in plain.modules()] == [type(m) for m in fresh.modules()]
    assert list(plain.state_dict()) == list(fresh.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), fresh.parameters(), strict=True)
    )
    assert torch.equal(plain(torch.ones(1, 4)), fresh(torch.ones(1, 4)))
    with torch.no_grad():
        plain[0].weight.zero_()
    assert torch.equal(net(torch.ones(1, 4)), masked)
    detach(net)
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_attached_attention_is_the_masked_one(training, gradients, make_attention):
    """In eval mode without gradients torch takes a path of its own, which reads weights itself."""
    net, x = make_attention(), torch.rand(2, 12)
    weights = find_prunable(net)
    scores = {name: torch.rand_like(weight) for name, weight in weights.items()}
    masks = select_masks(Scores(scores), Selection(0.5))
    twin = make_attention()
    apply_masks(twin, masks)
    parts = attach_scores(net, scores)
    for name, part in parts.items():
        part.mask.copy_(masks[name])
    net.train(training)
    twin.train(training)
    with effective_weights(net), torch.set_grad_enabled(gradients):
        torch.testing.assert_close(net(x), twin(x))
    with torch.set_grad_enabled(gradients):
        assert not torch.allclose(net(x), make_attention().train(training)(x))


def test_scores_of_attention_learn(make_attention):
    net = make_attention()
    parts = attach_scores(net, {n: torch.randn_like(w) for n, w in find_prunable(net).items()})
    with effective_weights(net):
        net(torch.rand(2, 12)).square().sum().backward()
    assert all(part.score.grad.abs().sum() > 0 for part in parts.values())


def test_detached_attention_has_its_parameters_in_their_order(make_attention, attention_weights):
    net = make_attention()
    before = [(name, value.clone()) for name, value in net.named_parameters()]
    # One projection alone, and all: each comes back to its place.
    for names in (["other.k_proj_weight"], attention_weights):
        attach_scores(net, {n: torch.ones_like(find_prunable(net)[n]) for n in names})
        detach(net)
        after = list(net.named_parameters())
        assert [name for name, _ in after] == [name for name, _ in before]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(after, before, strict=True))
    assert net.packed.q_proj_weight is None


def test_a_removed_channel_gets_a_gradient_behind_normalisation_and_relu(make_conv_net):
    """Else no removed channel could come back, and learning channels would be magnitude pruning."""
    net = make_conv_net()
    x, y = torch.rand(16, 4, 6, 6), torch.randint(3, (16,))
    groups, _ = find_groups(net, x[:1], ["0.weight"])
    start = {"0.weight": dict(net.named_parameters())["0.weight"].detach().clone()}
    selection = Selection(0.5, structure="channel", groups=groups)
    learned = LearnedScores(net, Scores(start), selection, {}, "train")
    with learned.effective(CLOCK):
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
    selection = Selection(0.5, structure="channel", groups=[together("0.weight", 2, "0")])
    learned = LearnedScores(net, scores, selection, {}, "train")
    x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])  # z = 3 and 1 in both channels
    with learned.effective(CLOCK):
        out = net(x)
        (3 * out).sum().backward()
    torch.testing.assert_close(out, torch.tensor([[3.0, 3e-6], [1.0, 1e-6]]))
    expected = torch.tensor([[6.0, -6.0], [6.0, 6.0]])
    torch.testing.assert_close(learned.parts["0.weight"].score.grad, expected)
    learned.detach()
    assert list(net.state_dict()) == ["0.weight"]
    assert torch.equal(net(x), torch.tensor([[3.0, 3.0], [1.0, 1.0]]))


def learned(net, sparsity=0.5, alive=None, bn="train", **more):
    start = {name: weight.detach().clone() for name, weight in find_prunable(net).items()}
    selection = Selection(sparsity, **more)
    return LearnedScores(net, Scores(start, layerwise=True), selection, alive or {}, bn)


def test_masks_follow_the_scores_once_a_step(monkeypatch, make_normed_net):
    calls = []
    original = masking.select_masks
    monkeypatch.setattr(masking, "select_masks", lambda *a: calls.append(1) or original(*a))
    made = []
    forward = learning.ScoredWeight.forward
    monkeypatch.setattr(
        learning.ScoredWeight, "forward", lambda s, w: made.append(1) or forward(s, w)
    )
    net = make_normed_net()
    trained = learned(net)
    optimizer = torch.optim.SGD(flat(trained), lr=0.1)
    calls.clear()
    made.clear()
    for number in range(1, 4):
        with trained.effective(CLOCK):
            for _ in range(5):  # an attack
                x = torch.rand(4, 6, requires_grad=True)
                with eval_mode(net):
                    torch.autograd.grad(net(x).sum(), x)
            net(torch.rand(4, 6)).square().sum().backward()
        optimizer.step()
        assert (len(calls), len(made)) == (number, 2 * number)
    with trained.effective(CLOCK):
        for name, part in trained.parts.items():
            expected = original(Scores({name: part.score.abs()}), Selection(0.5))[name]
            assert torch.equal(part.mask, expected)


def test_the_effective_weights_have_the_sparsity(make_normed_net):
    net = make_normed_net()
    trained = learned(net, 0.75)
    with trained.effective(CLOCK):
        assert [int((net[i].weight != 0).sum()) for i in (0, 4)] == [12, 6]


def test_importance_is_the_absolute_score(make_normed_net):
    net = make_normed_net()
    weight = net[0].weight.detach().clone()
    scores = learned(net).scores()
    assert scores.layerwise
    assert torch.equal(scores.values["0.weight"], weight.abs())
    assert (weight < 0).any()


def test_a_prune_after_a_prune_keeps_the_zeros(make_normed_net):
    net = make_normed_net()
    alive = {"0.weight": torch.rand(8, 6) > 0.3}
    apply_masks(net, alive)
    trained = learned(net, 0.5, alive=alive)
    with torch.no_grad():  # whatever the scores say
        trained.parts["0.weight"].score[~alive["0.weight"]] = 100.0
    with trained.effective(CLOCK):
        assert not (trained.parts["0.weight"].mask & ~alive["0.weight"]).any()


def test_an_empty_layer_is_told_at_the_start_and_after_an_epoch(make_normed_net):
    net = make_normed_net()
    with torch.no_grad():
        net[4].weight.zero_()
    with pytest.raises(RunError, match=r"no weight of 4\.weight"):
        learned(net, 0.6, **GLOBAL).check()
    trained = learned(make_normed_net(), 0.5, **GLOBAL)
    trained.check()
    with torch.no_grad():
        trained.parts["4.weight"].score.zero_()
    with pytest.raises(RunError, match=r"no weight of 4\.weight"):
        trained.check()
