"""S2AP: the worst scores nearby, by hand and in a training step."""

import pytest
import torch
from prunekit_budgets.budgets import build_lamp
from prunekit_pruners import HarpOptions
from prunekit_pruners.harp import Harp
from prunekit_wrappers import S2apOptions
from prunekit_wrappers.s2ap import S2ap
from torch import nn
from torch.nn import functional as F

from prunekit import BudgetComponent, NoOptions, Use, UserError
from prunekit.contracts import Clock, Loss, OptimizerChoice, Scores
from prunekit.graph.groups import find_groups
from prunekit.pruning.selection import Selection
from prunekit.steps import Now
from prunekit.training.masking import LearnedScores, Weights
from prunekit.training.step import Stepper

CLOCK = Clock(6, 10, 1, 2)
STILL = OptimizerChoice(lambda groups: torch.optim.SGD(groups, lr=0.0), 0.0, lambda clock: 1.0)


def make(kind):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    )
    start = {n: p.detach().clone() for n, p in net.named_parameters() if p.dim() > 1}
    selection = Selection(0.5)
    if kind == "channels":
        del start["4.weight"]
        groups, _ = find_groups(net, torch.zeros(1, 1, 4, 4), start)
        selection = Selection(0.5, structure="channel", groups=groups)
    if kind == "harp":
        lamp = Use(BudgetComponent(name="lamp", summary="", build="", compares=True), NoOptions())
        own = {"options": HarpOptions(rates=lamp), "budget": build_lamp(NoOptions(), None)}
        return Harp(net, Scores(start), selection, {}, prices={}, **own)
    return LearnedScores(net, Scores(start), selection, {})


class Attacks:
    """CE at images that are moved by what the network says of them; notes the masks it sees."""

    def __init__(self, masking):
        self.masking, self.seen = masking, []

    def prepare(self, x, y, clock):
        self.seen.append(self._masks())
        return x + 0.01 * self.masking.model(x).detach().mean(), y

    def loss(self, prepared, clock):
        self.seen.append(self._masks())
        logits = self.masking.model(prepared[0])
        return Loss(F.cross_entropy(logits, prepared[1]), logits.detach())

    def __call__(self, x, y, clock):
        return self.loss(self.prepare(x, y, clock), clock)

    def _masks(self):
        return {name: mask.clone() for name, mask in self.masking.masks.items()}


def same(one, other):
    return all(torch.equal(one[name], value) for name, value in other.items())


def test_by_hand():
    """s = (3, 4) with gradient (0, 2): ||s|| = 5, z = 0.1 * 5 * (0, 1)."""
    score, seen = nn.Parameter(torch.tensor([[3.0, 4.0]])), []

    def go():
        score.grad = torch.tensor([[0.0, 2.0]])
        seen.append(score.detach().clone())

    now = Now(CLOCK, nn.Identity(), {}, {}, dict, {"w": score})
    S2ap(S2apOptions(gamma=0.1, start=1)).around(go, now)
    torch.testing.assert_close(seen[1], torch.tensor([[3.0, 4.5]]))
    assert seen[0].tolist() == score.tolist() == [[3.0, 4.0]]
    seen.clear()
    S2ap(S2apOptions(start=2)).around(go, now)  # it has not begun
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["scores", "channels", "harp"])
def test_the_gradient_is_that_of_the_perturbed_masks_at_the_first_attack(kind):
    masking, gamma = make(kind), 0.5
    objective = Attacks(masking)
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    before = {n: part.score.detach().clone() for n, part in masking.parts.items()}
    wrapper = S2ap(S2apOptions(gamma=gamma, start=0))
    Stepper(masking, objective, STILL, (0, 0), wrappers=[wrapper]).take(x, y, CLOCK, [])
    after = {n: part.score.detach() for n, part in masking.parts.items()}
    assert all(torch.equal(before[n], value) for n, value in after.items())
    got = {n: p.grad for n, p in masking.model.named_parameters() if p.requires_grad}

    # Beside it, on another copy: the gradient at s, then the one at s + z, of the same attack.
    other = make(kind)
    plain = Attacks(other)
    with other.effective(CLOCK):
        prepared = plain.prepare(x, y, CLOCK)
        plain.loss(prepared, CLOCK).value.backward()
    for name, part in other.parts.items():
        z = gamma * before[name].norm() * part.score.grad / part.score.grad.norm()
        assert float(z.norm() / before[name].norm()) == pytest.approx(gamma, rel=1e-5)
        part.score.data += z
    other.model.zero_grad()
    other.model[1].reset_running_stats()
    with other.effective(CLOCK):
        loss = plain.loss(prepared, CLOCK).value
        (loss + sum(other.penalty(CLOCK).values())).backward()
    grads = {n: p.grad for n, p in other.model.named_parameters() if p.requires_grad}
    assert got.keys() == grads.keys()
    for name, value in grads.items():
        torch.testing.assert_close(got[name], value)
    attacked, first, second = objective.seen
    assert same(attacked, first)
    assert not same(first, second)
    assert same(second, plain.seen[-1])


def test_what_has_no_scores_is_refused():
    net = nn.Linear(2, 2)
    masking = Weights(net, {})
    stepper = Stepper(masking, Attacks(masking), STILL, (0, 0), wrappers=[S2ap(S2apOptions())])
    with pytest.raises(UserError, match="s2ap needs learned scores, and this pruner has none"):
        stepper.take(torch.rand(2, 2), torch.tensor([0, 1]), CLOCK, [])
