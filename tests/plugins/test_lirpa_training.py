"""Certified training losses against their formulas, and through the stages of a run."""

from __future__ import annotations

import copy
from typing import Any

import prunekit_lirpa
import pytest
import torch
from prunekit_lirpa.bounds import Bounds
from prunekit_lirpa.margins import robust_cross_entropy, surround
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit import Use, UserError
from prunekit.contexts import ObjectiveContext
from prunekit.contracts import Clock, Scores, Threat
from prunekit.pruning.layers import find_prunable
from prunekit.pruning.masks import apply_masks
from prunekit.pruning.selection import Selection
from prunekit.testing import example_context
from prunekit.training.masking import LearnedScores, Weights

CLOCK = Clock(0, 10, 0, 2)

COMPONENTS = {component.name: component for component in prunekit_lirpa.prunekit_objectives()}
SHAPE, K = (1, 4, 4), 3
THREAT = Threat("linf", 0.05)


def build(
    name: str,
    model: nn.Module,
    stage: str = "pretrain",
    threat: Threat | None = THREAT,
    **options: Any,
) -> Any:
    """Build as the core does: from the declaration."""
    component = COMPONENTS[name]
    use: Use[Any] = Use(component, component.options(**options), threat=threat)
    return use.build(
        example_context(ObjectiveContext, model=model, shape=SHAPE, classes=K, stage=stage)
    )


def make_net(*, bn: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 2, stride=2), nn.BatchNorm2d(4) if bn else nn.Identity(),
        nn.ReLU(), nn.Flatten(), nn.Linear(16, K),
    )  # fmt: skip


def make_batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(6, *SHAPE), torch.tensor([0, 1, 2, 0, 1, 2])


def at(step: int, steps: int = 100, epochs: int = 10) -> Clock:
    return Clock(step, steps, step * epochs // steps, epochs)


def reference(net: nn.Module, eps: float, method: str, relu: Any = "adaptive") -> Tensor:
    """The loss at the worst logits that the method allows, in eval mode."""
    x, y = make_batch()
    return robust_cross_entropy(Bounds(net, SHAPE, relu).margins(surround(x, eps), y, method))


# Ramps


@pytest.mark.parametrize("options", [{"ramp": 0.5}, {"ramp_epochs": 5.0}])
def test_ibp_blends_over_the_ramp(options: dict[str, Any]) -> None:
    """Step 25 of a ramp of 50: eps / 2 and kappa half way from 1 to 1/2."""
    net, (x, y) = make_net(), make_batch()
    objective = build("ibp", net, **options)
    natural = F.cross_entropy(net(x), y)
    for step, eps, kappa in ((0, 0.0, 1.0), (25, 0.025, 0.75), (50, 0.05, 0.5), (99, 0.05, 0.5)):
        loss = objective(x, y, at(step))
        robust = reference(net, eps, "ibp")
        torch.testing.assert_close(loss.value, kappa * natural + (1 - kappa) * robust)
        torch.testing.assert_close(loss.terms["robust"], robust.detach())
        torch.testing.assert_close(loss.terms["natural"], natural.detach())
    settled = [objective.settled(at(step)) for step in (49, 50, 99)]
    assert settled == [False, True, True]


def test_crown_ibp_mixes_both_bounds_over_the_ramp() -> None:
    """Step 15 of a ramp of 60 (0.6): eps / 4, and 3/4 CROWN-IBP with 1/4 IBP."""
    net, (x, y) = make_net(), make_batch()
    objective = build("crown-ibp", net)
    box = surround(x, 0.0125)
    ibp, crown = (Bounds(net, SHAPE).margins(box, y, m) for m in ("ibp", "crown-ibp"))
    assert not torch.equal(ibp, crown)
    loss = objective(x, y, at(15))
    torch.testing.assert_close(loss.value, robust_cross_entropy(0.75 * crown + 0.25 * ibp))
    torch.testing.assert_close(objective(x, y, at(60)).value, reference(net, 0.05, "ibp"))
    with_clean = build("crown-ibp", net, kappa_end=0.5, mix_end=1.0)(x, y, at(60)).value
    natural = F.cross_entropy(net(x), y)
    expected = natural / 2 + reference(net, 0.05, "crown-ibp") / 2
    torch.testing.assert_close(with_clean, expected)


@pytest.mark.parametrize("name", ["ibp", "crown-ibp"])
@pytest.mark.parametrize("stage", ["prune", "finetune"])
def test_later_stages_have_the_whole_eps_from_the_first_step(name: str, stage: str) -> None:
    net, (x, y) = make_net(), make_batch()
    objective = build(name, net, stage)
    loss = objective(x, y, at(0))
    torch.testing.assert_close(loss.terms["robust"], reference(net, 0.05, "ibp").detach())
    assert objective.settled(at(0))


def test_mixtrain_ramps_by_epochs_and_grows_its_weight_after() -> None:
    """A ramp of 2 epochs: eps 0, 1/2, then 1; weight 0.1, times 2.5 every 2 epochs, at most 0.5."""
    net, (x, y) = make_net(), make_batch()
    objective = build("mixtrain", net, ramp_epochs=2, every=2, most=0.5, probability=1.0, images=3)
    natural = F.cross_entropy(net(x), y)
    bounds = Bounds(net, SHAPE, "same-slope")
    expected = {0: (0.0, 0.1), 1: (0.025, 0.1), 2: (0.05, 0.1), 3: (0.05, 0.1), 4: (0.05, 0.25),
                6: (0.05, 0.5), 8: (0.05, 0.5)}  # fmt: skip
    for epoch, (eps, weight) in expected.items():
        for step in (10 * epoch, 10 * epoch + 9):  # the same within an epoch
            torch.manual_seed(epoch)
            loss = objective(x, y, at(step))
            torch.manual_seed(epoch)
            torch.rand(())
            drawn = torch.randint(6, (3,))
            lower = bounds.margins(surround(x[drawn], eps), y[drawn], "crown")
            torch.testing.assert_close(loss.value, natural + weight * robust_cross_entropy(lower))
    assert [objective.settled(at(step)) for step in (9, 19, 20)] == [False, False, True]
    later = build("mixtrain", net, "finetune", ramp_epochs=2, every=2)
    assert [later._weight(at(step)) for step in (0, 20)] == pytest.approx([0.1, 0.25])
    assert later.settled(at(0))


def test_mixtrain_bounds_so_many_batches() -> None:
    net, (x, y) = make_net(), make_batch()
    objective = build("mixtrain", net, "finetune", probability=0.25)
    torch.manual_seed(0)
    bounded = sum(float(objective(x, y, at(0)).terms["robust"]) > 0 for _ in range(40))
    assert 4 <= bounded <= 16


def test_a_fraction_of_a_ramp_is_rounded_up_to_epochs() -> None:
    objective = build("mixtrain", make_net(), ramp=0.25)
    assert objective.ramp.by_epoch(at(29)) == pytest.approx(2 / 3)
    assert objective.ramp.by_epoch(at(30)) == 1
    seven = build("mixtrain", make_net(), ramp=0.07)  # of 100 epochs, in decimals: 7, not 8
    assert seven.ramp.by_epoch(Clock(7, 100, 7, 100)) == 1


@pytest.mark.parametrize("name", ["ibp", "mixtrain"])
def test_a_ramp_that_outlasts_the_stage_is_refused(name: str) -> None:
    x, y = make_batch()
    with pytest.raises(UserError, match=r"ramp_epochs = 10 leaves none of the stage's 10 epochs"):
        build(
            name, make_net(), ramp_epochs=10, **{"probability": 1.0} if name == "mixtrain" else {}
        )(x, y, at(0))
    build(name, make_net(), ramp_epochs=0)(x, y, at(0))


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_threat_that_can_be_bounded(name: str) -> None:
    assert COMPONENTS[name].options.norms == ("linf",)
    with pytest.raises(UserError, match=r"\[threat\]"):
        build(name, make_net(), threat=None)


# Networks


@pytest.mark.parametrize("name", COMPONENTS)
def test_batch_normalisation_is_bounded_as_in_eval_mode(name: str) -> None:
    """The clean forward pass moves the statistics first; the bounds use and do not move them."""
    net, (x, y) = make_net(bn=True), make_batch()
    twin = copy.deepcopy(net)
    twin(x)
    objective = build(name, net, "finetune", **{"probability": 1.0} if name == "mixtrain" else {})
    torch.manual_seed(0)
    loss = objective(x, y, at(0))
    for found, expected in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
    if name != "mixtrain":
        torch.testing.assert_close(
            loss.terms["robust"], reference(twin.eval(), 0.05, "ibp").detach()
        )
    loss.value.backward()
    assert net[1].weight.grad.any()
    assert net.training


@pytest.mark.parametrize("name", COMPONENTS)
def test_validation_is_at_the_whole_eps_with_the_bound_of_training(name: str) -> None:
    net, (x, y) = make_net(), make_batch()
    y = net(x).argmax(1)
    y[0] = (y[0] + 1) % K
    net.eval()
    method = {"mixtrain": "crown"}.get(name, "ibp")
    relu: Any = "same-slope" if name == "mixtrain" else "adaptive"
    for eps in (0.001, 0.01):
        objective = build(name, net, threat=Threat("linf", eps))
        values = objective.validate(x, y)
        lower = Bounds(net, SHAPE, relu).margins(surround(x, eps), y, method)
        assert values["accuracy"].tolist() == [0, 1, 1, 1, 1, 1]
        assert values["verified_accuracy"].tolist() == (lower > 1e-5).all(1).float().tolist()
    assert COMPONENTS[name].select in values
    values = objective.validate(x, (net(x).argmax(1) + 1) % K)
    assert not any(value.any() for value in values.values())


@pytest.mark.parametrize("name", COMPONENTS)
def test_scores_learn_and_weights_stay(name: str) -> None:
    net, (x, y) = make_net(bn=True), make_batch()
    weights = {n: w.detach().clone() for n, w in find_prunable(net).items()}
    objective = build(name, net, "prune", **{"probability": 1.0} if name == "mixtrain" else {})
    start = Scores({n: torch.randn_like(w) for n, w in weights.items()})
    trained = LearnedScores(net, start, Selection(0.5), {}, "train")
    before = {n: part.score.detach().clone() for n, part in trained.parts.items()}
    optimizer = torch.optim.SGD(trained.parameters()[0].parameters, lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        with trained.effective(CLOCK):
            objective(x, y, at(step)).value.backward()
        optimizer.step()
    assert all((part.score != before[n]).any() for n, part in trained.parts.items())
    trained.detach()
    for n, weight in find_prunable(net).items():
        assert torch.equal(weight, weights[n])


@pytest.mark.parametrize("name", COMPONENTS)
def test_removed_weights_stay_removed(name: str) -> None:
    net, (x, y) = make_net(), make_batch()
    masks = {n: torch.rand_like(w) > 0.5 for n, w in find_prunable(net).items()}
    apply_masks(net, masks)
    trained = Weights(net, masks)
    objective = build(name, net, "finetune", **{"probability": 1.0} if name == "mixtrain" else {})
    optimizer = torch.optim.Adam(trained.parameters()[0].parameters, lr=0.01)
    losses = []
    for step in range(30):
        torch.manual_seed(0)
        optimizer.zero_grad()
        with trained.effective(CLOCK):
            loss = objective(x, y, at(step))
            loss.value.backward()
        trained.after_backward()
        optimizer.step()
        losses.append(float(loss.value.detach()))
    trained.check()
    assert losses[-1] < losses[0]
