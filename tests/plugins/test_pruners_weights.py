"""TwinRep and ADMM, which train weights: by hand, against references, and over a stop."""

from functools import partial

import pytest
import torch
from prunekit_pruners import RadmmOptions, TwinRepOptions
from prunekit_pruners.admm import Admm
from prunekit_pruners.twinrep import Twins
from torch import nn
from torch.nn import functional as F

from prunekit.contracts import Clock, Loss, OptimizerChoice, Scores
from prunekit.data.batches import Arrays, Feed
from prunekit.errors import Interrupted
from prunekit.graph.groups import find_groups
from prunekit.pruning.masks import apply_masks
from prunekit.pruning.selection import Selection, select_masks
from prunekit.report import Stop
from prunekit.testing import tiny_network
from prunekit.training.loop import Fit, fit

STEPS, RATE = 12, 0.1


def make_twins(net, selection=None, options=None, alive=None, **more):
    torch.manual_seed(1)
    weights = {n: p for n, p in net.named_parameters() if p.dim() > 1}
    factors = {n: nn.Parameter(torch.rand_like(w) + 0.5) for n, w in weights.items()}
    start = Scores({n: f.detach() for n, f in factors.items()})
    given = (net, start, selection or Selection(0.6), alive or {})
    return Twins(*given, factors=factors, options=options or TwinRepOptions(select=0.5), **more)


def make_admm(net, selection=None, options=None, alive=None, **more):
    start = Scores({n: p.detach().abs() for n, p in net.named_parameters() if p.dim() > 1})
    given = (net, start, selection or Selection(0.6), alive or {})
    return Admm(*given, options=options or RadmmOptions(rounds=3, rho=0.1), **more)


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def draw(step):
    g = torch.Generator().manual_seed(step)
    return torch.rand(8, 6, generator=g), torch.randint(3, (8,), generator=g)


def train(masking):
    """Plain gradient descent; what `fit` does around each step."""
    groups = [{"params": g.parameters, "weight_decay": g.decay or 0} for g in masking.parameters()]
    optimizer = torch.optim.SGD(groups, lr=RATE)
    for step in range(STEPS):
        clock, (x, y) = Clock(step, STEPS, step // 4, 3), draw(step)
        optimizer.zero_grad()
        with masking.effective(clock):
            (F.cross_entropy(masking.model(x), y) + sum(masking.penalty(clock).values())).backward()
        masking.after_backward()
        optimizer.step()
        masking.after_step()


def keep_best(weights, kept, least=0):
    """Masks of the `kept` largest of all, of each layer at least so many; one by one."""
    found = {n: torch.zeros_like(w, dtype=torch.bool) for n, w in weights.items()}
    flat = [(float(v), n, i) for n, w in weights.items() for i, v in enumerate(w.abs().flatten())]
    ranked = sorted(flat, reverse=True)
    first = [one for n in weights for one in [r for r in ranked if r[1] == n][:least]]
    for _, name, index in (first + [r for r in ranked if r not in first])[:kept]:
        found[name].view(-1)[index] = True
    return found


def test_twins_against_a_reference():
    """12 steps on w a m, in the middle of which the 18 of 45 largest |w a| are chosen."""
    net, other = make_net(), make_net()
    masking = make_twins(net, options=TwinRepOptions(select=0.5, decay=0.01))
    factors = {n: p.factor.detach().clone().requires_grad_() for n, p in masking.parts.items()}
    train(masking)
    plain = dict(other.named_parameters())
    masks = {n: torch.ones_like(a) for n, a in factors.items()}
    for step in range(STEPS):
        if step == STEPS // 2:
            masks = keep_best({n: (plain[n] * a).detach() for n, a in factors.items()}, 18, 1)
        x, y = draw(step)
        made = {n: plain[n] * a * masks[n] for n, a in factors.items()}
        loss = F.cross_entropy(torch.func.functional_call(other, made, (x,)), y)
        decay = sum(plain[n].square().sum() + a.square().sum() for n, a in factors.items())
        trained = [*plain.values(), *factors.values()]
        gradients = torch.autograd.grad(loss + 0.01 / 2 * decay, trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= RATE * gradient
    scores = masking.scores()
    assert scores.keep == {n: int(m.sum()) for n, m in masks.items()}
    assert all(torch.equal(scores.values[n].bool(), m) for n, m in masks.items())
    x, _ = draw(99)
    before = net(x)
    masking.detach()
    assert torch.equal(net(x), before)  # folded
    for name, mask in masks.items():
        expected = (plain[name] * factors[name] * mask).detach()
        torch.testing.assert_close(dict(net.named_parameters())[name].detach(), expected)


def test_at_99_percent_every_layer_keeps_its_floor():
    """10 of 1,000 are left; 800 large, 200 small ones: a threshold would take the large alone."""
    net = nn.Sequential(nn.Linear(40, 20, bias=False), nn.Linear(20, 10, bias=False))
    net[1].weight.data /= 1e4
    keep = {}
    for floor in (0.1, 1.0):
        masking = make_twins(net, Selection(0.99), TwinRepOptions(floor=floor))
        keep[floor] = list(masking.scores().keep.values())
        masking.detach()
    assert keep == {0.1: [9, 1], 1.0: [8, 2]}


def test_filters_go_by_their_norms_over_all_layers():
    net = tiny_network()
    for parameter in (net[0].weight, net[5].weight):
        nn.init.ones_(parameter)
    names = ["0.weight"]
    groups, _ = find_groups(net, torch.zeros(1, 1, 8, 8), names)
    selection = Selection(0.5, structure="channel", groups=groups)
    # One large entry has the largest norm, nine medium ones a larger mean.
    factor = torch.full((4, 1, 3, 3), 0.1)
    factor[0] = 0.5
    factor[2, 0, 0, 0] = 2.0
    factor[3] = 0.4
    given = {"factors": {"0.weight": nn.Parameter(factor)}, "options": TwinRepOptions(select=0.0)}
    masking = Twins(net, Scores({"0.weight": factor}), selection, {}, **given)
    with masking.effective(Clock(0, 9, 0, 1)):
        pass
    kept = masking.masks["0.weight"].flatten(1)
    assert kept.all(1).tolist() == kept.any(1).tolist() == [True, False, True, False]
    assert masking.masks["1.bias"].tolist() == [True, False, True, False]
    assert masking.scores().keep == {"0.weight": 2}


def test_masks_of_twins_are_set_once_and_an_epoch_before_is_not_the_best():
    masking = make_twins(make_net())
    for step, settled in [(0, False), (5, False), (6, True), (7, True)]:
        clock = Clock(step, STEPS, 0, 1)
        with masking.effective(clock):
            pass
        assert masking.settled(clock) == settled
        assert all(m.all() for m in masking.masks.values()) != settled
    masks = {n: m.clone() for n, m in masking.masks.items()}
    for weight in masking.trained.values():
        weight.data.uniform_()
    with masking.effective(Clock(8, STEPS, 0, 1)):
        pass
    assert all(torch.equal(m, masking.masks[n]) for n, m in masks.items())


def test_two_rounds_of_admm_by_hand():
    net = nn.Sequential(nn.Linear(4, 1, bias=False))
    net[0].weight.data = torch.tensor([[4.0, 3.0, 2.0, -1.0]])
    masking = make_admm(net, Selection(0.5), RadmmOptions(rounds=3, rho=2.0, growth=1.5))

    def look(step):
        with masking.effective(Clock(step, 6, 0, 1)):
            penalty = masking.penalty(Clock(step, 6, 0, 1))["admm"]
        part = dict(masking.parts["0.weight"].named_buffers())
        return *(part[k].flatten().tolist() for k in ("target", "dual", "rho")), penalty.item()

    # Z = P(W), U = 0; 2 / 2 * |(0, 0, 2, -1)|^2
    first = ([4, 3, 0, 0], [0, 0, 0, 0], [2], 5)
    assert look(0) == look(1) == first
    masking.trained["0.weight"].data[0, 1] = 1.0  # as if trained
    # W + U = (4, 1, 2, -1), of which Z has the best half and U the rest; |(0, 2, 0, -2)|^2 3 / 2
    second = ([4, 0, 2, 0], [0, 1, 0, -1], [3], 12)
    assert look(2) == look(2) == look(3) == second
    masking.trained["0.weight"].data[0, 1] = 2.5
    # W + U = (4, 3.5, 2, -2), hence W - Z + U = (0, -1, 4, -3)
    third = ([4, 3.5, 0, 0], [0, 0, 2, -2], [4.5], 4.5 / 2 * 26)
    assert look(4) == look(5) == third
    masking.penalty(Clock(5, 6, 0, 1))["admm"].backward()
    assert masking.trained["0.weight"].grad.tolist() == [[0.0, -4.5, 18.0, -13.5]]
    assert masking.scores().values["0.weight"].tolist() == [[4.0, 2.5, 2.0, 1.0]]


def test_admm_against_a_reference():
    """12 steps in 3 rounds; the budget is that of each layer: 12 of 30 and 6 of 15 are kept."""
    net, other = make_net(), make_net()
    masking = make_admm(net)
    train(masking)
    plain = dict(other.named_parameters())
    names, kept = list(masking.parts), {"0.weight": 12, "2.weight": 6}

    def project(value, name):
        return value * keep_best({name: value}, kept[name])[name]

    near = {n: project(plain[n].detach(), n) for n in names}
    dual, rho = {n: torch.zeros_like(plain[n]) for n in names}, 0.1
    for step in range(STEPS):
        if step in (4, 8):
            for n in names:
                far = plain[n].detach() + dual[n]
                near[n] = project(far, n)
                dual[n] = far - near[n]
            rho *= 1.3
        x, y = draw(step)
        penalty = sum((plain[n] - near[n] + dual[n]).square().sum() for n in names)
        loss = F.cross_entropy(other(x), y) + rho / 2 * penalty
        gradients = torch.autograd.grad(loss, list(plain.values()))
        with torch.no_grad():
            for parameter, gradient in zip(plain.values(), gradients, strict=True):
                parameter -= RATE * gradient
    masks = select_masks(masking.scores(), Selection(0.6))
    assert {n: int(m.sum()) for n, m in masks.items()} == kept
    masking.detach()
    for name, value in net.named_parameters():
        torch.testing.assert_close(value.detach(), plain[name].detach())


def test_the_penalty_draws_weights_to_the_mask():  # less of their squares is outside
    left = []
    for rho in (1e-6, 3.0):
        masking = make_admm(make_net(), options=RadmmOptions(rounds=3, rho=rho))
        train(masking)
        values = masking.scores().values
        masks = select_masks(Scores(values), Selection(0.6))
        outside = sum(v[~masks[n]].square().sum() for n, v in values.items())
        left.append(float(outside / sum(v.square().sum() for v in values.values())))
    assert left[1] < left[0] / 5


@pytest.mark.parametrize("make", [make_twins, make_admm])
def test_what_earlier_stages_removed_stays_away(make):
    net = make_net()
    alive = {"0.weight": torch.arange(30).view(5, 6) % 2 == 0}
    apply_masks(net, alive)
    masking = make(net, alive=alive)
    train(masking)
    masks = select_masks(masking.scores(), Selection(0.6), alive)
    assert sum(int(mask.sum()) for mask in masks.values()) == 18
    assert not (masks["0.weight"] & ~alive["0.weight"]).any()
    masking.detach()
    assert not net[0].weight[~alive["0.weight"]].any()


def make_job(folder, make, stop, watch):
    model = nn.Sequential(nn.Flatten(), *make_net())
    masking = make(model)

    def objective(x, y, clock):
        watch(clock)
        logits = model(x)
        return Loss(F.cross_entropy(logits, y), logits)

    g = torch.Generator().manual_seed(0)
    images = Arrays(torch.randint(256, (12, 1, 2, 3), generator=g).byte(), torch.arange(12) % 3)
    feed = Feed(images, images, 4, torch.device("cpu"), ())
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    choice = OptimizerChoice(sgd, 0.1, lambda clock: 1.0)
    return Fit(masking, objective, choice, feed, 4, (0, 0), "prune", "prune", "k",
               lambda event: None, stop, folder / "progress.safetensors")  # fmt: skip


@pytest.mark.parametrize("make", [make_twins, make_admm])
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_going_on_anywhere_in_the_stage_changes_no_bit(make, how, tmp_path):
    """12 steps: before, at and after masks are set, and rounds end, in an epoch and between two."""
    ends = []
    for step in (None, 2, 4, 5, 6, 7, 9, 10):
        folder = tmp_path / str(step)
        folder.mkdir()
        left = [step]
        for _ in range(2):
            stop = Stop()

            def watch(clock, left=left, stop=stop):
                if clock.step == left[0]:
                    left[0] = None
                    stop.requested = True
                    if how == "kill":
                        raise KeyboardInterrupt

            job = make_job(folder, make, stop, watch)
            try:
                history = fit(job)
                break
            except (Interrupted, KeyboardInterrupt):
                continue
        scores = job.masking.scores()
        job.masking.detach()
        state = job.masking.model.state_dict()
        ends.append((history, {**state, **{f"{n}.score": v for n, v in scores.values.items()}}))
        assert left == [None]
    for history, state in ends[1:]:
        assert history == ends[0][0]
        assert all(torch.equal(value, ends[0][1][name]) for name, value in state.items())
