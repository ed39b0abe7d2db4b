"""AWP, EMA and SWA, by hand and in training: on weights, on scores, and over a stop."""

from types import SimpleNamespace

import pytest
import torch
from prunekit_adversarial import MartOptions, PgdAtOptions, TradesOptions
from prunekit_adversarial.objectives import build_mart, build_pgd_at, build_trades
from prunekit_wrappers import AwpOptions, EmaOptions, SwaOptions
from prunekit_wrappers.averages import build_ema, build_swa
from prunekit_wrappers.awp import Awp
from torch import nn
from torch.nn import functional as F

from prunekit.contexts import NetworkContext, ObjectiveContext
from prunekit.contracts import Clock, Loss, OptimizerChoice, Scores, Threat
from prunekit.data.batches import Arrays, Feed
from prunekit.data.seeds import generator, seed_all
from prunekit.errors import Interrupted
from prunekit.evaluation import frozen
from prunekit.graph.groups import find_groups
from prunekit.pruning.masks import apply_masks
from prunekit.pruning.selection import Selection, select_masks
from prunekit.report import Stop
from prunekit.steps import Now
from prunekit.store.tensors.checkpoint import read_checkpoint
from prunekit.testing import example_context
from prunekit.training.learned_weights import LearnedWeights
from prunekit.training.loop import Fit, fit
from prunekit.training.masking import LearnedScores, Weights
from prunekit.training.rewiring import Rewired, Rewiring
from prunekit.training.step import Stepper


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def make_masking(kind):
    """Half of the weights are kept: weights with masks that stay or move, scores, gates."""
    model = make_net()
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() > 1}
    if kind in ("weights", "rewired"):
        masks = select_masks(Scores({n: v.abs() for n, v in start.items()}), Selection(0.5))
        apply_masks(model, masks)
        if kind == "rewired":
            rewirer = SimpleNamespace(due=lambda clock: False)
            rewiring = Rewiring(rewirer, "own", Selection(0.5), None, [*start], (0, 0))
            return Rewired(model, masks, rewiring)
        return Weights(model, masks)
    if kind == "learned":
        return LearnedWeights(model, Scores(start), Selection(0.5), {})
    if kind == "channels":
        del start["4.weight"]
        groups, _ = find_groups(model, torch.zeros(1, 1, 4, 4), start)
        selection = Selection(0.5, structure="channel", groups=groups)
        return LearnedScores(model, Scores(start), selection, {})
    return LearnedScores(model, Scores(start), Selection(0.5), {})


ATTACKING = {
    "pgd-at": (build_pgd_at, PgdAtOptions(steps=2)),
    "trades": (build_trades, TradesOptions(steps=2)),
    "mart": (build_mart, MartOptions(steps=2)),
}


def make_objective(masking, name):
    build, options = ATTACKING[name]
    threat = Threat("linf", 0.1)
    return build(options, example_context(ObjectiveContext, model=masking.model, threat=threat))


def make_ema(decay, **options):
    return build_ema(EmaOptions(decay=decay, **options), example_context(NetworkContext))


def make_swa(start=0.0, **options):
    return build_swa(SwaOptions(start=start, **options), example_context(NetworkContext))


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-3)


CHOICE = OptimizerChoice(sgd, 0.1, lambda clock: 1.0)
CLOCK = Clock(3, 10, 0, 2)


def batch():
    draw = generator(5)
    return torch.rand(6, 1, 4, 4, generator=draw), torch.randint(3, (6,), generator=draw)


def test_awp_by_hand():
    """w = (3, 4) with gradient (0, 2): ||w|| = 5, v = 0.1 * 5 * (0, 1); the loss there is w_2^2."""
    weight, seen = torch.tensor([[3.0, 4.0]]), []
    now = Now(CLOCK, nn.Identity(), {"w": weight}, {}, lambda: {"w": torch.tensor([[0.0, 2.0]])})
    Awp(AwpOptions(gamma=0.1)).around(lambda: seen.append(weight.clone()), now)
    torch.testing.assert_close(seen[1], torch.tensor([[3.0, 4.5]]))
    assert seen[0].tolist() == weight.tolist() == [[3.0, 4.0]]


def test_awp_measures_what_is_kept():
    """The kept 3 alone: ||w|| = 3 and the gradient (-1, 0) moves it by 0.3."""
    weight, seen = torch.tensor([[3.0, 4.0]]), []
    masks = {"w": torch.tensor([[True, False]])}
    now = Now(CLOCK, nn.Identity(), {"w": weight}, masks, lambda: {"w": torch.tensor([[-1.0, 0]])})
    Awp(AwpOptions(gamma=0.1)).around(lambda: seen.append(weight.clone()), now)
    torch.testing.assert_close(seen[1], torch.tensor([[2.7, 4.0]]))


def test_awp_begins_after_its_epochs():
    weight, seen = torch.ones(1, 1), []
    now = Now(CLOCK, nn.Identity(), {"w": weight}, {}, lambda: {"w": torch.ones(1, 1)})
    Awp(AwpOptions(start=1)).around(lambda: seen.append(1), now)
    assert seen == [1]


@pytest.mark.parametrize("kind", ["weights", "rewired", "learned", "scores", "channels"])
@pytest.mark.parametrize("name", ATTACKING)
def test_awp_attacks_once_and_moves_statistics_once(name, kind):
    """The step is the one of a loss that is differentiated at w + v, worked out beside it."""
    masking = make_masking(kind)
    model, objective = masking.model, make_objective(masking, name)
    x, y = batch()
    attacks, forwards = [], []
    prepare, loss = type(objective).prepare, type(objective).loss

    class Counted(type(objective)):
        def prepare(self, *given):
            attacks.append(1)
            return prepare(self, *given)

        def loss(self, *given):
            forwards.append(model[1].running_mean.clone())
            return loss(self, *given)

    objective = Counted(**vars(objective))
    before = {n: w.clone() for n, w in masking.weights().items()}
    buffers = model[1].running_mean.clone()
    choice = OptimizerChoice(lambda groups: torch.optim.SGD(groups, lr=0.0), 0.0, lambda c: 1.0)
    wrapped = Stepper(masking, objective, choice, (0, 0), wrappers=[Awp(AwpOptions(gamma=0.5))])
    seed_all(0)
    wrapped.take(x, y, CLOCK, [])
    assert (len(attacks), len(forwards)) == (1, 2)
    assert all(torch.equal(mean, buffers) for mean in forwards)
    # One pass moves them: at attacked images, and in two of the losses at clean ones.
    assert int(model[1].num_batches_tracked) == (1 if name == "pgd-at" else 2)
    assert all(torch.equal(before[n], w) for n, w in masking.weights().items())
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    moved = model[1].running_mean.clone()

    # Beside it: the same attack, then gradients at w, then at w + v.
    model[1].reset_running_stats()
    plain = make_objective(masking, name)
    seed_all(0)
    with masking.effective(CLOCK):
        prepared = plain.prepare(x, y, CLOCK)

    def differentiate():
        model[1].reset_running_stats()
        model.zero_grad()
        with masking.effective(CLOCK, lend=True):
            plain.loss(prepared, CLOCK).value.backward()
        masking.after_backward()

    differentiate()
    for name, gradient in masking.gradients().items():
        kept = before[name] * masking.masks[name] if name in masking.masks else before[name]
        step = 0.5 * kept.norm() * gradient / gradient.norm()
        assert not step[~masking.masks[name]].any() if name in masking.masks else True
        masking.weights()[name].add_(step)
    differentiate()
    assert got.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in got:
            torch.testing.assert_close(parameter.grad, got[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model[1].running_mean, moved)


def test_gradients_that_are_lent_are_those_at_the_effective_weight():
    masking = make_masking("scores")
    x, y = batch()
    with masking.effective(CLOCK, lend=True):
        F.cross_entropy(masking.model(x), y).backward()
    found = masking.gradients()
    plain = make_net()
    apply_masks(plain, masking.masks)
    F.cross_entropy(plain(x), y).backward()
    for name, mask in masking.masks.items():
        expected = dict(plain.named_parameters())[name].grad.masked_fill(~mask, 0)
        torch.testing.assert_close(found[name], expected)
    assert all(p.grad is None for n, p in masking.model.named_parameters() if "original" in n)


def test_gates_lend_gradients_and_keep_their_weights_frozen():
    masking = make_masking("channels")
    x, y = batch()
    with masking.effective(CLOCK, lend=True):
        F.cross_entropy(masking.model(x), y).backward()
    (gradient,) = masking.gradients().values()
    assert gradient[masking.masks["0.weight"]].any()
    assert not gradient[~masking.masks["0.weight"]].any()
    assert not masking.model[0].weight.requires_grad


def test_ema_by_hand():
    """From 1: d = min(0.5, 1 / 10) at step 0, (1 + 1) / (10 + 1) at 1, 0.5 at 98."""
    net = nn.Linear(1, 1, bias=False)
    ema = make_ema(0.5)

    def follow(step, value):
        nn.init.constant_(net.weight, value)
        ema.after_step(Now(Clock(step, 100, 0, 1), net, {}, {}, dict))
        return float(ema.average["weight"])

    assert follow(0, 1.0) == 1.0
    second = follow(1, 2.0)
    assert second == pytest.approx(2 / 11 * 1 + 9 / 11 * 2)
    assert follow(98, 4.0) == pytest.approx((second + 4) / 2)
    with ema.judged(net):
        assert float(net.weight) == pytest.approx((second + 4) / 2)
    assert float(net.weight) == 4.0


def test_ema_forgets_what_is_dropped():
    net = nn.Linear(2, 1, bias=False)
    nn.init.ones_(net.weight)
    masks, ema = {"weight": torch.tensor([[True, True]])}, make_ema(0.9)
    ema.after_step(Now(Clock(0, 9, 0, 1), net, {}, masks, dict))
    masks["weight"][0, 1] = False
    ema.after_step(Now(Clock(1, 9, 0, 1), net, {}, masks, dict))
    assert ema.average["weight"].tolist() == [[1.0, 0.0]]


def test_swa_by_hand():
    """Epochs of two steps; the ends of epochs 2 and 3 of 3 count, and before them nothing does."""
    net, swa = nn.Linear(2, 1, bias=False), make_swa(start=0.4)
    masks = {"weight": torch.tensor([[True, True]])}
    for step, value in enumerate([9.0, 8, 7, 1, 7, 4]):
        nn.init.constant_(net.weight, value)
        if step == 5:
            masks["weight"][0, 1] = False
        swa.after_step(Now(Clock(step, 6, step // 2, 3), net, {}, masks, dict))
        assert bool(swa.average) == (step > 2)
        with swa.judged(net):
            found = net.weight.tolist()
        assert found == [[1, 1]] if step == 3 else True
        assert swa.batches(CLOCK) == (50 if step > 2 else 0)
    assert found == [[2.5, 0]]


def test_swa_counts_epochs_in_decimals():
    """0.57 of 100 epochs are 57."""
    net, swa = nn.Linear(2, 1), make_swa(start=0.57)
    for epoch in (56, 57):
        swa.after_step(Now(Clock(epoch, 100, epoch, 100), net, {}, {}, dict))
        assert bool(swa.average) == (epoch == 57)


def test_what_grows_again_starts_in_the_mean_at_its_value():
    net, swa = nn.Linear(2, 1, bias=False), make_swa()
    masks = {"weight": torch.tensor([[True, False]])}
    for step, values in enumerate([[1.0, 0.0], [3.0, 5.0]]):
        net.weight.data = torch.tensor([values])
        masks["weight"][0, 1] = step == 1
        swa.after_step(Now(Clock(step, 2, step, 2), net, {}, masks, dict))
    assert swa.average["weight"].tolist() == [[2, 5]]


class Noisy:
    """CE on images with noise: the second pass must draw what the first drew."""

    def __init__(self, model):
        self.model, self.seen, self.watch = model, [], lambda step: None

    def __call__(self, x, y, clock):
        self.watch(clock.step)
        noise = torch.randn_like(x)
        self.seen.append(noise)
        logits = self.model(x + 0.1 * noise)
        return Loss(F.cross_entropy(logits, y), logits.detach())


def test_every_pass_draws_the_same():
    masking = make_masking("weights")
    objective = Noisy(masking.model)
    stepper = Stepper(masking, objective, CHOICE, (0, 0), wrappers=[Awp(AwpOptions())])
    stepper.take(*batch(), CLOCK, [])
    first, second = objective.seen
    assert torch.equal(first, second)
    stepper.take(*batch(), Clock(4, 10, 0, 2), [])
    assert not torch.equal(objective.seen[2], first)


class Noting(LearnedWeights):
    """Decides something at the weights of its first pass."""

    def __init__(self, *given):
        super().__init__(*given)
        for name, part in self.parts.items():
            part.register_buffer("noted", torch.full_like(self.trained[name], torch.nan))

    def prepare(self, clock):
        for name, part in self.parts.items():
            if part.noted.isnan().all():
                part.noted.copy_(self.whole(name))


def test_what_masks_decide_is_decided_at_weights_that_are_not_perturbed():
    model = make_net()
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() > 1}
    masking = Noting(model, Scores(start), Selection(0.5), {})
    stepper = Stepper(masking, Noisy(model), CHOICE, (0, 0), wrappers=[Awp(AwpOptions())])
    stepper.take(*batch(), CLOCK, [])
    assert all(torch.equal(part.noted, start[name]) for name, part in masking.parts.items())


def make_job(folder, kind, wrappers, stop=None):
    folder.mkdir(exist_ok=True)
    draw = generator(7)
    images = torch.randint(256, (16, 1, 4, 4), generator=draw, dtype=torch.uint8)
    part = Arrays(images, torch.randint(3, (16,), generator=draw))
    masking = make_masking(kind)
    choice = OptimizerChoice(sgd, 0.1, lambda clock: 1 - clock.fraction)
    return Fit(masking, Noisy(masking.model), choice, Feed(part, part, 4, torch.device("cpu")),
               3, (0, 0), "stage", "stage", "k", lambda event: None, stop or Stop(),
               folder / "progress.safetensors", wrappers=wrappers)  # fmt: skip


def make_wrappers(average="ema"):
    average = make_ema(0.9) if average == "ema" else make_swa(start=0.4, batches=2)
    return [average, Awp(AwpOptions())]


def finish(job):
    fit(job)
    tensors, header = read_checkpoint(job.checkpoint)
    for key in ("times", "spent"):  # the clock on the wall
        header["at"].pop(key)
    header.pop("sha256")
    return job.masking.model.state_dict(), tensors, header


@pytest.mark.parametrize("kind", ["weights", "learned", "scores", "channels"])
@pytest.mark.parametrize("average", ["ema", "swa"])
@pytest.mark.parametrize("at", [2, 4, 9])
def test_a_stop_changes_no_bit(kind, average, at, tmp_path):
    """Raw weights, the average, momentum and the best epoch."""
    whole = finish(make_job(tmp_path / "a", kind, make_wrappers(average)))
    stop = Stop()
    job = make_job(tmp_path / "b", kind, make_wrappers(average), stop)
    job.objective.watch = lambda step: setattr(stop, "requested", stop.requested or step == at)
    with pytest.raises(Interrupted):
        fit(job)
    again = finish(make_job(tmp_path / "b", kind, make_wrappers(average)))
    for one, other in zip(again[:2], whole[:2], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], value) for name, value in other.items())
    assert again[2] == whole[2]


@pytest.mark.parametrize("kind", ["weights", "scores"])
def test_the_average_is_what_is_stored_under_its_exact_masks(kind, tmp_path):
    ema = make_ema(0.9)
    job = make_job(tmp_path, kind, [ema])
    job.select = "last"
    fit(job)
    model = job.masking.model
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() <= ema.average.keys()
    assert all(torch.equal(trained[name], ema.average[name]) for name in trained)
    raw = {n: v for n, v in job.masking.model.state_dict().items() if n in ema.average}
    assert all(torch.equal(raw[name], ema.average[name]) for name in raw)
    if kind == "weights":
        job.masking.check()
    else:
        chosen = select_masks(job.masking.scores(), Selection(0.5))
        assert all(torch.equal(chosen[n], mask) for n, mask in job.masking.masks.items())


class Attacked(Noisy):
    """Adds 1/2 to every image, which an attack in evaluation mode does before."""

    def __call__(self, x, y, clock):
        with frozen(self.model) as network:
            network(x)
        return super().__call__(x + 0.5, y, clock)


@pytest.mark.parametrize("make", [make_ema, make_swa])
@pytest.mark.parametrize("kind", ["weights", "scores"])
def test_statistics_of_an_average_are_those_of_the_objective(make, kind, tmp_path):
    """The mean of the first layer's outputs over the stage's two batches, attacked and noisy."""
    job = make_job(tmp_path, kind, [make(0.5, bn="recalibrate", batches=2)])
    job.objective, job.select, inputs = Attacked(job.masking.model), "last", []
    raw = []

    def look(module, given):
        if module.training and module.momentum is None:
            inputs.append(given[0].mean((0, 2, 3)))
        else:
            raw.append((module.running_mean.clone(), int(module.num_batches_tracked)))

    norm = job.masking.model[1]
    norm.register_forward_pre_hook(look)
    fit(job)
    assert len(inputs) == (6 if make is make_ema else 4)
    torch.testing.assert_close(norm.running_mean, torch.stack(inputs[-2:]).mean(0))
    assert (int(norm.num_batches_tracked), norm.momentum, norm.training) == (2, 0.1, True)
    trained = [count for _, count in raw if count > 2]
    assert max(trained) == 11  # of 12 steps, before the last: measuring left no trace


def test_what_grows_again_is_in_the_average_as_it_is():
    """A scale that starts at 1 again must not creep up from 0."""
    net = nn.BatchNorm1d(2)
    masks, ema = {"weight": torch.tensor([True, False])}, make_ema(0.9)
    with torch.no_grad():
        net.weight[1] = 0
    for step in range(3):
        ema.after_step(Now(Clock(step, 9, 0, 1), net, {}, masks, dict))
    assert ema.average["weight"].tolist() == [1, 0]
    masks["weight"][1] = True
    with torch.no_grad():
        net.weight[1] = 1
    ema.after_step(Now(Clock(3, 9, 0, 1), net, {}, masks, dict))
    assert ema.average["weight"].tolist() == [1, 1]


def test_nothing_stays_on_frozen_weights_after_a_stage():
    masking = make_masking("channels")
    stepper = Stepper(masking, Noisy(masking.model), CHOICE, (0, 0), wrappers=[Awp(AwpOptions())])
    stepper.take(*batch(), CLOCK, [])
    weight = masking.model[0].weight
    masking.detach()
    assert weight.grad is None
    assert not weight.requires_grad


def test_an_attack_that_prepares_nothing_is_made_once():
    class Nothing(Noisy):
        attacks = 0

        def prepare(self, x, y, clock):
            self.attacks += 1
            self.batch = x, y

        def loss(self, prepared, clock):
            assert prepared is None
            return super().__call__(*self.batch, clock)

        def __call__(self, x, y, clock):
            return self.loss(self.prepare(x, y, clock), clock)

    masking = make_masking("weights")
    objective = Nothing(masking.model)
    stepper = Stepper(masking, objective, CHOICE, (0, 0), wrappers=[Awp(AwpOptions())])
    stepper.take(*batch(), CLOCK, [])
    assert objective.attacks == 1
