"""The adversarial plugin against closed forms and plain float64 references."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import prunekit_adversarial
import pytest
import torch
from prunekit_adversarial.again import Leaking, square
from prunekit_adversarial.attacks import (
    L2,
    Attack,
    Linf,
    is_correct,
    maximize_kl,
    pgd,
    plan_attack,
    predict,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from prunekit import RunError, Use, UserError
from prunekit.contexts import EvaluatorContext
from prunekit.contracts import Clock, Threat
from prunekit.testing import example_context

COMPONENTS = {
    component.name: component
    for declare in (
        prunekit_adversarial.prunekit_objectives,
        prunekit_adversarial.prunekit_evaluators,
    )
    for component in declare()
}
CLOCK = Clock(step=0, steps=1, epoch=0, epochs=1)
LINF, BALL = Threat("linf", 0.1), Threat("l2", 0.2)


def build(name: str, threat: Threat | None, model: nn.Module, **options: Any) -> Any:
    """Build as the core does: from the declaration."""
    component = COMPONENTS[name]
    use: Use[Any] = Use(component, component.options(**options), threat=threat)
    return use.build(example_context(EvaluatorContext, model=model))


def make_net() -> nn.Module:
    """A float64 net of (B, 2, 4, 4), in train mode, whose batch norm differs between the modes."""
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(3)
    norm.running_mean.uniform_(-0.5, 0.5)
    norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), norm, nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    )
    with torch.no_grad():
        model[4].weight.mul_(4)
    return model.double()


def make_batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x = torch.rand(5, 2, 4, 4, dtype=torch.float64)
    x[:, 0, 0] = 0.0  # at the edge of the box
    x[:, 0, 1] = 1.0
    return x, torch.tensor([0, 1, 2, 0, 1])


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    p, q = p_logits.softmax(1), q_logits.softmax(1)
    return (p * (p.log() - q.log())).sum(1)


def reference_attack(model: nn.Module, x: Tensor, threat: Threat, noise: Tensor) -> Tensor:
    """TRADES-10 as METHODS words it, image by image; `model` is in eval mode."""
    delta, eps = 0.001 * noise, threat.eps
    for i in range(len(x)):
        image, d = x[i : i + 1], delta[i : i + 1].clone()
        for _ in range(10):
            d.requires_grad_()
            (g,) = torch.autograd.grad(kl(model(image).detach(), model(image + d)).sum(), d)
            d = d.detach()
            if threat.norm == "linf":
                d = (d + eps / 4 * g.sign()).clamp(-eps, eps)
                d = (image + d).clamp(0, 1) - image
            else:
                d = d + 2 * eps / 10 * g / g.norm()
                d = (image + d).clamp(0, 1) - image
                d = d * min(1.0, eps / float(d.norm()))
        delta[i] = d[0]
    return (x + delta).clamp(0, 1)


class Margin(nn.Module):
    """Logits (margin(x), 0) of images of one pixel, (B, 1, 1, 1)."""

    def __init__(self, margin: Any) -> None:
        super().__init__()
        self.margin = margin
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        margin = self.margin(x.flatten(1))
        return torch.cat([margin, torch.zeros_like(margin)], 1)


def make_pixels(values: list[float]) -> tuple[Tensor, Tensor]:
    """Images of one pixel and label 0."""
    x = torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)
    return x, torch.zeros(len(x), dtype=torch.long)


# The images of `make_linear`: at these multiples of the margin that an attack can just take away.
RATIOS = np.array([-0.5, 0.2, 0.9, 0.97, 1.03, 1.1, 1.5])


def make_linear(threat: Threat) -> tuple[nn.Module, Tensor, Tensor]:
    """Logits (w.v, -w.v) with v = x - 1/2: robust where w.v > eps * (dual norm of w)."""
    torch.manual_seed(3)
    w = torch.randn(8, dtype=torch.float64)
    dual = w.abs().sum() if threat.norm == "linf" else w.norm()
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([w, -w]))
        model[1].bias.copy_(model[1].weight @ torch.full((8,), -0.5, dtype=torch.float64))
    away = torch.from_numpy(RATIOS)[:, None] * threat.eps * dual * w / w.dot(w)
    x = (0.5 + away).reshape(-1, 2, 2, 2)
    assert x.min() > threat.eps
    assert x.max() < 1 - threat.eps
    return model, x, torch.zeros(len(x), dtype=torch.long)


# --- balls ---------------------------------------------------------------------------------------


def test_linf_ball_clamps_to_eps_and_box() -> None:
    x, _ = make_pixels([0.5, 0.05, 0.98])
    far, _ = make_pixels([0.9, -0.3, 1.5])
    assert Linf(0.1).project(far, x).flatten().tolist() == pytest.approx([0.6, 0.0, 1.0])
    assert Linf(0.1).direction(far).flatten().tolist() == [1, -1, 1]


def test_l2_ball_clamps_to_the_box_before_it_shortens() -> None:
    x = torch.tensor([[0.5, 0.5], [0.9, 0.5]], dtype=torch.float64).reshape(2, 1, 1, 2)
    to = torch.tensor([[0.8, 0.9], [1.5, 0.8]], dtype=torch.float64).reshape(2, 1, 1, 2)
    found = L2(0.25).project(to, x).reshape(2, 2)
    # (0.3, 0.4) is halved; (0.6, 0.3) is cut to (0.1, 0.3) by the box, then shortened.
    shorter = 0.25 / np.hypot(0.1, 0.3)
    expected = [[0.65, 0.7], [0.9 + 0.1 * shorter, 0.5 + 0.3 * shorter]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_l2_direction_is_a_unit_vector_or_a_draw_where_the_gradient_is_zero() -> None:
    gradient = torch.zeros(3, 1, 2, 2)
    gradient[1] = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    gradient[2] = torch.tensor([[3.0, 0.0], [0.0, -4.0]]) * 1e-30  # its square underflows
    torch.manual_seed(0)
    draw = torch.randn_like(gradient)
    torch.manual_seed(0)
    found = L2(1.0).direction(gradient)
    torch.testing.assert_close(found[0], draw[0])
    for image in found[1:]:
        torch.testing.assert_close(image, torch.tensor([[[0.6, 0.0], [0.0, -0.8]]]))


def test_starts_are_uniform_in_the_ball_and_stay_in_the_box() -> None:
    torch.manual_seed(0)
    x = torch.full((4000, 1, 2, 2), 0.5)
    offsets = (Linf(0.1).start(x) - x).flatten()
    assert offsets.abs().max() <= 0.1 + 1e-6
    assert offsets.abs().mean() == pytest.approx(0.05, abs=0.002)
    assert offsets.mean() == pytest.approx(0.0, abs=0.002)
    offsets = (L2(0.1).start(x) - x).flatten(1)
    volume = (offsets.norm(dim=1) / 0.1) ** 4  # of the ball inside the draw: uniform on [0, 1]
    assert volume.max() <= 1 + 1e-4
    assert volume.mean() == pytest.approx(0.5, abs=0.02)
    assert offsets.mean(0).abs().max() < 0.005
    for ball in (Linf(0.5), L2(0.5)):
        for corner in (0.0, 1.0):
            start = ball.start(torch.full_like(x, corner))
            assert 0 <= start.min() <= start.max() <= 1


# --- attacks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [LINF, BALL], ids=["linf", "l2"])
def test_the_attack_of_trades_follows_the_reference(threat: Threat) -> None:
    model, (x, _) = make_net(), make_batch()
    torch.manual_seed(4)
    noise = torch.randn_like(x)
    torch.manual_seed(4)
    found = maximize_kl(model, x, build("trades", threat, model).attack)
    expected = reference_attack(copy.deepcopy(model).eval(), x, threat, noise)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (found - x).abs().max() > threat.eps / 10


@pytest.mark.parametrize("threat", [LINF, BALL], ids=["linf", "l2"])
def test_pgd_climbs_from_its_random_start(threat: Threat) -> None:
    model, (x, y) = make_net(), make_batch()
    plan = plan_attack(threat, steps=2, step_size=threat.eps / 10)
    torch.manual_seed(5)
    found = pgd(model, x, y, plan)
    torch.manual_seed(5)
    expected = plan.ball.start(x)
    model.eval()
    for _ in range(2):
        expected = expected.detach().requires_grad_()
        (-model(expected).log_softmax(1)[range(5), y].sum()).backward()
        ascent = plan.ball.direction(expected.grad)
        expected = plan.ball.project(expected.detach() + threat.eps / 10 * ascent, x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("threat", [LINF, BALL], ids=["linf", "l2"])
@pytest.mark.parametrize("attack", ["pgd", "kl"])
def test_attacks_change_nothing_but_the_images(threat: Threat, attack: str) -> None:
    model, (x, y) = make_net().float(), make_batch()
    x = x.float()
    model[1].eval()  # a frozen batch norm stays in its own mode
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    images = x.clone()
    plan = plan_attack(threat, steps=3, step_size=threat.eps)

    def run() -> Tensor:
        torch.manual_seed(5)
        return pgd(model, x, y, plan) if attack == "pgd" else maximize_kl(model, x, plan)

    found = run()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert [m.training for m in model.modules()] == modes
    assert not found.requires_grad
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0)
    torch.testing.assert_close(x, images, atol=0, rtol=0)

    assert 0 <= found.min() <= found.max() <= 1
    difference = (found - x).flatten(1)
    size = difference.abs().amax(1) if threat.norm == "linf" else difference.norm(dim=1)
    assert size.max() <= threat.eps + 1e-6
    assert size.min() > 0.5 * threat.eps

    model.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(run(), found, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["pgd", "pgd-at", "trades", "mart"])
def test_step_sizes(name: str) -> None:
    model = make_net()
    attack = build(name, Threat("linf", 8 / 255), model, steps=20).attack
    assert attack == Attack(Linf(8 / 255), 20, 2 / 255)
    attack = build(name, Threat("l2", 0.5), model, steps=20).attack
    assert attack == Attack(L2(0.5), 20, 0.05 if name == "trades" else 0.125)
    for norm in ("linf", "l2"):
        attack = build(name, Threat(norm, 0.031), model, step_size=0.0078).attack
        assert attack.step_size == 0.0078


@pytest.mark.parametrize("name", ["pgd-at", "trades", "mart"])
def test_validation_attacks_in_its_own_steps(name: str) -> None:
    objective = build(name, BALL, make_net(), steps=7, step_size=0.01)
    assert objective.attack.steps == 7
    assert objective.validation == Attack(L2(BALL.eps), 10, BALL.eps / 4)


@pytest.mark.parametrize("name", ["pgd", "pgd-at", "trades", "mart", "free-adv"])
def test_an_attack_without_a_threat_says_what_to_write(name: str) -> None:
    with pytest.raises(UserError, match=r"\[threat\]"):
        build(name, None, make_net())


# --- objectives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["benign", "pgd-at", "trades", "mart", "free-adv"])
def test_smoothed_labels_are_in_the_loss_and_not_in_the_attack(name: str) -> None:
    """0.3 of each label's probability is spread: the loss grows by 0.3 (mean -log p + log p_y)."""
    x, y = make_batch()
    threat = None if name == "benign" else LINF

    def step(**options: Any) -> Any:
        objective = build(name, threat, make_net(), **options)
        torch.manual_seed(6)
        return objective(x, y, CLOCK)

    plain, smoothed = step(), step(label_smoothing=0.3)
    assert torch.equal(step(label_smoothing=0.0).value, plain.value)
    logits = plain.logits
    if name == "mart":  # its cross-entropy is at attacked images
        model = make_net()
        torch.manual_seed(6)
        prepared = build(name, threat, model).prepare(x, y, CLOCK)
        logits = model(prepared.adversarial)
    log = logits.log_softmax(1)
    grown = 0.3 * (log[range(5), y] - log.mean(1)).mean()
    torch.testing.assert_close(smoothed.value - plain.value, grown, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("threat", [LINF, BALL], ids=["linf", "l2"])
def test_trades_loss_gradients_and_statistics(threat: Threat) -> None:
    model, (x, y) = make_net(), make_batch()
    reference = copy.deepcopy(model)
    torch.manual_seed(6)
    noise = torch.randn_like(x)
    torch.manual_seed(6)
    loss = build("trades", threat, model, beta=2.5)(x, y, CLOCK)
    loss.value.backward()

    adversarial = reference_attack(reference.eval(), x, threat, noise)
    reference.train()
    logits = reference(x)
    robust = kl(logits, reference(adversarial)).mean()
    natural = -logits.log_softmax(1)[range(5), y].mean()
    (natural + 2.5 * robust).backward()

    torch.testing.assert_close(loss.value, natural + 2.5 * robust, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(loss.logits, logits)
    torch.testing.assert_close(loss.terms["natural"], natural, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(loss.terms["robust"], robust, atol=1e-6, rtol=1e-5)
    assert robust > 0.001
    assert not any(v.requires_grad for v in (loss.logits, *loss.terms.values()))
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-5, rtol=1e-4)
    for found, expected in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("threat", [LINF, BALL], ids=["linf", "l2"])
def test_mart_loss_gradients_and_statistics(threat: Threat) -> None:
    model, (x, y) = make_net(), make_batch()
    reference = copy.deepcopy(model)
    torch.manual_seed(6)
    start = x + 0.001 * torch.randn_like(x)
    torch.manual_seed(6)
    loss = build("mart", threat, model, beta=2.5)(x, y, CLOCK)
    loss.value.backward()

    reference.eval()
    ball = plan_attack(threat, 1).ball
    adversarial = start
    for _ in range(10):
        adversarial = adversarial.detach().requires_grad_()
        likelihood = reference(adversarial).log_softmax(1)[range(5), y].sum()
        (gradient,) = torch.autograd.grad(-likelihood, adversarial)
        ascent = threat.eps / 4 * ball.direction(gradient)
        adversarial = ball.project(adversarial.detach() + ascent, x)
    reference.train()
    p, q = reference(x).softmax(1), reference(adversarial).softmax(1)
    boosted = robust = torch.zeros((), dtype=torch.float64)
    for i, label in enumerate(y.tolist()):
        rival = max((j for j in range(3) if j != label), key=q[i].tolist().__getitem__)
        boosted = boosted - q[i, label].log() - (1.0001 - q[i, rival] + 1e-12).log()
        divergence = sum(p[i, j] * (p[i, j] / q[i, j]).log() for j in range(3))
        robust = robust + divergence * (1.0000001 - p[i, label])
    expected = boosted / 5 + 2.5 * robust / 5
    expected.backward()

    exact = {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(loss.value, expected, **exact)
    torch.testing.assert_close(loss.terms["boosted"], boosted / 5, **exact)
    torch.testing.assert_close(loss.terms["robust"], robust / 5, **exact)
    torch.testing.assert_close(loss.logits.softmax(1), p, **exact)
    assert loss.terms["robust"] > 0.001
    assert not any(v.requires_grad for v in (loss.logits, *loss.terms.values()))
    for found, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, atol=1e-10, rtol=1e-10)
    for found, wanted in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, **exact)


def test_mart_stays_finite_where_the_network_is_sure_and_wrong() -> None:
    model = Margin(lambda v: 400 * (v - 0.5))
    x, y = make_pixels([0.1, 0.9])
    loss = build("mart", LINF, model)(x.float().requires_grad_(), y, CLOCK)
    assert loss.value.isfinite()
    # CE of 160 or so, and the largest margin penalty, -log(0.0001), for the first image.
    assert loss.terms["boosted"] == pytest.approx((200 - np.log(0.0001)) / 2, rel=1e-3)


# --- free adversarial training -------------------------------------------------------------------


def train_freely(
    objective: Any, model: nn.Module, batches: Any, replays: int, epochs: int = 1
) -> list[Tensor]:
    """What `fit` does with replays; returns the noise after every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps = epochs * len(batches) * replays
    step, noises = 0, []
    for epoch in range(epochs):
        for x, y in batches:
            for _ in range(replays):
                optimizer.zero_grad()
                objective(x, y, Clock(step, steps, epoch, epochs)).value.backward()
                optimizer.step()
                objective.after_step()
                noises.append(objective.noise.clone())
                step += 1
    return noises


def test_free_adv_follows_the_reference() -> None:
    model, (x, y) = make_net(), make_batch()
    reference = copy.deepcopy(model)
    batches = [(x, y), (x.flip(0)[:3], y.flip(0)[:3]), (x, y)]
    objective = build("free-adv", LINF, model, replays=3)
    noises = train_freely(objective, model, batches, 3)

    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    noise, step = torch.zeros_like(x), 0
    for images, labels in batches:
        n = len(images)
        for _ in range(3):
            part = noise[:n].clone().requires_grad_()
            seen = torch.minimum(torch.maximum(images + part, torch.tensor(0.0)), torch.tensor(1.0))
            loss = -reference(seen).log_softmax(1)[range(n), labels].mean()
            gradients = torch.autograd.grad(loss, [part, *reference.parameters()])
            for parameter, gradient in zip(reference.parameters(), gradients[1:], strict=True):
                parameter.grad = gradient
            noise[:n] = (part.detach() + LINF.eps * gradients[0].sign()).clamp(-LINF.eps, LINF.eps)
            optimizer.step()
            torch.testing.assert_close(noises[step], noise, atol=0, rtol=0)
            step += 1
    assert noise.abs().max() == LINF.eps
    for found, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


def test_free_adv_takes_one_pass_a_step() -> None:
    model, (x, y) = make_net(), make_batch()
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    objective = build("free-adv", LINF, model, replays=4)
    train_freely(objective, model, [(x, y)], 4)
    assert len(seen) == 4
    assert torch.equal(seen[0], x)  # the noise starts at zero
    for images in seen:
        assert 0 <= images.min() <= images.max() <= 1
        assert (images - x).abs().max() <= LINF.eps + 1e-12
    component = COMPONENTS["free-adv"]
    assert component.forward_passes(component.options()) == 1
    assert component.replays(component.options()) == 4
    assert not build("free-adv", LINF, model)(x, y, CLOCK).logits.requires_grad


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_free_adv_resumes_to_the_same_bits(cut: int) -> None:
    x, y = make_batch()
    batches = [(x, y), (x.flip(0), y.flip(0)), (x[:2], y[:2]), (x, y)]
    model = make_net()
    whole = train_freely(build("free-adv", LINF, model, replays=2), model, batches, 2)
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    objective = build("free-adv", LINF, model, replays=2)
    for number, (images, labels) in enumerate(batches):
        if number == cut:
            state = {k: v.clone() for k, v in objective.state_dict().items()}
            objective = build("free-adv", LINF, model, replays=2)
            objective.load_state_dict(state)
        for replay in range(2):
            optimizer.zero_grad()
            objective(images, labels, Clock(2 * number + replay, 8, 0, 1)).value.backward()
            optimizer.step()
            objective.after_step()
    assert torch.equal(objective.noise, whole[-1])


def test_free_adv_keeps_its_noise_or_resets_it_each_epoch() -> None:
    x, y = make_batch()
    for reset in ("never", "epoch"):
        model = make_net()
        seen: list[Tensor] = []
        model.register_forward_pre_hook(lambda m, args, to=seen: to.append(args[0].detach()))
        objective = build("free-adv", LINF, model, replays=2, reset=reset)
        train_freely(objective, model, [(x, y), (x, y)], 2, epochs=2)
        clean = [i for i, images in enumerate(seen) if torch.equal(images, x)]
        assert clean == ([0] if reset == "never" else [0, 4])


def test_free_adv_moves_black_and_white_pixels() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
    x, y = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2), torch.tensor([0])
    objective = build("free-adv", LINF, model, replays=1)
    (noise,) = train_freely(objective, model, [(x, y)], 1)
    assert noise.flatten().tolist() == pytest.approx([LINF.eps, -LINF.eps])


def test_free_adv_takes_short_batches_before_long_ones() -> None:
    model, (x, y) = make_net(), make_batch()
    objective = build("free-adv", LINF, model, replays=1)
    short, long = train_freely(objective, model, [(x[:2], y[:2]), (x, y)], 1)
    assert len(short) == 2
    assert len(long) == 5
    with pytest.raises(RuntimeError, match="without a step"):
        objective.after_step()


def test_free_adv_is_for_linf() -> None:
    assert COMPONENTS["free-adv"].options.norms == ("linf",)
    objective = build("free-adv", Threat("linf", 4 / 255), make_net())
    assert objective.validation == Attack(Linf(4 / 255), 10, 1 / 255)


# --- all objectives ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["benign", "pgd-at", "trades", "mart"])
def test_forward_passes_their_modes_and_inputs(name: str) -> None:
    model, (x, y) = make_net(), make_batch()
    modes, inputs = [], []
    model.register_forward_pre_hook(lambda m, args: modes.append(m.training))
    model.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach().clone()))
    build(name, LINF, model)(x, y, CLOCK)
    attack, loss = {
        "benign": (0, 1), "pgd-at": (10, 1), "trades": (11, 2), "mart": (10, 2)
    }[name]  # fmt: skip
    assert modes == [False] * attack + [True] * loss
    component = COMPONENTS[name]
    assert component.forward_passes(component.options()) == attack + loss
    assert all(i.shape == x.shape for i in inputs)
    # The first pass of the loss sees x itself, except where only attacked images train.
    assert torch.equal(inputs[attack], x) == (name != "pgd-at")
    assert torch.equal(inputs[-1], x) == (name == "benign")


def test_benign_is_cross_entropy() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[2.0], [0.0]]))
        model[1].bias.zero_()
    x = torch.tensor([0.5, 1.0]).reshape(2, 1, 1, 1)
    loss = build("benign", None, model)(x, torch.tensor([0, 1]), CLOCK)
    expected = (np.log(1 + np.exp(-1)) + np.log(1 + np.exp(2))) / 2
    assert loss.value.item() == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(loss.logits, [[1, 0], [2, 0]])
    loss.value.backward()
    assert model[1].weight.grad is not None


def test_pgd_at_is_cross_entropy_at_the_worst_corner() -> None:
    model, x, y = make_linear(LINF)
    loss = build("pgd-at", LINF, model)(x, y, CLOCK)
    w = model[1].weight.detach()[0]
    margins = 2 * LINF.eps * float(w.abs().sum()) * (RATIOS - 1)
    assert loss.value.item() == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-9)
    np.testing.assert_allclose(loss.logits[:, 0] - loss.logits[:, 1], margins, atol=1e-9)
    loss.value.backward()
    # d CE / d bias = softmax - onehot
    expected = -(1 / (1 + np.exp(margins))).mean()
    assert float(model[1].bias.grad[0]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "threat"),
    [(name, threat) for name in ("pgd-at", "trades", "mart") for threat in (LINF, BALL)]
    + [("free-adv", LINF)],
)
def test_validation_knows_the_robust_images(name: str, threat: Threat) -> None:
    model, x, y = make_linear(threat)
    with torch.no_grad():
        found = build(name, threat, model, validation_steps=50).validate(x, y)
    assert COMPONENTS[name].select == "robust_accuracy"
    assert found["accuracy"].tolist() == (RATIOS > 0).tolist()
    assert found["robust_accuracy"].tolist() == (RATIOS > 1).tolist()


def test_a_misclassified_image_is_never_robust() -> None:
    # Steps of 0.05 jump to and fro over the fooled band, so that some last iterates are correct.
    model = Margin(lambda v: (v - 0.55).abs() - 0.03)
    x, y = make_pixels([0.55] * 64)
    torch.manual_seed(12)
    objective = build("trades", Threat("linf", 0.2), model)
    assert is_correct(model(pgd(model, x, y, objective.validation)), y).any()
    found = objective.validate(x, y)
    assert not found["accuracy"].any()
    assert not found["robust_accuracy"].any()


class _Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


@pytest.mark.parametrize("name", ["pgd-at", "trades", "mart", "free-adv"])
def test_weights_cached_for_the_step_keep_their_graph(name: str) -> None:
    x, y = make_batch()
    mask = (torch.arange(48) % 2).expand(3, 48).double()
    gradients = []
    for context in (nullcontext(), parametrize.cached()):
        model = make_net()
        parametrize.register_parametrization(model[4], "weight", _Masked(mask))
        torch.manual_seed(7)
        with context:
            build(name, LINF, model)(x, y, CLOCK).value.backward()
        gradients.append(model[4].parametrizations.weight.original.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


# --- evaluators ----------------------------------------------------------------------------------


def test_clean_records_predictions() -> None:
    model = Margin(lambda v: v - 0.5)
    x, _ = make_pixels([0.9, 0.8, 0.1, 0.2])
    y = torch.tensor([0, 1, 1, 0])
    result = build("clean", None, model)(model, [(x[:3], y[:3]), (x[3:], y[3:])])
    assert result.records["prediction"].tolist() == [0, 0, 1, 1]
    assert result.records["correct"].tolist() == [True, False, True, False]
    assert result.metrics["accuracy"] == 0.5
    accuracy = result.metrics["accuracy"]
    assert accuracy.n == 4
    assert accuracy.low < 0.5 < accuracy.high


def test_losses_are_taken_in_float32_under_autocast() -> None:
    model, (x, y) = make_net().float(), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x.float()).dtype == torch.bfloat16
        loss = build("trades", LINF, model)(x.float(), y, CLOCK)
    assert loss.logits.dtype == torch.float32
    loss.value.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert predict(make_net(), x).dtype == torch.float64


def test_what_is_not_a_number_is_not_correct() -> None:
    logits = torch.tensor([[float("nan"), 0.0], [1.0, 0.0]])
    assert is_correct(logits, torch.tensor([0, 0])).tolist() == [False, True]


@pytest.mark.parametrize("iterate", ["last", "any"])
@pytest.mark.parametrize("threat", [LINF, BALL], ids=["linf", "l2"])
def test_pgd_finds_the_closed_form_of_a_linear_network(threat: Threat, iterate: str) -> None:
    model, x, y = make_linear(threat)
    torch.manual_seed(8)
    evaluate = build("pgd", threat, model, restarts=2, iterate=iterate)
    result = evaluate(model, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert result.records["correct"].dtype == bool
    assert result.records["correct"].tolist() == (RATIOS > 1).tolist()
    assert result.records["restart"].dtype == np.int16
    assert result.records["restart"].tolist() == [-2, 0, 0, 0, -1, -1, -1]
    assert result.metrics["accuracy"] == pytest.approx(3 / 7)
    assert result.metrics["accuracy"].n == 7
    assert result.metrics["zero_gradient"] == 0
    assert all(p.grad is None for p in model.parameters())


def test_pgd_takes_the_worst_of_its_restarts() -> None:
    # Both sides of 1/2 climb outwards, and only the right one reaches a negative margin.
    model = Margin(lambda v: 0.1 - F.relu(v - 0.5) - 0.2 * F.relu(0.5 - v))
    x, y = make_pixels([0.5] * 64)
    expected = np.full(64, -1)
    torch.manual_seed(9)
    for restart in range(3):
        left = np.flatnonzero(expected == -1)
        right = torch.empty_like(x[left]).uniform_(-0.2, 0.2).flatten() > 0
        expected[left[right.numpy()]] = restart

    def evaluate(seed: int) -> Any:
        torch.manual_seed(seed)
        return build("pgd", Threat("linf", 0.2), model, steps=10, restarts=3)(model, [(x, y)])

    result = evaluate(9)
    assert sorted(set(expected)) == [-1, 0, 1, 2]
    assert result.records["restart"].tolist() == expected.tolist()
    assert result.metrics["accuracy"] == np.mean(expected == -1)
    again = evaluate(9)
    assert again.records["restart"].tolist() == expected.tolist()
    other = evaluate(10)
    assert other.records["restart"].tolist() != expected.tolist()


@pytest.mark.parametrize("iterate", ["last", "any"])
def test_pgd_decides_by_the_last_iterate_or_by_any(iterate: str) -> None:
    # Steps of 0.1 jump to and fro over the fooled band, within 0.03 of 0.55.
    model = Margin(lambda v: (v - 0.55).abs() - 0.03)
    x, y = make_pixels([0.5] * 64)
    torch.manual_seed(11)
    path = [0.5 + torch.empty_like(x).uniform_(-0.2, 0.2).flatten().numpy()]
    for _ in range(5):
        path.append(np.clip(path[-1] + 0.1 * np.sign(0.55 - path[-1]), 0.3, 0.7))
    fooled = np.abs(np.stack(path) - 0.55) < 0.03
    expected = {"last": ~fooled[-1], "any": ~fooled.any(0)}
    assert expected["any"].sum() < expected["last"].sum()
    torch.manual_seed(11)
    options = {"steps": 5, "restarts": 1, "step_size": 0.1, "iterate": iterate}
    result = build("pgd", Threat("linf", 0.2), model, **options)(model, [(x, y)])
    assert result.records["correct"].tolist() == expected[iterate].tolist()
    assert model.calls == 7


@pytest.mark.parametrize(
    ("iterate", "expected"),
    [
        ("last", [4, 3, 3, 3, 3, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1]),
        ("any", [4, 3, 3, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]),
    ],
)
def test_fooled_images_leave_the_batch(iterate: str, expected: list[int]) -> None:
    sizes = []

    def margin(v: Tensor) -> Tensor:
        sizes.append(len(v))
        return v - 0.4001  # of the images at 1/2, fooled at 0.4 only: the first step goes there

    model = Margin(margin)
    batches = [make_pixels([0.1, 0.5, 0.5, 0.9]), make_pixels([0.1, 0.1]), make_pixels([0.5])]
    torch.manual_seed(0)
    options = {"steps": 3, "restarts": 2, "step_size": 0.2, "iterate": iterate}
    result = build("pgd", LINF, model, **options)(model, batches)
    assert result.records["restart"].tolist() == [-2, 0, 0, -1, -2, -2, 0]
    assert sizes == expected


def test_pgd_counts_its_passes_and_takes_batches_one_by_one() -> None:
    model = Margin(lambda v: 1 + v)
    x, y = make_pixels([0.5, 0.6])
    seen = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(3):
            seen.append(model.calls)
            yield x, y

    component = COMPONENTS["pgd"]
    options = {"steps": 4, "restarts": 3}
    result = build("pgd", LINF, model, **options)(model, batches())
    passes = component.forward_passes(component.options(**options))
    assert passes == 1 + 3 * (4 + 1)
    assert seen == [0, passes, 2 * passes]
    assert result.metrics["accuracy"] == 1.0
    assert component.forward_passes(component.options()) == 511


def test_pgd_counts_images_without_a_gradient_at_their_first_start() -> None:
    def margin(v: Tensor) -> Tensor:
        first = v[:, :1]  # the other pixel never has a gradient
        fooled = ((first > 0.32) & (first < 0.4)) | (first > 0.9)
        return torch.where(fooled, -1.0, 5 - (first - 0.5).clamp(0, 0.195))

    # Flat, and fooled by chance; misclassified, never attacked; flat only after some steps.
    values = torch.tensor([0.3] * 8 + [0.95] + [0.6] * 3, dtype=torch.float64)
    x = torch.stack([values, torch.full_like(values, 0.5)], 1).reshape(-1, 1, 1, 2)
    y = torch.zeros(len(x), dtype=torch.long)
    model = Margin(margin)
    torch.manual_seed(13)
    result = build("pgd", LINF, model, steps=9, restarts=2)(model, [(x, y), (x, y)])
    assert result.metrics["zero_gradient"] == 16
    assert result.records["restart"].tolist()[8:12] == [-2, -1, -1, -1]
    assert (result.records["restart"] >= 0).any()


class Pixel(nn.Module):
    """Logits (f(v), -f(v)) of the mean v of an image less 1/2, label 0: robust where v > eps."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        value = self.function(x.mean((1, 2, 3)) - 0.5)
        return torch.stack([value, -value], 1)


class Dead(nn.Module):
    """Two ReLUs, both closed at every image: only their slopes below zero say where to go."""

    def forward(self, x: Tensor) -> Tensor:
        v = x.mean((1, 2, 3)) - 0.5
        left = torch.relu(-v) - torch.nn.functional.relu(v - 9, inplace=True)
        return torch.stack([torch.full_like(v, 1e-3), left], 1)


FLAT = {
    "sign": Pixel(torch.sign),
    "rounded": Pixel(lambda v: (8 * v + 0.5).round() - 0.5),
    "certain": Pixel(lambda v: 1e6 * v),
    "float noise": Pixel(lambda v: v.sign() + 1e-25 * v),
    "comparison": Pixel(lambda v: (v > 0).to(v) - 0.5 + 0 * v),
    "NaN": Pixel(lambda v: v + 0 * (v - v.detach()).abs().sqrt()),
    "closed ReLUs": Dead(),
}


@pytest.mark.parametrize("threat", [LINF, Threat("l2", 0.4)], ids=["linf", "l2"])
@pytest.mark.parametrize("what", FLAT)
def test_images_without_a_gradient_are_attacked_again(what: str, threat: Threat) -> None:
    # The mean of 4 x 4 pixels moves by up to 0.1 in both norms.
    values = torch.tensor([0.65, 0.61, 0.55, 0.52, 0.45])
    x, y = values[:, None, None, None].expand(5, 1, 4, 4).contiguous(), torch.zeros(5).long()
    torch.manual_seed(0)
    result = build("pgd", threat, FLAT[what], steps=20, restarts=2)(FLAT[what], [(x, y)])
    assert result.records["correct"].tolist() == [True, True, False, False, False]
    assert result.records["zero_gradient"].tolist() == [True] * 4 + [False]
    flat = result.metrics["zero_gradient"]
    assert (flat, flat.n, flat.doubtful) == (4, 4, True)
    assert set(result.records["restart"].tolist()) <= {-2, -1, 0, 1, 2, 3}


def test_a_confident_network_has_a_gradient() -> None:
    """1 - p of the label is far below what float32 can tell from 0, and its gradient is right."""
    model = Pixel(lambda v: 200 * v)
    x = torch.full((1, 1, 4, 4), 0.6)
    result = build("pgd", LINF, model, steps=3, restarts=1)(model, [(x, torch.zeros(1).long())])
    assert result.metrics["zero_gradient"] == 0


BLIND = {
    "detach": lambda x: x.detach(),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "numpy, detached": lambda x: torch.from_numpy(x.detach().numpy()),
    "argmax": lambda x: F.one_hot((x > 0.5).long(), 2)[..., 1].to(x),
}


@pytest.mark.parametrize("label", [0, 1])  # correct, and nothing to attack
@pytest.mark.parametrize("way", BLIND)
def test_a_network_without_a_gradient_to_its_images_is_named(way: str, label: int) -> None:
    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Pixel(torch.tanh)(BLIND[way](x))

    x, y = torch.full((2, 1, 4, 4), 0.6), torch.full((2,), label)
    with pytest.raises(RunError, match=r'lets no gradient through.*attacks = \["square"\]'):
        build("pgd", LINF, Blind(), steps=2, restarts=1)(Blind(), [(x, y)])
    assert build("clean", None, Blind())(Blind(), [(x, y)]).metrics["accuracy"] == 1 - label


def test_square_stays_in_the_ball_and_finds_what_it_can() -> None:
    seen = []

    class Seen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return Pixel(torch.sign)(x)

    for threat in (LINF, BALL):
        seen.clear()
        x = torch.rand(6, 3, 5, 7) * 0.02 + 0.53
        x[0, 0, 0] = 1.0
        attack = plan_attack(threat, 1)
        square(Seen(), x, torch.zeros(6).long(), attack, 50)
        assert len(seen) > 1
        for images in seen:
            change = (images[:, None] - x).flatten(2)
            far = change.abs().amax(2) if threat.norm == "linf" else change.norm(dim=2)
            assert far.amin(1).max() <= threat.eps + 1e-5
            assert 0 <= images.min() <= images.max() <= 1


def test_declarations_do_not_import_torch() -> None:
    code = (
        "import sys, prunekit_adversarial as p\n"
        "assert [*p.prunekit_objectives(), *p.prunekit_evaluators()]\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


CHANGES = {
    "inplace=True": lambda y: F.relu(y, inplace=True),
    "by position": lambda y: F.relu6(y, True),
    "hardtanh": lambda y: F.hardtanh(y, 0, 1, inplace=True),
    "threshold": lambda y: F.threshold_(y, 0.0, 0.0),
    "relu_": torch.relu_,
    "clamp_": lambda y: y.clamp_(0, 1),
    "round_": Tensor.round_,
    "a module": nn.ReLU(inplace=True),
    "not in place": F.relu,
    "a number": lambda y: y.clamp(min=0),
}


@pytest.mark.parametrize("what", CHANGES)
def test_values_are_the_same_where_gradients_leak_in_place_too(what: str) -> None:
    change = CHANGES[what]

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y = 2 * x
        given = change(y)
        return y, given

    x = torch.tensor([-0.4, -0.2, 0.3], requires_grad=True)
    expected = forward(x)
    with Leaking():
        found = forward(x)
    assert all(map(torch.equal, found, expected))
    assert (found[0] is found[1]) == (expected[0] is expected[1])
    (gradient,) = torch.autograd.grad(found[1].sum(), x)
    assert gradient[:2].tolist() == pytest.approx([0.2, 0.2])  # of 2, a tenth
