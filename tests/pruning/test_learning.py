"""Scores -> masks, straight-through gradients and attached scores, by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from prunekit.contracts import Scores
from prunekit.errors import RunError, UserError
from prunekit.pruning import selection as module
from prunekit.pruning.layers import find_prunable, find_unprunable
from prunekit.pruning.learning import (
    LEAK,
    ChannelGate,
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
    assert_masked,
    count_weights,
    hash_masks,
    measure_sparsity,
)
from prunekit.pruning.selection import Selection, check_layers, count_kept, select_masks

INFINITY = float("inf")


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def attach_scores(model, start):
    parts = {name: ScoredWeight(value) for name, value in start.items()}
    attach(model, parts)
    return parts


# Counts


@pytest.mark.parametrize(
    ("n", "sparsity", "kept"),
    [(1000, 0.9, 100), (10, 0.7, 3), (10, 0.1, 9), (9, 0.999, 1), (7, 0.5, 4), (10, 0.01, 10)],
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


def test_nothing_removed():
    assert select_masks(Scores({"w": torch.rand(10)}), Selection(0.05))["w"].all()
    assert select_masks(Scores({"w": torch.rand(10)}), Selection(0.05, "global"))["w"].all()


def test_an_unknown_budget_is_refused():
    with pytest.raises(ValueError, match="fair"):
        select_masks(Scores({"w": torch.rand(10)}), Selection(0.5, "fair"))


# Budgets


def test_layer_budget_takes_the_same_fraction_of_each():
    masks = select_masks(
        Scores({"a": torch.arange(10.0), "b": torch.arange(20.0) + 100}), Selection(0.8)
    )
    assert {name: int(m.sum()) for name, m in masks.items()} == {"a": 2, "b": 4}


def test_global_budget_lets_layers_compete():
    values = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([10.0, 0.5, 20.0, 30.0])}
    masks = select_masks(Scores(values), Selection(0.5, "global"))
    assert masks["a"].tolist() == [False, False, False, True]
    assert masks["b"].tolist() == [True, False, True, True]


def test_global_budget_divides_layerwise_scores_by_their_rms():
    """RMS: a = sqrt(50 / 2) = 5 -> 0.2, 1.4; b = sqrt(5e4 / 2) = 158.1 -> 0.632, 1.265."""
    values = {"a": torch.tensor([1.0, 7.0]), "b": torch.tensor([100.0, 200.0])}
    plain = select_masks(Scores(values), Selection(0.5, "global"))
    assert plain["b"].tolist() == [True, True]
    masks = select_masks(Scores(values, layerwise=True), Selection(0.5, "global"))
    assert masks["a"].tolist() == [False, True]
    assert masks["b"].tolist() == [False, True]


def test_the_rms_is_that_of_the_weights_still_alive():
    """Dead, the 100 of a does not count: a -> 1, b -> 0.63, 1.26."""
    values = {"a": torch.tensor([100.0, 1.0]), "b": torch.tensor([1.0, 2.0])}
    alive = {"a": torch.tensor([False, True])}
    masks = select_masks(Scores(values, layerwise=True), Selection(0.5, "global"), alive)
    assert masks["a"].tolist() == [False, True]
    assert masks["b"].tolist() == [False, True]


def test_a_layer_of_zeros_does_not_spoil_the_global_budget():
    values = {"a": torch.zeros(4), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    masks = select_masks(Scores(values, layerwise=True), Selection(0.5, "global"))
    assert (int(masks["a"].sum()), int(masks["b"].sum())) == (0, 4)


@pytest.mark.parametrize("budget", ["layer", "global"])
def test_pruned_weights_stay_pruned(budget):
    values = {"a": torch.tensor([9.0, 8.0, 1.0, 2.0, 3.0, 4.0])}
    alive = {"a": torch.tensor([False, False, True, True, True, True])}
    mask = select_masks(Scores(values), Selection(0.5, budget), alive)["a"]
    assert mask.tolist() == [False, False, False, True, True, True]
    # Asked for more than is alive: nothing comes back to life.
    assert torch.equal(select_masks(Scores(values), Selection(0.1, budget), alive)["a"], alive["a"])


def test_a_layer_that_keeps_nothing_is_named():
    masks = select_masks(
        Scores({"a": torch.zeros(4), "b.weight": torch.ones(4)}), Selection(0.5, "global")
    )
    with pytest.raises(RunError, match=r"no weight of a \(4 weights\).*exclude = \[\"a\"\]"):
        check_layers(masks, 0.5)
    check_layers({"b.weight": masks["b.weight"]}, 0.5)


# What can be pruned


class StdConv2d(nn.Conv2d):
    pass


def test_prunable_are_convolutions_and_linear_layers():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), StdConv2d(2, 2, 1), nn.Flatten(), nn.Linear(2, 3)
    )
    found = find_prunable(net)
    assert list(found) == ["0.weight", "4.weight"]
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


def test_a_weight_tied_to_an_embedding_goes_by_the_models_name():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    net[1].weight = net[0].weight
    (name,) = find_prunable(net)
    apply_masks(net, {name: torch.zeros(5, 3, dtype=torch.bool)})
    assert not net[1].weight.any()


def test_foreign_parametrizations_are_left_alone():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    assert list(find_prunable(net)) == ["1.weight"]
    attach_scores(net, {"1.weight": torch.ones(2, 3)})
    detach(net)
    assert parametrize.is_parametrized(net[0], "weight")
    assert not parametrize.is_parametrized(net[1])


# Straight through


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


# What the forward pass uses


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


def test_a_gate_multiplies_weight_and_bias_along_the_outputs():
    """Gate (1, LEAK, 1): what y = gate * (W x + b) does, (gate W) x + gate b does as well."""
    net = nn.Linear(2, 3)
    weight, bias = net.weight.detach().clone(), net.bias.detach().clone()
    gate = ChannelGate(torch.ones(3, 2), last=True)
    gate.mask[1] = False
    attach_gates(net, {"weight": gate}, {"weight": ["bias"]})
    values = effective_parameters(net)
    opened = torch.tensor([1.0, LEAK, 1.0])
    assert values.keys() == {"weight", "bias"}
    torch.testing.assert_close(values["weight"], opened[:, None] * weight)
    torch.testing.assert_close(values["bias"], opened * bias)
    x = torch.rand(4, 2)
    torch.testing.assert_close(F.linear(x, values["weight"], values["bias"]), net(x))
    F.linear(x, values["weight"], values["bias"]).square().sum().backward()
    through = gate.score.grad.clone()
    gate.score.grad = None
    net(x).square().sum().backward()
    torch.testing.assert_close(through, gate.score.grad)


def test_a_gate_behind_a_normalisation_multiplies_its_scale_and_shift():
    net = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.BatchNorm2d(2)).eval()
    gate = ChannelGate(torch.ones(2, 1, 2, 2), last=False)
    gate.mask[0] = False
    attach_gates(net, {"0.weight": gate}, {"0.weight": ["1.weight", "1.bias"]})
    values = effective_parameters(net)
    assert values["0.weight"] is net[0].weight
    torch.testing.assert_close(values["1.weight"], torch.tensor([LEAK, 1.0]))
    plain = copy_plain(net)
    plain.load_state_dict({**plain.state_dict(), **values})
    x = torch.rand(3, 1, 4, 4)
    torch.testing.assert_close(plain(x), net(x))


def test_a_plain_copy_is_as_if_nothing_had_been_attached():
    net, _ = scored_net()
    attach_gates(net, {"2.weight": ChannelGate(torch.ones(3, 6), last=True)}, {"2.weight": []})
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


# Apply, count, hash


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


def test_selection_never_sorts(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("sorted")

    monkeypatch.setattr(module.torch, "sort", refuse)
    monkeypatch.setattr(module.torch, "argsort", refuse)
    monkeypatch.setattr(torch.Tensor, "sort", refuse)
    monkeypatch.setattr(torch.Tensor, "argsort", refuse)
    select_masks(Scores({"w": torch.rand(100)}), Selection(0.5, "global"))


# Attention


class Attention(nn.Module):
    """A packed attention and one whose keys are of another width, as a classifier of 3 tokens."""

    def __init__(self):
        super().__init__()
        self.packed = nn.MultiheadAttention(4, 2, batch_first=True)
        self.other = nn.MultiheadAttention(4, 1, kdim=6, vdim=6, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = x.reshape(-1, 3, 4)
        x = x + self.packed(x, x, x, need_weights=False)[0]
        keys = torch.cat([x, x[..., :2]], 2)
        return self.head(self.other(x, keys, keys, need_weights=False)[0].mean(1))


ATTENTION = [
    "packed.in_proj_weight", "packed.out_proj.weight", "other.q_proj_weight",
    "other.k_proj_weight", "other.v_proj_weight", "other.out_proj.weight", "head.weight",
]  # fmt: skip


def make_attention():
    torch.manual_seed(0)
    return Attention()


def test_projections_of_attention_are_prunable():
    net = make_attention()
    assert list(find_prunable(net)) == ATTENTION
    assert [tuple(w.shape) for w in find_prunable(net).values()] == [
        (12, 4), (4, 4), (4, 4), (4, 6), (4, 6), (4, 4), (2, 4)
    ]  # fmt: skip
    assert list(find_prunable(net, ["*.in_proj_weight", "other.*"])) == [ATTENTION[1], ATTENTION[6]]
    masks = {"packed.in_proj_weight": torch.zeros(12, 4, dtype=torch.bool)}
    masks["packed.in_proj_weight"][0] = True
    assert count_weights(net, masks)["packed.in_proj_weight"] == {"kept": 4, "weights": 48}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_attached_attention_is_the_masked_one(training, gradients):
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


def test_scores_of_attention_learn():
    net = make_attention()
    parts = attach_scores(net, {n: torch.randn_like(w) for n, w in find_prunable(net).items()})
    with effective_weights(net):
        net(torch.rand(2, 12)).square().sum().backward()
    assert all(part.score.grad.abs().sum() > 0 for part in parts.values())


def test_detached_attention_has_its_parameters_in_their_order():
    net = make_attention()
    before = [(name, value.clone()) for name, value in net.named_parameters()]
    # One projection alone, and all: each comes back to its place.
    for names in (["other.k_proj_weight"], ATTENTION):
        attach_scores(net, {n: torch.ones_like(find_prunable(net)[n]) for n in names})
        detach(net)
        after = list(net.named_parameters())
        assert [name for name, _ in after] == [name for name, _ in before]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(after, before, strict=True))
    assert net.packed.q_proj_weight is None


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
