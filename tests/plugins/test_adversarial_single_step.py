"""FGSM-RS and N-FGSM: their images by hand, their ramp, and when they give up."""

from typing import Any

import pytest
import torch
from prunekit_adversarial import prunekit_objectives
from torch import Tensor, nn

from prunekit.catalog.component import Use
from prunekit.contexts import ObjectiveContext
from prunekit.contracts import Clock, Threat
from prunekit.testing import check_component, example_context

COMPONENTS = {component.name: component for component in prunekit_objectives()}
NAMES = ("fgsm-rs", "n-fgsm")
CLOCK = Clock(step=0, steps=1, epoch=0, epochs=1)


class Along(nn.Module):
    """Logits (w x, -w x) of an image of four pixels: where its label is 0, the loss falls with w x;
    the gradient's sign is -sign(w)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -1.0, 1.0, -1.0]))

    def forward(self, x: Tensor) -> Tensor:
        along = x.flatten(1) @ self.w
        return torch.stack([along, -along], 1)


def build(name: str, **options: Any) -> Any:
    component = COMPONENTS[name]
    use: Use[Any] = Use(component, component.options(**options), threat=Threat("linf", 0.1))
    return use.build(example_context(ObjectiveContext, model=Along()))


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of 0.9, -0.5, 0.1 and -1 times its reach."""

    def uniform(self: Tensor, low: float, high: float) -> Tensor:
        assert low == -high
        return self.copy_(high * torch.tensor([0.9, -0.5, 0.1, -1.0]).view_as(self))

    monkeypatch.setattr(Tensor, "uniform_", uniform)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # From 0.68, 0.4, 0.97 and 0 (0.1 - 0.2, clamped), one step of 0.1 against w.
        ("n-fgsm", {}, [0.58, 0.5, 0.87, 0.1]),
        ("n-fgsm", {"noise": 3}, [0.67, 0.45, 0.88, 0.1]),
        # From 0.59, 0.45, 0.96 and 0, one step of 0.125, within 0.1 of the image.
        ("fgsm-rs", {}, [0.465, 0.575, 0.85, 0.125]),
        ("fgsm-rs", {"step": 2}, [0.4, 0.6, 0.85, 0.2]),
    ],
)
def test_its_image_by_hand(
    draw: None, name: str, options: dict[str, Any], expected: list[float]
) -> None:
    x = torch.tensor([0.5, 0.5, 0.95, 0.1]).view(1, 1, 2, 2)
    objective = build(name, **options)
    prepared = objective.prepare(x, torch.tensor([0]), CLOCK)
    assert prepared.adversarial.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    along = expected[0] - expected[1] + expected[2] - expected[3]
    loss = objective.loss(prepared, CLOCK)
    assert loss.logits.flatten().tolist() == pytest.approx([along, -along], abs=1e-6)
    value = torch.log1p(torch.exp(torch.tensor(-2 * along)))
    assert float(loss.value.detach()) == pytest.approx(float(value), abs=1e-6)


def test_n_fgsm_leaves_the_ball(draw: None) -> None:
    """Noise of 2 eps and a step of eps reach 3 eps: 0.5 + 0.2 * 0.9 + 0.1 against the sign."""
    x = torch.tensor([0.5, 0.5, 0.5, 0.5]).view(1, 1, 2, 2)
    prepared = build("n-fgsm").prepare(x, torch.tensor([1]), CLOCK)
    assert prepared.adversarial.flatten().tolist() == pytest.approx([0.78, 0.3, 0.62, 0.2])


@pytest.mark.parametrize("name", NAMES)
def test_eps_grows_over_the_ramp(draw: None, name: str) -> None:
    objective = build(name, ramp=2)
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    moves = []
    for step in range(12):  # 4 epochs of 3 steps
        clock = Clock(step, 12, step // 3, 4)
        moves.append(float((objective.prepare(x, y, clock).adversarial - x).flatten()[1]))
    full = float((build(name).prepare(x, y, CLOCK).adversarial - x).flatten()[1])
    grown = [min(1, step / 6) * full for step in range(12)]
    assert moves == pytest.approx(grown, abs=1e-6)
    ends = [objective.settled(Clock(3 * e + 2, 12, e, 4)) for e in range(4)]
    assert ends == [False, False, True, True]


def rows(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
    """Epochs of (accuracy in training, robust accuracy in validation)."""
    return [{"accuracy": a, "validation.robust_accuracy": r} for a, r in pairs]


@pytest.mark.parametrize(
    ("history", "fails"),
    [
        (rows((0.3, 0.3), (0.4, 0.35)), False),
        (rows((0.3, 0.55), (0.4, 0.5)), False),  # by 5 points, not more
        (rows((0.3, 0.55), (0.4, 0.49)), True),
        (rows((0.3, 0.55), (0.3, 0.1)), False),  # nothing rose
        (rows((0.3, 0.3), (0.4, 0.55), (0.45, 0.4)), True),
        (rows((0.3, 0.2), (0.4, 0.55), (0.35, 0.4)), False),  # above the first, not the one before
        # Ordinary robust overfitting, slow: 5.2 points below the best, 1.2 below the one before.
        (rows((0.5, 0.42), (0.55, 0.4), (0.6, 0.38), (0.65, 0.368)), False),
        (rows((0.3, 0.55)), False),
        ([{"accuracy": 0.1}, {"accuracy": 0.9}], False),  # nothing is validated
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_catastrophic(name: str, history: list[dict[str, Any]], fails: bool) -> None:
    assert build(name).halts(history).startswith("catastrophic overfitting") == fails
    assert not build(name, drop=1.0).halts(history)


def test_why_it_halts() -> None:
    assert build("n-fgsm").halts(rows((0.3, 0.41), (0.9, 0.03))) == (
        "catastrophic overfitting: robust accuracy fell from 41.0% to 3.0% on validation images, "
        "and rose from 30.0% to 90.0% under the single step of training; lower the optimizer's lr, "
        "or use n-fgsm or pgd-at"
    )


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str) -> None:
    check_component(COMPONENTS[name], {"eps": 0.1})
