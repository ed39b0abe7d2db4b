"""The pruners' scores by hand."""

import copy
from math import log, sqrt
from typing import get_args

import pytest
import torch
from prunekit_pruners import ScoreOptions, Start
from prunekit_pruners.scores import build_lwm, build_random, build_score, build_snip
from prunekit_pruners.sensitivity import measure_sensitivity
from prunekit_pruners.starts import DRAWS, scale, start_scores
from torch import nn

from prunekit import NoOptions
from prunekit.contexts import PrunerContext
from prunekit.contracts import Scores
from prunekit.data.seeds import generator
from prunekit.pruning.selection import Selection, select_masks
from prunekit.testing import example_context


def test_scaled_start_by_hand():
    """fan_in 3, max|w| 4: s = sqrt(2) w / 4, signs kept."""
    weight = torch.tensor([[1.0, -2.0, 0.0], [4.0, -1.0, 2.0]])
    expected = sqrt(2) / 4 * weight
    torch.testing.assert_close(scale(weight), expected)


def test_fan_in_of_a_convolution():
    weight = torch.zeros(8, 3, 2, 2)  # fan_in 12
    weight[0, 0, 0, 0] = -5.0
    assert scale(weight).min().item() == pytest.approx(-sqrt(0.5))


def test_a_layer_of_zeros_starts_at_zero():
    assert not scale(torch.zeros(2, 2)).any()


def test_the_start_does_not_share_the_weights():
    weight = torch.nn.Parameter(torch.ones(1, 6))
    start = scale(weight)
    assert not start.requires_grad
    start.add_(1)
    assert weight.tolist() == [[1.0] * 6]


def test_the_start_selects_as_magnitude_does():
    weights = {"a": torch.randn(7, 9), "b": torch.randn(3, 2, 3, 3)}
    start = Scores({n: scale(w).abs() for n, w in weights.items()})
    magnitude = build_lwm(NoOptions(), example_context(PrunerContext))(
        example_context(PrunerContext, weights=weights)
    )
    for name, mask in select_masks(start, Selection(0.8)).items():
        assert torch.equal(mask, select_masks(magnitude, Selection(0.8))[name])


def test_score_learns_from_the_scale():
    weights = {"a": torch.tensor([[2.0, -1.0]])}
    asked = []

    def learn(start):
        asked.append(start)
        return Scores({"a": torch.tensor([[0.25, 0.5]])}, layerwise=True)

    result = build_score(ScoreOptions(), example_context(PrunerContext))(
        example_context(PrunerContext, weights=weights, attach=lambda start: start, train=learn)
    )
    assert result.values["a"].tolist() == [[0.25, 0.5]]
    (start,) = asked
    assert start.layerwise
    assert start.values["a"].tolist() == [pytest.approx([sqrt(3), -sqrt(3) / 2])]


def test_lwm_is_the_magnitude():
    scores = build_lwm(NoOptions(), example_context(PrunerContext))(
        example_context(PrunerContext, weights={"a": torch.tensor([-3.0, 2.0])})
    )
    assert scores.values["a"].tolist() == [3.0, 2.0]
    assert not scores.layerwise


def test_random_follows_the_generator_alone():
    weights = {"a": torch.zeros(50), "b": torch.zeros(2, 3)}

    def draw(seed):
        context = example_context(PrunerContext, weights=weights, generator=generator(seed))
        return build_random(NoOptions(), context)(context).values

    first, again, other = draw(0), draw(0), draw(1)
    assert first["b"].shape == (2, 3)
    assert 0 <= first["a"].min() <= first["a"].max() < 1
    assert torch.equal(first["a"], again["a"])
    assert not torch.equal(first["a"], other["a"])


RANDOM_STARTS = {
    # A weight (64, 16, 3, 3): fan_in 144, fan_out 576.
    "kaiming-normal": sqrt(2 / 144),
    "kaiming-uniform": sqrt(2 / 144),
    "xavier-normal": sqrt(4 / 720),
    "xavier-uniform": sqrt(4 / 720),
}


@pytest.mark.parametrize("start", RANDOM_STARTS)
def test_random_starts_have_their_variance(start):
    context = example_context(
        PrunerContext, weights={"a": torch.zeros(64, 16, 3, 3)}, generator=generator(0)
    )
    values = start_scores(start, context)["a"]
    spread = RANDOM_STARTS[start]
    assert values.std().item() == pytest.approx(spread, rel=0.02)  # 9,216 draws: 0.7 %
    assert abs(values.mean().item()) < 0.05 * spread
    edge = values.abs().max().item() / spread
    if start.endswith("uniform"):  # its edge is sqrt(3) times its standard deviation
        assert sqrt(3) * 0.99 < edge <= sqrt(3) * 1.0001
    else:
        assert edge > 3


@pytest.mark.parametrize("start", RANDOM_STARTS)
def test_random_starts_follow_the_generator_alone(start):
    weights = {"a": torch.ones(3, 4), "b": torch.ones(5, 2)}

    def draw(seed):
        torch.rand(1)
        return start_scores(
            start, example_context(PrunerContext, weights=weights, generator=generator(seed))
        )

    first, again, other = draw(0), draw(0), draw(1)
    assert all(torch.equal(first[n], again[n]) for n in weights)
    assert not any(torch.equal(first[n], other[n]) for n in weights)
    assert weights["a"].tolist() == torch.ones(3, 4).tolist()


def test_every_start_that_is_declared_is_there():
    assert set(get_args(Start)) == {"scaled", "snip", *DRAWS}


def linear_case(model, x, y):
    """The context of a prune stage whose first batch is (x, y), and whose second must not come."""

    def batches():
        yield x, y
        raise AssertionError("a second batch")

    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if n in names}
    return example_context(PrunerContext, model=model.train(), weights=weights, batches=batches)


def test_snip_by_hand():
    """Two images, logits W x = (0, 0): softmax 1/2, so dL/dW = mean of (p - onehot(y)) x^T."""
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -3.0], [3.0, -3.0]]))
    context = linear_case(model, torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([0, 1]))
    # (p - onehot): (-1/2, 1/2) and (1/2, -1/2); with x: mean ((-1/2 + 1) / 2, (1/2 - 1) / 2).
    scores = build_snip(NoOptions(), example_context(PrunerContext))(context)
    assert not scores.layerwise
    torch.testing.assert_close(scores.values["weight"], torch.full((2, 2), 0.75))


def test_snip_is_the_loss_that_a_mask_would_change():
    """|dL/dm| at m = 1, by finite differences of the loss as a function of the mask."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    x, y = torch.rand(6, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])
    found = measure_sensitivity(linear_case(model, x, y))

    def loss(mask):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight.mul_(mask)
        return nn.functional.cross_entropy(other(x), y).item()

    for row, column in [(0, 0), (1, 2), (3, 1)]:
        up, down = torch.ones(2, 4, 3, dtype=torch.float64)
        up[row, column] += 1e-6
        down[row, column] -= 1e-6
        slope = (loss(up) - loss(down)) / 2e-6
        assert found["0.weight"][row, column].item() == pytest.approx(abs(slope), abs=1e-8)


def test_snip_leaves_the_network_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    before = copy.deepcopy(model.state_dict())
    context = linear_case(model, torch.rand(5, 3), torch.tensor([0, 1, 1, 0, 1]))
    scores = build_snip(NoOptions(), context)(context)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert not any(v.requires_grad for v in scores.values.values())
    assert all(v.any() for v in scores.values.values())


def test_snip_of_a_layer_without_influence_is_zero():
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_module("idle", nn.Linear(2, 2))
    model.forward = model[0].forward
    found = measure_sensitivity(linear_case(model, torch.rand(2, 2), torch.tensor([0, 1])))
    assert found["0.weight"].any()
    assert not found["idle.weight"].any()


def test_score_learns_from_snip_rescaled():
    """Logits (1, 1 + ln 3): p = (1/4, 3/4), y = 0, so dL/dW = (-3/4, 3/4) x^T."""
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 1.0 + log(3)]]))
    context = linear_case(model, torch.tensor([[5.0, 1.0]]), torch.tensor([0]))
    asked = []

    def learn(start):
        asked.append(start)
        return start

    # |g w| = 3/4 ((0, 1), (0, 1 + ln 3)); then sqrt(6 / 2) / max.
    context = example_context(
        PrunerContext,
        model=model,
        weights=context.weights,
        batches=context.batches,
        attach=lambda start: start,
        train=learn,
    )
    build_score(ScoreOptions(start="snip"), example_context(PrunerContext))(context)
    (start,) = asked
    assert start.layerwise
    expected = torch.tensor([[0.0, sqrt(3) / (1 + log(3))], [0.0, sqrt(3)]])
    torch.testing.assert_close(start.values["weight"], expected)
