"""Distillation against the formulas in plain float64, and the teachers that it finds."""

import math

import pytest
import torch
from prunekit_distillation import RsladOptions, SaadOptions
from prunekit_distillation.objectives import build_rslad, build_saad
from torch import nn
from torch.nn import functional as F

from prunekit.contexts import ObjectiveContext
from prunekit.contracts import Clock, Threat
from prunekit.testing import example_context

CLOCK = Clock(step=4, steps=8, epoch=1, epochs=4)


class Linear(nn.Module):
    """Logits (0, slope * x) of images of one pixel."""

    def __init__(self, slope):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64))

    def forward(self, x):
        return torch.cat([0 * x.flatten(1), self.slope * x.flatten(1)], 1)


def build(options, model, teacher):
    make = build_rslad if isinstance(options, RsladOptions) else build_saad
    threat = Threat("linf", 0.25)
    given = {"model": model, "threat": threat, "network": lambda file: teacher}
    return make(options, example_context(ObjectiveContext, **given))


def kl(p, q):
    """Of two-class predictions whose logits differ by p and by q."""
    a, b = 1 / (1 + math.exp(-p)), 1 / (1 + math.exp(-q))
    return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))


PIXELS = torch.tensor([0.5, 0.75], dtype=torch.float64).view(2, 1, 1, 1)
LABELS = torch.tensor([0, 1])


def test_the_attack_leads_away_from_the_teacher():
    """p(x') = 8 x' moves off 4 x: up to x + eps, where it is already above."""
    objective = build(RsladOptions(), Linear(8.0), Linear(4.0))
    prepared = objective.prepare(PIXELS, LABELS, CLOCK)
    torch.testing.assert_close(prepared.adversarial, PIXELS + 0.25, atol=1e-9, rtol=0)
    assert prepared.attacked is prepared.opposite is None


@pytest.mark.parametrize("natural", [0.0, 1 / 6])
def test_rslad_by_hand(natural):
    """T(x) = 4 x, S = 8 x, x' = x + 1/4."""
    objective = build(RsladOptions(natural=natural), Linear(8.0), Linear(4.0))
    loss = objective(PIXELS, LABELS, CLOCK)
    robust = (kl(2, 6) + kl(3, 8)) / 2
    clean = (kl(2, 4) + kl(3, 6)) / 2
    assert loss.value.item() == pytest.approx((1 - natural) * robust + natural * clean)
    assert loss.terms.keys() == ({"robust", "natural"} if natural else {"robust"})
    assert loss.logits[:, 1].tolist() == pytest.approx([6, 8])


def test_igdm_by_hand():
    """T(x') - T(2x - x') = 4 * 1/2 and S's is 8 * 1/2; in epoch 2 of 4 half of 10 counts."""
    without = build(RsladOptions(), Linear(8.0), Linear(4.0))(PIXELS, LABELS, CLOCK)
    loss = build(RsladOptions(igdm=10.0), Linear(8.0), Linear(4.0))(PIXELS, LABELS, CLOCK)
    assert (loss.value - without.value).item() == pytest.approx(5 * kl(2, 4))


@pytest.mark.parametrize("natural", [0.0, 2.0])
def test_saad_by_hand(natural):
    """T(x') = 3 and 4: the first image is less certain, and the other one weighs nothing."""

    def entropy(logit):
        p = 1 / (1 + math.exp(-logit))
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    options = SaadOptions(natural=natural, igdm=2.0)
    loss = build(options, Linear(8.0), Linear(4.0))(PIXELS, LABELS, CLOCK)
    weight = 5 * (entropy(3) - entropy(4))
    attacked = weight * (kl(3, 6) + 2 * 0.5 * kl(2, 4))
    assert loss.value.item() == pytest.approx((attacked + natural * kl(3, 6)) / 2)


def make_net(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 3))
    return net.double()


def test_the_opposite_images_move_no_statistics_and_train():
    """One pass counts, at x'; the gradient is that of the formula, its passes made one by one."""
    model, teacher = make_net(0), make_net(1).eval().requires_grad_(False)
    torch.manual_seed(2)
    x, y = torch.rand(5, 1, 8, 8, dtype=torch.float64), torch.arange(5) % 3
    options = RsladOptions(natural=0.0, igdm=3.0)
    objective = build(options, model, teacher)
    prepared = objective.prepare(x, y, CLOCK)
    assert int(model[1].num_batches_tracked) == 0
    objective.loss(prepared, CLOCK).value.backward()
    assert int(model[1].num_batches_tracked) == 1
    found = [p.grad.clone() for p in model.parameters()]
    mean = model[1].running_mean.clone()
    model.zero_grad()
    model[1].reset_running_stats()
    other = 2 * x - prepared.adversarial
    attacked = model(prepared.adversarial)
    torch.testing.assert_close(model[1].running_mean, mean)
    of_teacher = (teacher(prepared.adversarial) - teacher(other)).log_softmax(1)
    of_student = (attacked - model(other)).log_softmax(1)
    kls = {"reduction": "batchmean", "log_target": True}
    value = F.kl_div(attacked.log_softmax(1), teacher(x).log_softmax(1), **kls)
    value = value + 3 * 0.5 * F.kl_div(of_student, of_teacher, **kls)
    value.backward()
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
