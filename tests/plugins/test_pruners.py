"""The pruners' scores by hand."""

from math import sqrt

import pytest
import torch
from prunekit_pruners.scores import build_lwm, build_random, build_score, scaled_start

from prunekit import NoOptions
from prunekit.contracts import Context, Scores
from prunekit.seeds import generator
from prunekit.selection import Selection, select


def test_scaled_start_by_hand():
    """fan_in 3, max|w| 4: s = sqrt(2) w / 4, signs kept."""
    weight = torch.tensor([[1.0, -2.0, 0.0], [4.0, -1.0, 2.0]])
    expected = sqrt(2) / 4 * weight
    torch.testing.assert_close(scaled_start(weight), expected)


def test_fan_in_of_a_convolution():
    weight = torch.zeros(8, 3, 2, 2)  # fan_in 12
    weight[0, 0, 0, 0] = -5.0
    assert scaled_start(weight).min().item() == pytest.approx(-sqrt(0.5))


def test_a_layer_of_zeros_starts_at_zero():
    assert not scaled_start(torch.zeros(2, 2)).any()


def test_the_start_does_not_share_the_weights():
    weight = torch.nn.Parameter(torch.ones(1, 6))
    start = scaled_start(weight)
    assert not start.requires_grad
    start.add_(1)
    assert weight.tolist() == [[1.0] * 6]


def test_the_start_selects_as_magnitude_does():
    weights = {"a": torch.randn(7, 9), "b": torch.randn(3, 2, 3, 3)}
    start = Scores({n: scaled_start(w).abs() for n, w in weights.items()})
    magnitude = build_lwm(NoOptions(), Context())(Context(weights=weights))
    for name, mask in select(start, Selection(0.8)).items():
        assert torch.equal(mask, select(magnitude, Selection(0.8))[name])


def test_score_learns_from_the_scaled_start():
    weights = {"a": torch.tensor([[2.0, -1.0]])}
    asked = []

    def learn(start):
        asked.append(start)
        return Scores({"a": torch.tensor([[0.25, 0.5]])}, layerwise=True)

    result = build_score(NoOptions(), Context())(Context(weights=weights, learn=learn))
    assert result.values["a"].tolist() == [[0.25, 0.5]]
    (start,) = asked
    assert start.layerwise
    assert start.values["a"].tolist() == [pytest.approx([sqrt(3), -sqrt(3) / 2])]


def test_lwm_is_the_magnitude():
    scores = build_lwm(NoOptions(), Context())(Context(weights={"a": torch.tensor([-3.0, 2.0])}))
    assert scores.values["a"].tolist() == [3.0, 2.0]
    assert not scores.layerwise


def test_random_follows_the_generator_alone():
    weights = {"a": torch.zeros(50), "b": torch.zeros(2, 3)}

    def draw(seed):
        context = Context(weights=weights, generator=generator(seed))
        return build_random(NoOptions(), context)(context).values

    first, again, other = draw(0), draw(0), draw(1)
    assert first["b"].shape == (2, 3)
    assert 0 <= first["a"].min() <= first["a"].max() < 1
    assert torch.equal(first["a"], again["a"])
    assert not torch.equal(first["a"], other["a"])
