"""The verifier: who proves what, and what is neither proved nor refuted."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import prunekit_lirpa
import pytest
import torch
from prunekit_lirpa import VerifiedOptions, evaluators
from prunekit_lirpa.bounds import Bounds
from prunekit_lirpa.evaluators import FAILED, LATE, MISCLASSIFIED, OPEN
from prunekit_lirpa.margins import is_certain, surround
from torch import Tensor, nn

from prunekit import Use, UserError
from prunekit.contexts import EvaluatorContext
from prunekit.contracts import Result, Threat
from prunekit.errors import Interrupted, OptionError
from prunekit.testing import example_context

SHAPE, K, EPS = (2, 6, 6), 3, 0.02
(COMPONENT,) = prunekit_lirpa.prunekit_evaluators()


def make_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, K),
    )  # fmt: skip
    with torch.no_grad():
        for layer in (net[0], net[3], net[5]):
            layer.weight.mul_(3)
    return net.eval()


def make_batch(net: nn.Module, n: int = 40) -> tuple[Tensor, Tensor]:
    """The first two images are misclassified."""
    torch.manual_seed(1)
    x = torch.rand(n, *SHAPE)
    y = net(x).argmax(1)
    y[:2] = (y[:2] + 1) % K
    return x, y


def verify(net: nn.Module, *batches: tuple[Tensor, Tensor], **options: Any) -> Result:
    """Evaluate as the core does: from the declaration."""
    threat = Threat("linf", EPS)
    use: Use[Any] = Use(COMPONENT, VerifiedOptions(**options), threat=threat)
    return use.build(example_context(EvaluatorContext, model=net))(net, iter(batches))


def test_each_image_is_proved_by_the_cheapest_bound_that_can() -> None:
    net = make_net()
    x, y = make_batch(net)
    result = verify(net, (x[:30], y[:30]), (x[30:], y[30:]))
    box = surround(x, EPS)
    best = torch.full((40, K - 1), -torch.inf)
    expected = np.array([MISCLASSIFIED] * 2 + [OPEN] * 38, dtype="<U13")
    for name in ("ibp", "crown-ibp", "crown"):
        best = torch.maximum(best, Bounds(net, SHAPE, detached=True).margins(box, y, name))
        proved = (best > 1e-5).all(1).numpy() & (expected == OPEN)
        expected[proved] = name
        verified = np.isin(expected, ("ibp", "crown-ibp", "crown")).mean()
        assert result.metrics[f"{name}_verified"] == pytest.approx(verified)
    assert result.records["method"].tolist() == expected.tolist()
    assert set(expected) == {MISCLASSIFIED, OPEN, "ibp", "crown-ibp", "crown"}
    assert result.metrics["verified"] == result.metrics["crown_verified"]
    assert result.metrics["accuracy"] == pytest.approx(38 / 40)
    assert (result.metrics["errors"], result.metrics["timeouts"], result.metrics["verified"].n) == (
        0,
        0,
        40,
    )
    assert (
        result.metrics["verified"].low
        < result.metrics["verified"]
        < result.metrics["verified"].high
    )
    assert (result.records["verified"] == np.isin(expected, ("ibp", "crown-ibp", "crown"))).all()
    margin = result.records["margin"]
    assert np.isnan(margin[:2]).all()
    open_ = expected == OPEN
    np.testing.assert_allclose(margin[open_], best.amin(1).numpy()[open_], atol=1e-6)
    assert (margin[open_] < 1e-5).all()


@pytest.mark.parametrize("options", [{"batch": 7}, {"precision": "fp64"}, {"seconds": 600.0}])
def test_batches_precision_and_time_do_not_change_verdicts(options: dict[str, Any]) -> None:
    net = make_net()
    batch = make_batch(net, 20)
    plain, other = verify(net, batch), verify(net, batch, **options)
    assert plain.records["method"].tolist() == other.records["method"].tolist()
    np.testing.assert_allclose(plain.records["margin"], other.records["margin"], atol=1e-4)


@pytest.mark.parametrize("method", ["crown", "alpha-crown"])
def test_large_logits_are_no_reason_for_a_false_proof(method: str) -> None:
    """Logits in the thousands, margins just below 0: float32 alone finds proofs that are false."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 40), nn.ReLU(), nn.Linear(40, 2)).eval()
    first, last = net[1], net[3]
    with torch.no_grad():
        first.weight.abs_()  # all neurons are active: the bounds are exact but for rounding
        first.bias.abs_()
        last.weight.mul_(3000)
        last.bias.zero_()
    exact, y, false = copy.deepcopy(net).double(), torch.tensor([0]), 0
    for _ in range(5):
        x = torch.rand(1, *SHAPE)
        box = surround(x.double(), EPS)
        slope = (exact[3].weight[0] - exact[3].weight[1]) @ exact[1].weight
        corner = torch.where(slope > 0, box.lower.flatten(), box.upper.flatten())
        with torch.no_grad():
            one, other = exact(corner.view(1, *SHAPE))[0].tolist()
            last.bias[0] += other - one - 5e-5
            exact[3].bias.copy_(last.bias.double())
            one, other = exact(corner.view(1, *SHAPE))[0].tolist()
        assert -1e-4 < one - other < 0
        rounded = Bounds(net, SHAPE, detached=True).margins(surround(x, EPS), y, "crown")
        false += int(is_certain(rounded))
        assert verify(net, (x, y), methods=(method,)).metrics["verified"] == 0
    assert false > 2
    with torch.no_grad():
        last.bias[0] += 1
    assert verify(net, (x, y), methods=(method,)).metrics["verified"] == 1


def test_alpha_crown_proves_no_less() -> None:
    net = make_net()
    batch = make_batch(net, 12)
    crown = verify(net, batch, methods=("crown",))
    alpha = verify(net, batch, methods=("crown", "alpha-crown"), iterations=5)
    assert (alpha.records["verified"] >= crown.records["verified"]).all()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_failure_is_an_error_and_not_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """crown-ibp breaks down; what crown proves after it is proved, the rest are errors."""
    net = make_net()
    batch = make_batch(net)
    plain = verify(net, batch)
    original = Bounds.margins

    def margins(self: Bounds, box: Any, y: Tensor, method: str) -> Tensor:
        if method == "crown-ibp":
            raise RuntimeError("out of luck\nand more")
        return original(self, box, y, method)

    monkeypatch.setattr(Bounds, "margins", margins)
    with pytest.warns(
        UserWarning, match="crown-ibp failed on some images.*RuntimeError: out of luck$"
    ):
        result = verify(net, batch)
    assert (result.records["verified"] == plain.records["verified"]).all()
    opened = plain.records["method"] == OPEN
    assert (result.records["method"][opened] == FAILED).all()
    assert result.metrics["errors"] == opened.sum() > 0
    assert "crown-ibp" not in result.records["method"]


def test_time_that_is_up_is_a_timeout_and_not_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    batch = make_batch(net)
    plain = verify(net, batch)
    passed = [0.0]

    def monotonic() -> float:
        return passed[0]

    original = Bounds.margins

    def margins(self: Bounds, box: Any, y: Tensor, method: str) -> Tensor:
        passed[0] += 10.0 if method == "crown" else 0.0
        return original(self, box, y, method)

    monkeypatch.setattr(evaluators.time, "monotonic", monotonic)
    monkeypatch.setattr(Bounds, "margins", margins)
    result = verify(net, batch, seconds=5.0)
    late = result.records["method"] == LATE
    assert (late == np.isin(plain.records["method"], (OPEN, "crown"))).all()
    assert result.metrics["timeouts"] == late.sum() > 0
    assert result.metrics["errors"] == 0
    # The next batch begins anew.
    again = verify(net, batch, seconds=20.0)
    assert again.records["method"].tolist() == plain.records["method"].tolist()


def add_for_hours() -> None:
    x = torch.zeros(10)
    with evaluators.Watch(time.monotonic() + 0.05, lambda: None):
        for _ in range(10**9):
            x = x + 1


def test_a_deadline_ends_a_computation_in_the_middle() -> None:
    with pytest.raises(evaluators.OutOfTimeError):
        add_for_hours()


def test_a_stop_within_a_bound_is_no_failure_of_it() -> None:
    net = make_net()
    x, y = make_batch(net)
    calls = 0

    def pause() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Interrupted

    judge = evaluators.Verified(EPS, VerifiedOptions(), pause=pause)
    with pytest.raises(Interrupted):
        judge(net, [(x, y)])
    assert calls == 5


def test_outputs_that_are_no_numbers_are_told() -> None:
    net = make_net()
    batch = make_batch(net, 4)
    with torch.no_grad():
        net[5].bias.fill_(float("nan"))
    with pytest.raises(UserError, match="outputs are not finite"):
        verify(net, batch)


def test_methods_are_named_once_and_at_least_one() -> None:
    with pytest.raises(OptionError, match="leave methods out"):
        VerifiedOptions(methods=())
    with pytest.raises(OptionError, match="twice"):
        VerifiedOptions(methods=("ibp", "ibp"))


def test_a_threat_that_can_be_verified() -> None:
    assert VerifiedOptions.norms == ("linf",)
    use: Use[Any] = Use(COMPONENT, VerifiedOptions())
    with pytest.raises(UserError, match=r"\[threat\]"):
        use.build(example_context(EvaluatorContext, model=make_net()))


def test_a_verification_that_was_stopped_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = make_net()
    x, y = make_batch(net, 24)
    batches = list(zip(x.split(8), y.split(8), strict=True))
    whole = verify(net, *batches)
    judged: list[int] = []
    original = evaluators.Verified._verify

    def stop(self: Any, bounds: Bounds, x: Tensor, y: Tensor) -> dict[str, np.ndarray]:
        judged.append(len(y))
        if len(judged) == 2:
            raise Interrupted
        return original(self, bounds, x, y)

    monkeypatch.setattr(evaluators.Verified, "_verify", stop)
    evaluator = evaluators.Verified(EPS, VerifiedOptions(), tmp_path)
    with pytest.raises(Interrupted):
        evaluator(net, batches)
    again = evaluator(net, batches)
    assert judged == [8, 8, 8, 8]
    for name, values in whole.records.items():
        np.testing.assert_array_equal(again.records[name], values)
    assert again.metrics == whole.metrics
