"""HARP: its rates, its budget loss, and the counts that it ends with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prunekit_budgets.budgets import build_erk, build_lamp, spread_erk
from prunekit_pruners import HarpOptions
from prunekit_pruners.harp import Harp, Rate, find_prices, project
from torch import nn
from torch.nn import functional as F

from prunekit import BudgetComponent, NoOptions, Use, UserError, uniform
from prunekit.contexts import PrunerContext
from prunekit.contracts import Clock, Loss, OptimizerChoice, Scores
from prunekit.data.batches import Arrays, Feed
from prunekit.data.seeds import generator
from prunekit.errors import Interrupted
from prunekit.graph.groups import find_groups
from prunekit.pruning.selection import Selection, check_keep, count_units, select_masks
from prunekit.report import Stop
from prunekit.store.tensors.pieces import hash_piece, read_pieces
from prunekit.testing import example_context
from prunekit.training.loop import Fit, fit

LAYER = Use(BudgetComponent(name="layer", summary="", build=""), NoOptions())


def options(**chosen):
    return HarpOptions(**{"rates": LAYER, **chosen})


class Residual(nn.Module):
    """The outputs of the first two convolutions are added: 4 channels that are one decision each.

    Images are 6x6; so are the outputs of both.
    """

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.block = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.block(x))
        return self.head(F.relu(self.norm(self.last(x))).flatten(1))


def make(structure="element", sparsity=0.5, alive=None, budget=uniform, prices=None, **chosen):
    """HARP on a residual network, whose classifier stays where channels go."""
    torch.manual_seed(0)
    net = Residual()
    start = {n: p.detach().clone() for n, p in net.named_parameters() if p.dim() > 1}
    groups = ()
    if structure == "channel":
        del start["head.weight"]
        groups, _ = find_groups(net, torch.zeros(1, 1, 6, 6), start)
    selection = Selection(sparsity, structure=structure, groups=groups)
    given = (net, Scores(start, layerwise=True), selection, alive or {})
    return Harp(*given, options=options(**chosen), budget=budget, prices=prices or {})


def batch():
    draw = generator(5)
    return torch.rand(6, 1, 6, 6, generator=draw), torch.randint(3, (6,), generator=draw)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_projection_is_exact_and_follows_one_factor(data):
    layers = data.draw(st.lists(st.tuples(st.floats(1e-3, 1), st.integers(1, 500)), min_size=1))
    rates = {str(n): rate for n, (rate, _) in enumerate(layers)}
    sizes = {str(n): size for n, (_, size) in enumerate(layers)}
    least = {n: data.draw(st.integers(1, size)) for n, size in sizes.items()}
    total = data.draw(st.integers(sum(least.values()), sum(sizes.values())))
    kept = project(rates, sizes, least, total)
    assert sum(kept.values()) == total
    assert all(least[n] <= kept[n] <= sizes[n] for n in sizes)
    low, high = 0.0, float("inf")
    for n, exact in ((n, rates[n] * sizes[n]) for n in sizes):
        low = max(low, (kept[n] - 1) / exact if kept[n] > least[n] else 0)
        high = min(high, (kept[n] + 1) / exact if kept[n] < sizes[n] else high)
    assert low <= high + 1e-9


@pytest.mark.parametrize("structure", ["element", "channel"])
@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.floats(-12, 12), min_size=4, max_size=4))
def test_whatever_the_rates_are_no_layer_is_under_its_minimum(structure, values):
    masking = make(structure, sparsity=0.6, floor=0.5)
    for rate, value in zip(masking.own.values(), values, strict=False):
        rate.raw.data.fill_(value)
    check_keep(masking.scores(), masking.selection, "harp")
    for scores in (masking.scores(), masking.moving()):
        masks = select_masks(scores, masking.selection)
        for name, kept in count_units(masks, masking.selection).items():
            # Half of the target, 0.4 and what rounding adds to it.
            assert kept >= 0.5 * masking.target * masking.sizes[name] >= 0.2 * masking.sizes[name]


def test_the_budget_loss_by_finite_differences():
    masking = make(gamma=0.5, floor=0.2, density=0.7)
    masking.model.double()
    clock = Clock(4, 9, 1, 3)
    (loss,) = masking.penalty(clock).values()
    loss.backward()
    for rate in masking.own.values():
        sides = []
        for step in (1e-6, -1e-6):
            rate.raw.data += step
            sides.append(float(masking.penalty(clock)["budget"].detach()))
            rate.raw.data -= step
        assert float(rate.raw.grad) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-6)


def test_the_budget_loss_by_hand():
    """d = 0.5, k = 0.75 in each layer: 1.5 - 1, times 2 gamma in the second epoch."""
    masking = make(gamma=0.1, density=0.75)
    torch.testing.assert_close(
        masking.penalty(Clock(4, 9, 1, 3))["budget"], torch.tensor(2 * 0.1 * 0.5)
    )


def test_the_factor_grows_until_the_budget_is_met_and_then_stays():
    masking = make(gamma=1.0)
    raw = [rate.raw for rate in masking.own.values()]

    def factor(step, value):
        """Of 2 steps in each of 5 epochs; by the loss at k of about 1, twice the target."""
        for parameter in raw:
            parameter.data.fill_(value)
        masking.penalty(Clock(step, 10, step // 2, 5))
        for parameter in raw:
            parameter.data.fill_(20.0)
        odd = step // 2 * 2 + 1  # within an epoch nothing is decided
        return round(float(masking.penalty(Clock(odd, 10, step // 2, 5))["budget"].detach()), 4)

    assert factor(0, -20.0) == 1  # met, but no epoch has ended
    assert factor(2, 20.0) == 2
    assert factor(3, -20.0) == 2
    assert factor(4, -20.0) == 2  # met at the end of the second
    assert factor(6, 20.0) == 2
    assert factor(8, -20.0) == 2


def test_rates_follow_their_formula():
    """With g = dL/dw_eff * w, the rate's is sum(g) (1 - floor) s (1 - s), s its sigmoid."""
    net = nn.Sequential(nn.Linear(4, 2, bias=False))
    weight = net[0].weight.detach().clone()
    given = (net, Scores({"0.weight": weight.clone()}), Selection(0.5), {})
    masking = Harp(*given, options=options(density=0.5), budget=uniform, prices={})
    x = torch.rand(3, 4)
    with masking.effective(Clock(0, 9, 0, 3)):
        net(x).square().sum().backward()
    part, rate = masking.parts["0.weight"], masking.own["0.weight"]
    g = (2 * x.T @ (x @ (weight * part.mask).T)).T * weight
    s = rate.raw.detach().sigmoid()
    torch.testing.assert_close(rate.raw.grad, g.sum() * 0.95 * s * (1 - s))
    torch.testing.assert_close(part.score.grad, g * weight.sign())
    assert int(part.mask.sum()) == 4


def test_a_rate_of_channels_has_the_sum_of_their_openings():
    """The gate of `last` multiplies its output: dL/dm_u, summed over its channels."""
    masking = make("channel", sparsity=0.5)
    net, (x, y) = masking.model, batch()
    seen = []
    gate = net.norm.channel_gate if hasattr(net.norm, "channel_gate") else net.last.channel_gate
    gate.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with masking.effective(Clock(0, 9, 0, 3)):
        loss = F.cross_entropy(net(x), y)
        ((inside, outside),) = seen
        outside.retain_grad()
        loss.backward()
    rate = masking.own["last.weight"]
    s = rate.raw.detach().sigmoid()
    expected = (outside.grad * inside.detach()).sum() * (1 - rate.least) * s * (1 - s)
    torch.testing.assert_close(rate.raw.grad, expected)


def test_coupled_layers_have_one_rate_and_one_count():
    masking = make("channel", sparsity=0.5)
    assert masking.rates["stem.weight"] is masking.rates["block.weight"]
    assert masking.sizes == {"stem.weight": 4, "last.weight": 6}
    assert [len(group.parameters) for group in masking.parameters()] == [5, 1, 1]
    masking.own["stem.weight"].raw.data.fill_(-9)
    masks = select_masks(masking.scores(), masking.selection)
    channels = {name: mask.flatten(1).any(1) for name, mask in masks.items()}
    assert int(channels["stem.weight"].sum()) == 1
    assert torch.equal(channels["stem.weight"], channels["block.weight"])
    assert int(channels["last.weight"].sum()) == 4


def test_channels_count_as_such_or_by_their_weights_or_macs():
    """9 and 36 weights for each of 4 channels, of 6x6 outputs; 36 for each of 6, of 2x2."""
    assert make("channel").prices == {"stem.weight": 4, "last.weight": 6}
    net = Residual()
    weights = {n: p.detach() for n, p in net.named_parameters() if p.dim() > 1}
    context = example_context(PrunerContext, model=net, weights=weights, shape=(1, 6, 6))
    macs = find_prices("macs", context)
    assert macs == {
        "stem.weight": 36, "block.weight": 36, "last.weight": 4, "head.weight": 1,
    }  # fmt: skip
    assert make("channel", prices=macs).prices == {"stem.weight": 36 * 180, "last.weight": 4 * 216}
    ones = find_prices("weights", context)
    assert make("channel", prices=ones).prices == {"stem.weight": 36 + 144, "last.weight": 216}


def test_macs_that_no_module_does_are_told():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 3))
    net.register_module("idle", nn.Identity())
    net.idle.weight = nn.Parameter(torch.ones(2, 2))
    context = example_context(
        PrunerContext, model=net, weights={"idle.weight": net.idle.weight}, shape=(1, 2, 2)
    )
    with pytest.raises(UserError, match=r'finds none of idle\.weight; write count = "weights"'):
        find_prices("macs", context)


@pytest.mark.parametrize("name", ["layer", "erk", "lamp"])
def test_rates_start_as_the_budget_shares_them(name):
    build = {"layer": lambda *_: uniform, "erk": build_erk, "lamp": build_lamp}[name]
    masking = make(budget=build(NoOptions(), None), sparsity=0.9, density=0.3)
    weights = {n: w for n, w in masking.weights().items() if n in masking.sizes}
    magnitudes = Scores({n: w.abs() for n, w in weights.items()})
    chosen = select_masks(magnitudes, Selection(0.7, build(NoOptions(), None)))
    least = 0.1 * 0.1
    for layer, rate in masking.own.items():
        begun = float(chosen[layer].float().mean())
        expected = min(begun, least + 0.99 * (1 - least))
        assert rate().item() == pytest.approx(expected, abs=1e-3)
    if name == "erk":
        wanted = spread_erk({n: w.shape for n, w in weights.items()}, 0.3)
        assert masking.own["last.weight"]().item() == pytest.approx(wanted["last.weight"], abs=5e-3)


def test_rates_do_not_start_under_the_target():
    assert all(rate().item() == pytest.approx(0.5, abs=0.02) for rate in make().own.values())


def test_a_rate_is_inside_its_limits():
    assert Rate(0.1, 0.05)().item() == pytest.approx(0.1 + 0.9 * 0.01)
    assert Rate(0.1, 1.0)().item() == pytest.approx(0.1 + 0.9 * 0.99)


def test_the_root_divides_a_rates_learning_rate():
    groups = make(rate_lr=3.0, rate_scale="root", rate_decay=0.1).parameters()[1:]
    # 36, 144, 216 and 72 weights.
    assert [g.rate for g in groups] == pytest.approx([3 / n**0.5 for n in (36, 144, 216, 72)])
    assert {g.decay for g in groups} == {0.1}
    assert {g.rate for g in make().parameters()[1:]} == {1.0}


@pytest.mark.parametrize("structure", ["element", "channel"])
def test_it_shares_out_what_earlier_stages_left(structure):
    """Half of `last` is gone: 3 of its 6 channels, 108 of its 216 weights."""
    gone = torch.ones(6, 4, 3, 3, dtype=torch.bool)
    gone[3:] = False
    masking = make(structure, sparsity=0.6, alive={"last.weight": gone})
    assert masking.sizes["last.weight"] == (3 if structure == "channel" else 108)
    masking.own["last.weight"].raw.data.fill_(20.0)
    scores = masking.scores()
    check_keep(scores, masking.selection, "harp")
    masks = select_masks(scores, masking.selection, masking.alive)
    for layer, kept in count_units(masks, masking.selection).items():
        assert kept == scores.keep[layer]
    assert not masks["last.weight"][~gone].any()


def test_floors_that_are_more_than_the_target_are_told():
    words = r"floor = 0\.1 keeps 4 in all layers, where sparsity 0\.995 leaves 3; lower one of them"
    with pytest.raises(UserError, match=words):
        make(sparsity=0.995)


def test_floors_are_counted_in_decimals():
    """0.1 of the 100 that sparsity 0.9 leaves of 1,000 are 10, and not 11."""
    net = nn.Sequential(nn.Linear(40, 25, bias=False))
    start = Scores({"0.weight": net[0].weight.detach().clone()})
    given = (net, start, Selection(0.9), {})
    assert Harp(*given, options=options(floor=0.1), budget=uniform, prices={}).least == {
        "0.weight": 10
    }


class Watched:
    def __init__(self, model):
        self.model, self.watch = model, lambda step: None

    def __call__(self, x, y, clock):
        self.watch(clock.step)
        logits = self.model(x)
        return Loss(F.cross_entropy(logits, y), logits.detach())


def make_job(folder, structure, stop):
    folder.mkdir()
    return continue_job(folder, structure, stop)


def continue_job(folder, structure, stop):
    draw = generator(7)
    images = torch.randint(256, (16, 1, 6, 6), generator=draw, dtype=torch.uint8)
    part = Arrays(images, torch.randint(3, (16,), generator=draw))
    masking = make(structure, sparsity=0.7, density=0.31, gamma=1.0, rate_lr=5.0)
    choice = OptimizerChoice(
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9), 0.1, lambda clock: 1.0
    )
    return Fit(masking, Watched(masking.model), choice, Feed(part, part, 4, torch.device("cpu")),
               4, (0, 0), "stage", "prune", "k", lambda event: None, stop,
               folder / "progress.safetensors")  # fmt: skip


def finish(job):
    fit(job)
    known = {hash_piece(v): v for v in job.masking.model.state_dict().values()}
    tensors, header = read_pieces(job.checkpoint, known)
    return tensors, header["at"]["history"]


@pytest.mark.parametrize("structure", ["element", "channel"])
@pytest.mark.parametrize("at", [5, 10, 13])
def test_a_stop_changes_no_bit(structure, at, tmp_path):
    """Steps within the second, third and fourth epoch: before and after the factor is frozen."""
    whole = finish(make_job(tmp_path / "a", structure, Stop()))
    stop = Stop()
    job = make_job(tmp_path / "b", structure, stop)
    job.objective.watch = lambda step: setattr(stop, "requested", stop.requested or step == at)
    with pytest.raises(Interrupted):
        fit(job)
    again = finish(continue_job(tmp_path / "b", structure, Stop()))
    assert again[1] == whole[1]
    assert again[0].keys() == whole[0].keys()
    assert all(torch.equal(again[0][name], value) for name, value in whole[0].items())
    (frozen,) = {int(v) for n, v in whole[0].items() if n.startswith("model/") and "epochs" in n}
    assert frozen in (1, 2)
