"""One optimizer step: groups with rates of their own, penalties, what a checkpoint holds of it."""

import pytest
import torch
from torch import nn

from prunekit.contracts import Clock, Loss, OptimizerChoice
from prunekit.steps import ParamGroup
from prunekit.training.masking import Weights
from prunekit.training.progress import Checkpoint, Position
from prunekit.training.step import Stepper


class TwoGroups(Weights):
    """The weight at the full rate, the bias at half of it and with decay; the bias costs 2 b."""

    def parameters(self):
        (net,) = [self.model]
        return [ParamGroup([net.weight]), ParamGroup([]), ParamGroup([net.bias], 0.5, 0.25)]

    def penalty(self, clock):
        return {"cost": 2 * self.model.bias.sum()}


class Sum:
    def __init__(self, model):
        self.model = model

    def __call__(self, x, y, clock):
        logits = self.model(x)
        return Loss(logits.sum(), logits.detach(), {"own": logits.mean()})


class Counting(torch.optim.SGD):
    """Keeps a count in its groups, as some of timm's optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        super().step(closure)


def make_stepper(make=torch.optim.SGD):
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 2.0]]))
        net.bias.fill_(4.0)
    choice = OptimizerChoice(
        lambda groups: make(groups, lr=9.0, momentum=0.5), 0.1, lambda clock: 1 - clock.fraction
    )
    masking = TwoGroups(net, {})
    return Stepper(masking, Sum(net), choice, (0, 0)), net


def take(stepper, step):
    return stepper.take(torch.ones(1, 2), torch.zeros(1), Clock(step, 2, 0, 1), [])


def test_rates_decay_and_penalty_by_hand():
    """Rates 0.1 and 0.05, halved in the second step; db = 1 + 2 + 0.25 b."""
    stepper, net = make_stepper()
    loss = take(stepper, 0)
    assert loss.value.item() == 1 + 2 + 4 + 2 * 4
    assert (loss.terms["own"].item(), loss.terms["cost"].item()) == (7, 8)
    assert net.weight.tolist() == [[pytest.approx(0.9), pytest.approx(1.9)]]
    assert net.bias.item() == pytest.approx(4 - 0.05 * (3 + 1))
    take(stepper, 1)
    moved = 0.5 * 4 + 3 + 0.25 * 3.8  # momentum and the new gradient
    assert net.bias.item() == pytest.approx(3.8 - 0.025 * moved)
    assert [group["lr"] for group in stepper.optimizer.param_groups] == [0.05, 0.025]


@pytest.mark.parametrize("make", [torch.optim.SGD, Counting])
def test_a_checkpoint_holds_the_groups(make, tmp_path):
    whole, expected = make_stepper(make)
    stopped, _ = make_stepper(make)
    for stepper in (whole, stopped):
        take(stepper, 0)
    Checkpoint(tmp_path / "p.safetensors", stopped).save(Position(batch=1), {})
    resumed, net = make_stepper(make)
    at, best = Checkpoint(tmp_path / "p.safetensors", resumed).restore(torch.device("cpu"), print)
    assert (at.batch, best) == (1, {})
    for stepper in (whole, resumed):
        take(stepper, 1)
    assert torch.equal(net.weight, expected.weight)
    assert torch.equal(net.bias, expected.bias)
    groups = [
        [{k: v for k, v in g.items() if k != "params"} for g in s.optimizer.param_groups]
        for s in (whole, resumed)
    ]
    assert groups[0] == groups[1]
    assert [g["weight_decay"] for g in groups[1]] == [0, 0.25]
