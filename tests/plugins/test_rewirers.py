"""Rewirers against a reference of a few lines, by hand, and over stops and kills."""

import math
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from prunekit_budgets.schedules import RampOptions, build_constant, build_cubic
from prunekit_rewirers import (
    FlyingBirdOptions,
    FlyingBirdPlusOptions,
    GradualOptions,
    RiglOptions,
    SetOptions,
    exchange,
    gradual,
    prunekit_rewirers,
)
from prunekit_rewirers.adaptive import FlyingBirdPlus
from torch import nn
from torch.nn import functional as F

import prunekit
from prunekit import NoOptions, uniform
from prunekit.contexts import NetworkContext
from prunekit.contracts import Clock, Loss, OptimizerChoice
from prunekit.data.batches import Arrays, Feed
from prunekit.data.seeds import generator
from prunekit.errors import Interrupted, OptionError, RunError
from prunekit.pruning.budgets import count_kept
from prunekit.pruning.selection import Selection, select_masks
from prunekit.report import Stop
from prunekit.steps import Moment
from prunekit.store.tensors.checkpoint import read_checkpoint, read_masks
from prunekit.store.tensors.pieces import hash_piece, read_pieces
from prunekit.testing import example_context
from prunekit.training.loop import Fit, fit
from prunekit.training.rewiring import Rewired, Rewiring
from prunekit.training.step import Stepper

STEPS, EPOCHS, SPARSITY = 24, 3, 0.75
NAMES = ("1.weight", "3.weight")  # 96 and 18 weights
ramp = build_cubic(RampOptions(start=0.1), None)
constant = build_constant(NoOptions(), None)


def make(name, **options):
    context = example_context(NetworkContext, sparsity=SPARSITY)
    if name == "set":
        return exchange.build_set(SetOptions(every=3, **options), context)
    if name == "rigl":
        return exchange.build_rigl(RiglOptions(every=3, **options), context)
    if name == "flyingbird":
        return exchange.build_flyingbird(FlyingBirdOptions(every=3, **options), context)
    if name == "gradual":
        return gradual.build(GradualOptions(every=3, **options), context)
    return FlyingBirdPlus(FlyingBirdPlusOptions(every=3, after=0, epochs=1, **options), uniform)


def make_masking(rewirer, schedule=constant, budget=uniform, compares=False, trained=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))
    plan = Rewiring(
        rewirer, "it", Selection(SPARSITY, budget, compares=compares), schedule, NAMES, (0, 0),
        gradients=True, allocates=isinstance(rewirer, FlyingBirdPlus), trained=trained,
    )  # fmt: skip
    return Rewired(net, {}, plan)


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-3)


def make_stepper(masking):
    def objective(x, y, clock):
        logits = masking.model(x)
        return Loss(F.cross_entropy(logits, y), logits.detach())

    return Stepper(masking, objective, OptimizerChoice(sgd, 0.1, constant), (0, 0))


def clock_of(step):
    return Clock(step, STEPS, step * EPOCHS // STEPS, EPOCHS)


def batch(step):
    draw = generator(step)
    return torch.rand(4, 1, 4, 4, generator=draw), torch.randint(3, (4,), generator=draw)


def train(masking, history=()):
    """Yields (masks, optimizer) before the first step, and after each."""
    stepper = make_stepper(masking)
    masking.rewire(clock_of(0), stepper.optimizer)
    yield {name: masking.masks[name].clone() for name in NAMES}, stepper.optimizer
    for step in range(STEPS):
        stepper.take(*batch(step), clock_of(step), history)
        masking.check()
        yield {name: masking.masks[name].clone() for name in NAMES}, stepper.optimizer


def refer(growth, count, until=STEPS, schedule=constant):
    """The same in lists of positions: yields (masks, optimizer) as `train` does."""
    net = make_masking(None).model
    del net[1]._buffers["weight_kept"], net[3]._buffers["weight_kept"], net._buffers["rewired"]
    named, optimizer = dict(net.named_parameters()), sgd(net.parameters())
    masks = {name: range(named[name].numel()) for name in NAMES}
    for step in range(-1, STEPS):
        if step >= 0:
            x, y = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
        if step < 0 or (step > 0 and step % 3 == 0 and step < until):
            draw = generator(0, 0, "rewire", max(0, step))
            sparsity = SPARSITY * schedule(clock_of(max(0, step)))
            for name in NAMES:
                weight = named[name]
                n, old = weight.numel(), masks[name]
                if step < 0:
                    drawn = torch.rand(weight.shape, generator=draw).flatten().tolist()
                    ranks = sorted(old, key=lambda i: -drawn[i])
                else:
                    w = weight.flatten().tolist()
                    after = n - math.floor(sparsity * n + 1e-9)
                    left = sorted(sorted(old), key=lambda i: abs(w[i]))[len(old) - after :]
                    dropped = left[: count(step, after)]
                    stay = left[len(dropped) :][::-1]
                    free = [i for i in range(n) if i not in stay]
                    if growth == "gradient":
                        first = weight.grad.abs().flatten().tolist()
                    else:
                        first = torch.randperm(n, generator=draw).tolist()
                    ranks = sorted(free, key=lambda i: -first[i])[: len(dropped)] + stay
                masks[name] = ranks[: n - math.floor(sparsity * n + 1e-9)]
                gone = [i for i in range(n) if i not in masks[name] or i not in old]
                with torch.no_grad():
                    weight.view(-1)[gone] = 0
                    if momentum := optimizer.state.get(weight):
                        momentum["momentum_buffer"].view(-1)[gone] = 0
        elif step >= 0:
            for name in NAMES:
                removed = [i for i in range(named[name].numel()) if i not in masks[name]]
                named[name].grad.view(-1)[removed] = 0
            optimizer.step()
        yield masks, optimizer


def half_cosine(first, last, step, until):
    return last + (first - last) / 2 * (1 + math.cos(math.pi * step / until))


CASES = {
    "set": (make("set"), "random", lambda t, k: int(0.3 * k), {}),
    "rigl": (make("rigl"), "gradient", lambda t, k: int(half_cosine(0.3, 0, t, 18) * k),
             {"until": 18}),
    "flyingbird": (make("flyingbird"), "random",
                   lambda t, k: math.ceil(half_cosine(0.5, 0.005, t, 24) * k), {}),
    "flyingbird-gradient": (make("flyingbird", growth="gradient"), "gradient",
                            lambda t, k: math.ceil(half_cosine(0.5, 0.005, t, 24) * k), {}),
    "gradual": (make("gradual"), "random", lambda t, k: 0, {"schedule": ramp}),
    "gradual-regrow": (make("gradual", regrow=True), "gradient",
                       lambda t, k: int(half_cosine(0.5, 0, t, 24) * k), {"schedule": ramp}),
    "flyingbird-rising": (make("flyingbird"), "random",
                          lambda t, k: math.ceil(half_cosine(0.5, 0.005, t, 24) * k),
                          {"schedule": ramp}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_masks_weights_and_momentum_are_those_of_the_reference(case):
    rewirer, growth, count, more = CASES[case]
    masking, seen = make_masking(rewirer, more.get("schedule", constant)), set()
    own, other = train(masking), refer(growth, count, **more)
    for (kept, trained), (masks, optimizer) in zip(own, other, strict=True):
        found = [kept[name].flatten().nonzero().flatten().tolist() for name in NAMES]
        assert found == [sorted(masks[name]) for name in NAMES]
        assert [len(f) for f in found] == [24, 5] or "schedule" in more
        seen.add(str(found))
        for one, two in zip(*(o.param_groups[0]["params"] for o in (trained, optimizer)),
                            strict=True):  # fmt: skip
            assert torch.equal(one, two)
            momenta = [o.state.get(p, {}) for o, p in ((trained, one), (optimizer, two))]
            assert all(torch.equal(m, momenta[1][k]) for k, m in momenta[0].items())
    assert [len(f) for f in found] == [24, 5]
    assert len(seen) >= 5
    assert momenta[0]


def make_moment(clock, sparsity, weights, masks, gradients=None, history=(), final=False):
    select = partial(select_masks, selection=Selection(sparsity))
    return Moment(clock, sparsity, weights, masks, gradients or {}, history, generator(0), select,
                  final=final)  # fmt: skip


@pytest.mark.parametrize(
    ("sparsity", "small", "large"),
    [
        (0.1, [1, 2, 3, 4, 6, 7, 8, 9, 10], [2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (0.5, [1, 2, 8, 9, 10], [6, 7, 8, 9, 10]),
        (0.7, [1, 9, 10], [8, 9, 10]),
    ],
)
def test_the_smallest_go_before_a_part_of_what_is_left_is_exchanged(sparsity, small, large):
    """|w| = 1 to 10, all kept. Of 9, 5 and 3 that stay, 4, 2 and 1 are exchanged: for the smallest
    weights where gradients are largest there, for themselves where those grow with |w|."""
    weight, every = torch.arange(1.0, 11), torch.ones(10, dtype=torch.bool)
    rewirer = make("gradual", regrow=True)  # 0.4995 of them in step 2 of 100
    for gradient, expected in ((weight.flip(0), small), (weight, large)):
        moment = make_moment(
            Clock(2, 100, 0, 1), sparsity, {"w": weight}, {"w": every}, {"w": gradient}
        )
        scores = rewirer(moment)
        assert weight[moment.select(scores)["w"]].tolist() == expected
        assert torch.equal(scores.values["w"] > 0, moment.select(scores)["w"])


def test_growth_is_by_the_largest_dense_gradient():
    """3 of 6 kept, one dropped: |w| = 1 goes; of 0, 5, 2 and its own 3 the gradient 5 grows."""
    weight = torch.tensor([[9.0, -7.0, 1.0, 0.0, 0.0, 0.0]])
    gradient = torch.tensor([[8.0, 8.0, 3.0, 0.0, -5.0, 2.0]])
    moment = make_moment(Clock(0, 9, 0, 1), 0.5, {"w": weight}, {"w": weight != 0}, {"w": gradient})
    (values,) = exchange.drop_and_grow(moment, {"w": (1, 1)}, "gradient").values()
    assert (values > 0).tolist() == [[True, True, False, False, True, False]]
    # Two dropped and two grown: of 3 and 8 at those just dropped, the 8 comes back.
    (values,) = exchange.drop_and_grow(moment, {"w": (2, 2)}, "gradient").values()
    assert (values > 0).tolist() == [[True, True, False, False, True, False]]


def test_set_exchanges_a_part_in_decimals():
    rewirer = make("set", fraction=0.57)
    assert rewirer.count(Clock(2, 9, 0, 1), 100) == 57


def test_ties_go_by_position():
    weight, mask = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]), torch.tensor([True] * 3 + [False] * 2)
    gradient = torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0])
    moment = make_moment(Clock(0, 9, 0, 1), 0.4, {"w": weight}, {"w": mask}, {"w": gradient})
    (values,) = exchange.drop_and_grow(moment, {"w": (1, 1)}, "gradient").values()
    assert (values > 0).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("budget", ["layer", "global", "lamp"])
@pytest.mark.parametrize("regrow", [False, True])
def test_gradual_masks_are_nested_unless_they_regrow(budget, regrow, choose):
    chosen = choose(SPARSITY, budget)
    masking = make_masking(make("gradual", regrow=regrow), ramp, chosen.budget, chosen.compares)
    before, totals, new = None, [], 0
    for kept, _ in train(masking):
        if before:
            new += sum(int((kept[name] & ~before[name]).sum()) for name in NAMES)
        before = kept
        totals.append(sum(int(mask.sum()) for mask in kept.values()))
    assert (new > 0) == regrow
    assert totals == sorted(totals, reverse=True)
    assert (totals[0], totals[-1]) == (114, 29)


@pytest.mark.parametrize("budget", ["global", "lamp", "erk", "igq"])
@pytest.mark.parametrize("name", ["set", "rigl", "flyingbird"])
def test_every_budget_stands_while_weights_are_exchanged(name, budget, choose):
    """What each layer keeps is decided once."""
    chosen = choose(SPARSITY, budget)
    masking = make_masking(make(name), budget=chosen.budget, compares=chosen.compares)
    counts = {tuple(int(m.sum()) for m in kept.values()) for kept, _ in train(masking)}
    assert len(counts) == 1
    assert sum(*counts) == 29


def test_gradual_wants_a_sparsity_that_grows():
    masking = make_masking(make("gradual"))
    with pytest.raises(RunError, match="sparsity_schedule = "):
        masking.rewire(clock_of(0), make_stepper(masking).optimizer)


@pytest.mark.parametrize("name", ["set", "rigl", "flyingbird", "flyingbird-plus"])
@pytest.mark.parametrize(("start", "trained"), [(None, True), ("magnitude", False)])
def test_trained_weights_start_by_magnitude(name, start, trained):
    masking = make_masking(make(name, start=start), trained=trained)
    weight = masking.model[1].weight.detach().clone()
    kept, _ = next(train(masking))
    assert torch.equal(kept["1.weight"], weight.abs() >= weight.abs().flatten().topk(24).values[-1])
    other = make_masking(make(name, start="random"), trained=trained)
    assert not torch.equal(next(train(other))[0]["1.weight"], kept["1.weight"])


def describe_epochs(accuracies, robust):
    return [
        {"epoch": i + 1, "accuracy": a, "validation.accuracy": 0.9, "validation.robust_accuracy": r}
        for i, (a, r) in enumerate(zip(accuracies, robust, strict=True))
    ]


@pytest.mark.parametrize(
    ("accuracies", "robust", "kept"),
    [
        ([0.5] * 5, [0.3] * 5, 10),
        ([0.5, 0.6, 0.7, 0.7, 0.7], [0.3] * 5, 9),  # the gap widens: 4 and 1 go, 4 come
        ([0.9, 0.6, 0.5, 0.4, 0.3], [0.4, 0.3, 0.2, 0.2, 0.2], 12),  # the error rises: 6 come
        ([0.5, 0.6, 0.7, 0.7, 0.7], [0.4, 0.3, 0.2, 0.2, 0.2], 11),
        ([0.5, 0.6, 0.6, 0.6, 0.6], [0.3] * 5, 10),  # once of four is not half
        ([0.1, 0.2, 0.5, 0.5, 0.5, 0.5], [0.3] * 6, 10),  # long ago
        ([0.5, 0.6, 0.7, 0.8], [0.3] * 4, 10),  # three differences are too few
    ],
)
def test_the_density_follows_overfitting(accuracies, robust, kept):
    """10 of 20 kept, 0.4 of them exchanged; a dense layer stays dense."""
    options = FlyingBirdPlusOptions(fraction=0.4, last=0.4, after=0.5, more=0.5)
    rewirer = FlyingBirdPlus(options, uniform)
    weights = {"a": torch.arange(20.0), "b": torch.ones(3)}
    masks = {"a": torch.arange(20) >= 10, "b": torch.ones(3, dtype=torch.bool)}

    def count(clock):
        history = describe_epochs(accuracies, robust)
        moment = make_moment(clock, 0.5, weights, masks, history=history)
        scores = rewirer(moment)
        assert all(int((v > 0).sum()) == scores.keep[n] for n, v in scores.values.items())
        return scores.keep

    assert count(Clock(10, 20, 5, 10)) == {"a": kept, "b": 3}
    assert count(Clock(8, 20, 4, 10)) == {"a": 10, "b": 3}


@pytest.mark.parametrize(
    ("counts", "expected"), [((15, 10), [12, 8]), ((6, 4), [12, 8]), ((12, 8), [12, 8])]
)
def test_flyingbird_plus_ends_at_the_target(counts, expected):
    """20 of 40; what is left are the largest weights, and all that were there if some grow."""
    rewirer = FlyingBirdPlus(FlyingBirdPlusOptions(), uniform)
    weights = {"a": torch.arange(1.0, 21), "b": torch.arange(1.0, 21)}
    masks = {n: torch.arange(20) >= 20 - k for n, k in zip("ab", counts, strict=True)}
    moment = make_moment(Clock(19, 20, 9, 10), 0.5, weights, masks, final=True)
    scores = rewirer(moment)
    assert list(scores.keep.values()) == expected
    for (name, value), k, old in zip(scores.values.items(), expected, counts, strict=True):
        assert (value > 0)[20 - min(k, old) :].all(), name


@pytest.mark.parametrize(("until", "last"), [(0.7, 6), (1.0, 1)])
def test_flyingbird_plus_drifts_and_comes_back(until, last):
    """In step 18, or in the last one."""
    history = describe_epochs([0.5, 0.6], [0.3, 0.3])
    masking = make_masking(make("flyingbird-plus", less=1.0, until=until))
    seen = [(sum(int(m.sum()) for m in kept.values()), masking.settled(clock_of(0)))
            for kept, _ in train(masking, history)]  # fmt: skip
    assert seen[0] == (29, True)
    assert seen[-last:] == [(29, True)] * last
    assert seen[-last - 1][0] < 20
    assert not seen[-last - 1][1]


def test_flyingbird_plus_still_exchanges_at_the_target():
    rewirer = FlyingBirdPlus(FlyingBirdPlusOptions(fraction=0.4, last=0.4), uniform)
    weights, masks = {"a": torch.arange(1.0, 21)}, {"a": torch.arange(20) >= 12}
    moment = make_moment(Clock(18, 20, 9, 10), 0.5, weights, masks)
    scores = rewirer(moment)
    assert scores.keep == {"a": 10}
    assert (scores.values["a"] > 0)[16:].all()  # of 8, 4 go; 6 come
    with pytest.raises(OptionError, match=r"until must be above after = 0\.5"):
        FlyingBirdPlusOptions(until=0.5)


@pytest.mark.parametrize("options", [FlyingBirdOptions, FlyingBirdPlusOptions])
def test_what_is_exchanged_does_not_grow(options):
    with pytest.raises(OptionError, match=r"last must be at most fraction = 0\.3"):
        options(fraction=0.3, last=0.4)
    assert options(fraction=0.4, last=0.4).last == 0.4


def test_flyingbird_plus_says_what_it_lacks():
    rewirer = FlyingBirdPlus(FlyingBirdPlusOptions(every=3, after=0), uniform)
    masking = make_masking(rewirer)
    with pytest.raises(RunError, match=r"write validation = 0\.1 in \[dataset\]"):
        list(train(masking, [{"epoch": 1, "accuracy": 0.5}]))
    use = SimpleNamespace(name="global")
    comparing = FlyingBirdPlus(FlyingBirdPlusOptions(budget=use), lambda layers: layers.scores)
    with pytest.raises(RunError, match='global compares scores; write budget = "igq"'):
        next(train(make_masking(comparing)))


@pytest.mark.parametrize(
    ("name", "options", "asks"),
    [
        ("set", {}, False),
        ("rigl", {}, True),
        ("flyingbird", {}, False),
        ("flyingbird", {"growth": "gradient"}, True),
        ("flyingbird-plus", {}, False),
        ("gradual", {}, False),
        ("gradual", {"regrow": True}, True),
    ],
)
def test_gradients_of_removed_weights_are_asked_for_where_they_are_looked_at(name, options, asks):
    found = {component.name: component for component in prunekit_rewirers()}[name]
    assert found.gradients(found.options(**options)) == asks


def make_job(folder, rewirer, stop=None, at=-1):
    draw = generator(7)
    images = torch.randint(256, (32, 1, 4, 4), generator=draw, dtype=torch.uint8)
    part = Arrays(images, torch.randint(3, (32,), generator=draw))
    masking = make_masking(rewirer, ramp if isinstance(rewirer, gradual.Gradual) else constant)
    stepper = make_stepper(masking)

    def objective(x, y, clock):
        if clock.step == at:
            stop.requested = True
        return stepper.objective(x, y, clock)

    folder.mkdir(exist_ok=True)
    return Fit(masking, objective, stepper.choice, Feed(part, part, 4, torch.device("cpu"), ()),
               EPOCHS, (0, 0), "pretrain", "pretrain", "k", lambda event: None, stop or Stop(),
               folder / "progress.safetensors")  # fmt: skip


@pytest.mark.parametrize("at", [2, 13])
@pytest.mark.parametrize("name", ["set", "rigl", "flyingbird", "flyingbird-plus", "gradual"])
def test_a_stop_changes_no_bit(name, at, tmp_path):
    """Weights, masks and momentum of the checkpoint, and of the best epoch."""

    def finish(folder, *more):
        job = make_job(tmp_path / folder, make(name), *more)
        fit(job)
        known = {hash_piece(v): v for v in job.masking.model.state_dict().values()}
        return read_pieces(tmp_path / folder / "progress.safetensors", known)[0]

    one = finish("whole")
    with pytest.raises(Interrupted):
        finish("stopped", Stop(), at)
    other = finish("stopped")
    assert one.keys() == other.keys()
    assert any(key.endswith("weight_kept") for key in one)
    assert any("momentum" in key for key in one)
    assert all(torch.equal(value, other[key]) for key, value in one.items())


RECIPE = """
[dataset]
use = "digits"
fraction = 0.1
batch_size = 16
[architecture]
use = "small-cnn"
[objective]
use = "benign"
[[stage]]
kind = "pretrain"
epochs = 5
sparsity = 0.8
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_changes_no_bit(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
        (folder / "r.toml").write_text(
            RECIPE + 'budget = "erk"\nrewire = { use = "rigl", every = 5 }\n'
        )
    process, deadline = run(killed), time.monotonic() + 120
    try:
        while not _is_in_the_middle(killed):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    for folder in (killed, whole):
        process = run(folder)
        told = process.communicate(timeout=240)[0]
        assert process.returncode == 0, told
    models = [folder / "out/model.safetensors" for folder in (killed, whole)]
    assert models[0].read_bytes() == models[1].read_bytes()
    state, header = read_checkpoint(models[0])
    masks = read_masks(state, header, models[0])
    weights = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == count_kept(weights, 0.8)


def run(folder):
    command = [sys.executable, "-m", "prunekit", "run", "r.toml", "--device", "cpu", "--out", "out"]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _is_in_the_middle(folder):
    for file in folder.glob(".stages/*/*/progress.safetensors"):
        try:
            _, header = read_checkpoint(file)
        except Exception:
            continue
        names = header["tensors"]
        if header["at"]["epoch"] >= 2 and any(name.endswith("_kept") for name in names):
            return True
    return False


@pytest.mark.slow
def test_the_core_says_whether_weights_are_trained(here, monkeypatch):
    """From scratch they are not; behind a stage that trains, they are."""
    seen = []
    choose_first = exchange.choose_first

    def look(moment, start):
        seen.append(moment.trained)
        return choose_first(moment, start)

    monkeypatch.setattr(exchange, "choose_first", look)
    stage = '[[stage]]\nkind = "{}"\nname = "{}"\nepochs = 1\n'
    rewire = 'sparsity = 0.5\nrewire = { use = "set", every = 5 }\n'
    recipe = RECIPE[: RECIPE.index("[[stage]]")]
    (here / "r.toml").write_text(
        recipe + stage.format("pretrain", "scratch") + rewire
        + stage.format("pretrain", "again") + rewire + stage.format("finetune", "last") + rewire
    )  # fmt: skip
    prunekit.run(here / "r.toml", device="cpu")
    assert seen[-3:] == [False, True, True]
