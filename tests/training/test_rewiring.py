"""Masks that move while weights train: counts, zeros, momentum, and the same bits after a stop."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prunekit.contracts import Clock, Loss, OptimizerChoice, Scores
from prunekit.data.batches import Arrays, Feed
from prunekit.data.seeds import generator
from prunekit.errors import Interrupted, RunError
from prunekit.graph.groups import Group, find_groups
from prunekit.graph.leaking import LEAK
from prunekit.pruning.selection import Selection
from prunekit.report import EpochDone, Note, Stop
from prunekit.store.tensors.checkpoint import read_checkpoint
from prunekit.training.loop import Fit, fit
from prunekit.training.masking import Weights
from prunekit.training.rewiring import Rewired, Rewiring
from prunekit.training.step import Stepper

EPOCHS, BATCHES = 3, 4


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)
    )


class Told:
    """A rewirer that does what it is told, and remembers the moments."""

    def __init__(self, due, choose):
        self.steps, self.choose, self.moments = due, choose, []

    def due(self, clock):
        return clock.step in self.steps

    def __call__(self, moment):
        self.moments.append(moment)
        return self.choose(moment)


def magnitude(moment):
    return Scores({name: weight.abs() for name, weight in moment.weights.items()})


def at_random(moment):
    return Scores(
        {n: torch.rand(w.shape, generator=moment.generator) for n, w in moment.weights.items()}
    )


def make_rewired(rewirer, schedule=lambda clock: 1.0, sparsity=0.5, masks=None, **more):
    names = ["1.weight", "4.weight"]
    plan = Rewiring(rewirer, "told", Selection(sparsity), schedule, names, (0, 0), True, **more)
    return Rewired(make_net(), masks or {}, plan)


class Objective:
    def __init__(self, model, watch=lambda step: None):
        self.model, self.watch = model, watch

    def __call__(self, x, y, clock):
        self.watch(clock.step)
        logits = self.model(x)
        return Loss(F.cross_entropy(logits, y), logits.detach())


def adam(groups):
    return torch.optim.Adam(groups, lr=0.05)


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-3)


def make_stepper(masking, make=sgd):
    choice = OptimizerChoice(make, 0.1, lambda clock: 1.0)
    return Stepper(masking, Objective(masking.model), choice, (0, 0))


def batch(step):
    draw = generator(step)
    return torch.rand(4, 1, 4, 4, generator=draw), torch.randint(3, (4,), generator=draw)


def take(stepper, step, steps=10):
    stepper.take(*batch(step), Clock(step, steps, 0, 1), [])


@pytest.mark.parametrize("make", [sgd, adam])
def test_what_is_dropped_or_grown_is_zero_and_has_no_momentum(make):
    """First the first half of each row, then the second half and the first column."""
    first = torch.zeros(6, 16)
    first[:, :8] = 1
    second = torch.zeros(6, 16)
    second[:, 9:] = 1
    second[:, 0] = 1
    wanted = iter([first, second])

    def choose(moment):
        return Scores({"1.weight": next(wanted), "4.weight": torch.rand(3, 6)})

    masking = make_rewired(Told({2}, choose))
    weight = masking.model[1].weight
    stepper = make_stepper(masking, make)
    masking.rewire(Clock(0, 10, 0, 1), stepper.optimizer)
    assert not weight[:, 8:].any()
    for step in range(2):
        take(stepper, step)
        assert not weight[:, 8:].any()
    before = weight.detach().clone()
    states = [s for s in stepper.optimizer.state[weight].values() if s.shape == weight.shape]
    kept = [state.clone() for state in states]
    assert all((state[:, :8] != 0).any() for state in states)
    take(stepper, 2)
    assert torch.equal(weight[:, 0], before[:, 0])
    assert not weight[:, 1:].any()
    for state, old in zip(states, kept, strict=True):
        assert torch.equal(state[:, 0], old[:, 0])
        assert not state[:, 1:].any()
    take(stepper, 3)
    assert weight[:, 9:].any(0).all()
    assert not weight[:, 1:9].any()


def test_a_rewiring_takes_the_place_of_the_optimizers_step():
    masking = make_rewired(Told({1}, magnitude))
    stepper = make_stepper(masking)
    masking.rewire(Clock(0, 10, 0, 1), stepper.optimizer)
    take(stepper, 0)
    before = {n: p.detach().clone() for n, p in masking.model.named_parameters()}
    take(stepper, 1)
    assert all(torch.equal(before[n], p) for n, p in masking.model.named_parameters())


def test_a_moment_says_what_is_there():
    rewirer = Told({3}, at_random)
    masking = make_rewired(rewirer, lambda clock: clock.fraction)
    stepper = make_stepper(masking)
    masking.rewire(Clock(0, 10, 0, 1), stepper.optimizer)
    for step in range(4):
        take(stepper, step)
    first, later = rewirer.moments
    assert (first.first, first.final, first.sparsity, first.gradients) == (True, False, 0.0, {})
    assert all(mask.all() for mask in first.masks.values())
    assert (later.first, later.final, later.sparsity) == (False, False, pytest.approx(0.15))
    assert later.gradients.keys() == {"1.weight", "4.weight"}
    assert (later.gradients["4.weight"] != 0).any()


def test_gradients_are_those_of_removed_weights_too():
    rewirer = Told({0, 1}, at_random)
    masking = make_rewired(rewirer)
    stepper = make_stepper(masking)
    masking.rewire(Clock(0, 10, 0, 1), stepper.optimizer)
    x, y = batch(0)
    masking.model.train()
    loss = F.cross_entropy(masking.model(x), y)
    (expected,) = torch.autograd.grad(loss, masking.model[4].weight)
    masking.model[2].reset_running_stats()
    stepper.take(x, y, Clock(1, 10, 0, 1), [])
    found = rewirer.moments[1].gradients["4.weight"]
    assert torch.equal(found, expected)
    removed = ~rewirer.moments[1].masks["4.weight"]
    assert (found[removed] != 0).any()


def test_earlier_masks_are_where_it_starts_and_do_not_bind():
    masks = {"1.weight": torch.zeros(6, 16, dtype=torch.bool)}
    masks["1.weight"][0] = True
    rewirer = Told(set(), lambda m: Scores({n: -w.abs() for n, w in m.weights.items()}))
    masking = make_rewired(rewirer, masks={n: m.clone() for n, m in masks.items()})
    stepper = make_stepper(masking)
    masking.rewire(Clock(0, 10, 0, 1), stepper.optimizer)
    assert torch.equal(rewirer.moments[0].masks["1.weight"], masks["1.weight"])
    assert int(masking.masks["1.weight"].sum()) == 48
    assert int((masking.masks["1.weight"] & ~masks["1.weight"]).sum()) >= 48 - 16


def test_the_last_step_ends_at_the_target():
    """The schedule would be at 2/3 of it; the last step is asked for all, once."""
    rewirer = Told({4}, magnitude)
    masking = make_rewired(rewirer, lambda c: min(1.0, c.step / 6 if c.step < 6 else 1.0), 0.75)
    stepper = make_stepper(masking)
    masking.rewire(Clock(0, 6, 0, 1), stepper.optimizer)
    removed = []
    for step in range(6):
        assert not masking.settled(Clock(step, 6, 0, 1))
        take(stepper, step, steps=6)
        removed.append(int((~masking.masks["1.weight"]).sum()))
    assert removed == [0, 0, 0, 0, 48, 72]
    assert rewirer.moments[-1].final
    assert masking.settled(Clock(5, 6, 0, 1))


def test_counts_of_its_own_may_drift_and_must_end_at_the_target():
    def keep(moment):
        first, second = (50, 7) if moment.final else (20, 5)
        return Scores(magnitude(moment).values, keep={"1.weight": first, "4.weight": second})

    masking = make_rewired(Told({1}, keep), allocates=True)
    stepper = make_stepper(masking)
    masking.rewire(Clock(0, 3, 0, 1), stepper.optimizer)
    counts = []
    for step in range(3):
        take(stepper, step, steps=3)
        counts.append([int(masking.masks[n].sum()) for n in ("1.weight", "4.weight")])
    assert counts == [[20, 5], [20, 5], [50, 7]]

    def few(moment):
        return Scores(magnitude(moment).values, keep=dict.fromkeys(moment.weights, 4))

    wrong = make_rewired(Told(set(), few), allocates=True)
    stepper = make_stepper(wrong)
    wrong.rewire(Clock(0, 2, 0, 1), stepper.optimizer)
    take(stepper, 0, steps=2)
    with pytest.raises(RunError, match=r"rewirer 'told' does not end at sparsity 0\.5"):
        take(stepper, 1, steps=2)
    undeclared = make_rewired(Told(set(), few))
    optimizer = make_stepper(undeclared).optimizer
    with pytest.raises(RunError, match=r"rewirer 'told': its scores say what layers keep"):
        undeclared.rewire(Clock(0, 2, 0, 1), optimizer)


def make_group(*vectors):
    """The six channels of the first layer, and what goes with them."""
    units = torch.arange(6)
    scales = frozenset(vectors) & {"2.weight"}
    return Group(6, {"1.weight": units}, dict.fromkeys(vectors, units), {}, {}, scales)


def test_a_channel_that_grows_again_can_learn():
    """Its weights, bias and shift start at zero, its scale at one."""
    closed = torch.ones(6, 16)
    closed[:3] = 0
    wanted = iter([closed, 1 - closed])
    rewirer = Told({1}, lambda m: Scores({"1.weight": next(wanted)}))
    groups = [make_group("1.bias", "2.weight", "2.bias")]
    plan = Rewiring(rewirer, "told", Selection(0.5, structure="channel"), lambda clock: 1.0,
                    ["1.weight"], (0, 0), groups=groups)  # fmt: skip
    masking = Rewired(make_net(), {}, plan)
    net, stepper = masking.model, make_stepper(masking)
    masking.rewire(Clock(0, 10, 0, 1), stepper.optimizer)
    assert not any(v[:3].any() for v in (net[1].weight, net[1].bias, net[2].weight, net[2].bias))
    take(stepper, 0)
    take(stepper, 1)
    assert not any(v[3:].any() for v in (net[1].weight, net[1].bias, net[2].weight, net[2].bias))
    assert net[2].weight[:3].tolist() == [1, 1, 1]
    for step in range(2, 5):
        take(stepper, step)
    assert net[1].weight[:3].any()


class Affine(nn.Module):
    """Scales and shifts channels by vectors of any names."""

    def __init__(self, channels, scale, shift, norm):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.names, self.apart = (scale, shift), norm == "apart"
        self.register_parameter(scale, nn.Parameter(torch.rand(channels) + 0.5))
        self.register_parameter(shift, nn.Parameter(torch.rand(channels)))

    def forward(self, x):
        scale, shift = (getattr(self, name) for name in self.names)
        if self.apart:
            return self.norm(x) * scale[:, None, None] + shift[:, None, None]
        return F.batch_norm(x, self.norm.running_mean, self.norm.running_var, scale, shift)


@pytest.mark.parametrize("norm", ["inside", "apart"])
@pytest.mark.parametrize(
    ("scale", "shift"), [("weight", "bias"), ("gamma", "beta"), ("bias", "weight")]
)
def test_a_scale_is_told_by_what_it_does(scale, shift, norm):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), Affine(4, scale, shift, norm), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 3),
    )  # fmt: skip
    (group,), _ = find_groups(net, torch.zeros(1, 1, 4, 4), ["0.weight", "4.weight"])
    assert group.vectors.keys() >= {f"1.{scale}", f"1.{shift}"}
    assert group.scales == {f"1.{scale}"}
    closed = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(4, 1, 1, 1).expand(4, 1, 3, 3)
    wanted = iter([closed, 1 - closed])
    plan = Rewiring(
        Told({1}, lambda m: Scores({"0.weight": next(wanted)})), "told",
        Selection(0.5, structure="channel", groups=[group]), lambda clock: 1.0, ["0.weight"],
        (0, 0), groups=[group],
    )  # fmt: skip
    masking = Rewired(net, {}, plan)
    optimizer = make_stepper(masking).optimizer
    masking.rewire(Clock(0, 10, 0, 1), optimizer)
    masking.rewire(Clock(1, 10, 0, 1), optimizer)
    assert getattr(net[1], scale).tolist()[:2] == [1, 1]
    assert getattr(net[1], shift)[:2].tolist() == pytest.approx([LEAK, LEAK])


def test_nothing_is_left_on_the_network():
    masking = make_rewired(Told(set(), magnitude))
    masking.rewire(Clock(0, 10, 0, 1), make_stepper(masking).optimizer)
    masks = {name: mask.clone() for name, mask in masking.masks.items()}
    masking.detach()
    assert masking.model.state_dict().keys() == make_net().state_dict().keys()
    assert all(torch.equal(masks[name], mask) for name, mask in masking.masks.items())


def make_job(folder, rewirer, schedule, report=lambda event: None, stop=None, make=sgd):
    folder.mkdir(exist_ok=True)
    draw = generator(7)
    images = torch.randint(256, (16, 1, 4, 4), generator=draw, dtype=torch.uint8)
    part = Arrays(images, torch.randint(3, (16,), generator=draw))
    masking = make_rewired(rewirer, schedule)
    feed = Feed(part, part, 4, torch.device("cpu"), ("crop",))
    choice = OptimizerChoice(make, 0.1, lambda c: 1 - c.fraction)
    return Fit(masking, Objective(masking.model), choice, feed,
               EPOCHS, (0, 0), "pretrain", "pretrain", "k", report, stop or Stop(),
               folder / "progress.safetensors")  # fmt: skip


def finish(job):
    fit(job)
    state = {n: v.clone() for n, v in job.masking.model.state_dict().items()}
    tensors, header = read_checkpoint(job.checkpoint)
    times = [header["at"].pop(key) for key in ("times", "spent")]
    header.pop("sha256")
    assert len(times[0]) == job.epochs
    return state, tensors, header


@pytest.mark.parametrize(("steps", "told"), [({99}, True), ({0}, True), ({3}, False)])
def test_a_rewirer_that_is_never_due_is_told(steps, told, tmp_path):
    events = []
    fit(make_job(tmp_path, Told(steps, magnitude), lambda clock: 1.0, events.append))
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any("is due in none of its steps" in note for note in notes) == told


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("at", [1, 3, 4, 7, 10])
def test_a_stop_changes_no_bit(at, make, tmp_path):
    """Weights, masks, momentum and best epoch, stopped before and after a rewiring."""

    def ramp(clock):
        return min(1.0, 0.4 + clock.fraction)

    whole = finish(make_job(tmp_path / "a", Told(range(0, 99, 3), at_random), ramp, make=make))
    stop = Stop()

    def watch(step):
        stop.requested |= step == at

    job = make_job(tmp_path / "b", Told(range(0, 99, 3), at_random), ramp, stop=stop, make=make)
    job.objective.watch = watch
    with pytest.raises(Interrupted):
        fit(job)
    resumed = make_job(tmp_path / "b", Told(range(0, 99, 3), at_random), ramp, make=make)
    found = finish(resumed)
    for one, other in zip(found[:2], whole[:2], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], value) for name, value in other.items())
    assert found[2] == whole[2]


def test_an_epoch_above_the_target_is_never_the_best(tmp_path):
    seen = []
    job = make_job(tmp_path, Told({9}, magnitude), lambda c: float(c.fraction >= 0.7),
                   lambda event: seen.append(event))  # fmt: skip
    fit(job)
    assert [e.best for e in seen if isinstance(e, EpochDone)] == [False, False, True]
    assert int(job.masking.masks["1.weight"].sum()) == 48


def test_vectors_that_an_earlier_stage_masked_follow_single_weights():
    """Channels 0 to 2 were removed, with bias, scale and shift; a weight of channel 0 grows."""
    closed = torch.ones(6, dtype=torch.bool)
    closed[:3] = False
    masks = {name: closed.clone() for name in ("1.bias", "2.weight", "2.bias")}
    masks["1.weight"] = closed[:, None].expand(6, 16).clone()
    wanted = torch.zeros(6, 16)
    wanted[0, :8] = wanted[3:, :14] = 1
    wanted[5] = 0
    rewirer = Told(set(), lambda m: Scores({"1.weight": wanted}))
    plan = Rewiring(rewirer, "told", Selection(0.5), lambda clock: 1.0, ["1.weight"], (0, 0),
                    groups=[make_group(*list(masks)[:3])])  # fmt: skip
    masking = Rewired(make_net(), masks, plan)
    masking.after_step()
    masking.rewire(Clock(0, 10, 0, 1), make_stepper(masking).optimizer)
    kept = masking.masks["1.weight"].any(1)
    assert kept[0]
    for name in ("1.bias", "2.weight", "2.bias"):
        assert torch.equal(masking.masks[name], kept)
    assert masking.model[2].weight[0] == 1


def test_a_rewirer_draws_from_the_generators_of_its_step():
    """Whatever was drawn before."""
    found = []
    for seed in (1, 2):
        masking = make_rewired(
            Told(set(), lambda m: Scores({n: torch.rand_like(w) for n, w in m.weights.items()}))
        )
        stepper = make_stepper(masking)
        torch.manual_seed(seed)
        masking.rewire(Clock(0, 10, 0, 1), stepper.optimizer)
        found.append(masking.masks["1.weight"].clone())
    assert torch.equal(*found)


def test_masks_do_not_follow_a_loss_that_is_not_finite():
    rewirer = Told({0}, magnitude)
    masking = make_rewired(rewirer)
    stepper = make_stepper(masking)
    masking.rewire(Clock(0, 10, 0, 1), stepper.optimizer)
    x, y = batch(0)
    loss = stepper.take(x * float("nan"), y, Clock(1, 10, 0, 1), [])
    assert loss.value.isnan()
    rewirer.steps = {2}
    stepper.take(x * float("nan"), y, Clock(2, 10, 0, 1), [])
    assert len(rewirer.moments) == 1


def test_a_rehearsal_reaches_the_call_with_gradients():
    rewirer = Told(set(), magnitude)
    masking = make_rewired(rewirer, rehearsed=True)
    stepper = make_stepper(masking)
    masking.rewire(Clock(0, 2, 0, 1), stepper.optimizer)
    for step in range(2):
        take(stepper, step, steps=2)
    assert [moment.first for moment in rewirer.moments] == [True, False]
    assert rewirer.moments[1].gradients


def test_an_optimizer_may_form_groups_of_its_own():
    def make(groups):
        (group,) = groups
        matrices = [p for p in group["params"] if p.dim() > 1]
        vectors = [p for p in group["params"] if p.dim() == 1]
        return torch.optim.SGD(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.1,
            weight_decay=0.1,
        )

    masking = Weights(make_net(), {})
    stepper = Stepper(
        masking, Objective(masking.model), OptimizerChoice(make, 0.1, lambda c: 0.5), (0, 0)
    )
    take(stepper, 0)
    assert [group["lr"] for group in stepper.optimizer.param_groups] == [0.05, 0.05]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn, self.fc = nn.BatchNorm2d(4), nn.Linear(64, 3)

    def forward(self, x):
        z = self.a(x)
        return self.fc((z + self.b(self.bn(z).relu())).relu().flatten(1))


def test_layers_whose_channels_meet_are_rewired_together():
    torch.manual_seed(0)
    net = Block()
    groups, _ = find_groups(net, torch.zeros(1, 1, 4, 4), ["a.weight", "b.weight", "fc.weight"])
    plan = Rewiring(
        Told({1, 3}, at_random), "told", Selection(0.5, structure="channel", groups=groups),
        lambda clock: 1.0, ["a.weight", "b.weight"], (0, 0), groups=groups,
    )  # fmt: skip
    masking = Rewired(net, {}, plan)
    stepper = make_stepper(masking)
    masking.rewire(Clock(0, 10, 0, 1), stepper.optimizer)
    seen = set()
    for step in range(5):
        take(stepper, step)
        masking.check()
        kept = {name: mask.flatten(1).any(1) if mask.dim() > 1 else mask
                for name, mask in masking.masks.items()}  # fmt: skip
        assert kept.keys() == {f"{n}.{v}" for n in ("a", "b", "bn") for v in ("weight", "bias")}
        assert all(torch.equal(mask, kept["a.weight"]) for mask in kept.values())
        assert int(kept["a.weight"].sum()) == 2
        seen.add(tuple(kept["a.weight"].tolist()))
    assert len(seen) > 1
