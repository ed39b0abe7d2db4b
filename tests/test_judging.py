"""What a judgement says of networks that are no function of single images, or give no numbers."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import prunekit
from prunekit.engine.evaluating import judge
from prunekit.engine.handed_over import plan_recipe
from prunekit.engine.work import Inputs, Work, build_state
from prunekit.errors import RunError
from prunekit.evaluation import Standing
from prunekit.judging import examine, watching
from prunekit.report import Stop
from prunekit.store.stages import StageFolder
from prunekit.training.compute import open_compute

SHAPE = (1, 8, 8)


class Net(nn.Module):
    """A linear network around what a test puts before it: before(self, x (B, 64))."""

    def __init__(self, before=lambda self, z: z, after=lambda self, z: z):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(64, 10)
        self.before, self.after = before, after
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))
        self.norm = nn.BatchNorm1d(64, track_running_stats=False)

    def forward(self, x):
        return self.after(self, self.fc(self.before(self, x.flatten(1))))


def count_calls(net, z):
    net.calls += 1
    return z + 0.01 * net.calls


def count_in_buffer(net, z):
    net.seen += 1
    return z


def replace_buffer(net, z):
    net.seen = net.seen + 1
    return z


def draw_own(net, z):
    return z + torch.from_numpy(np.random.default_rng().normal(size=z.shape)).float()


UNSOUND = {
    "dropout": (lambda net, z: F.dropout(z, 0.5), "random"),
    "noise": (lambda net, z: z + 0.01 * torch.randn_like(z), "random"),
    "python's generator": (lambda net, z: z * random.random(), "random"),
    "a generator of its own": (draw_own, "random"),
    "a counter": (count_calls, "random"),
    "mean of the batch": (lambda net, z: z - z.mean(0), "batch_dependent"),
    "batch norm": (lambda net, z: net.norm(z), "batch_dependent"),
    "the neighbour": (lambda net, z: z + 0.1 * z.roll(1, 0), "batch_dependent"),
    "the place": (lambda net, z: z * torch.arange(1.0, len(z) + 1)[:, None], "batch_dependent"),
    "softmax over the batch": (lambda net, z: z.softmax(0), "batch_dependent"),
    "a seed": (
        lambda net, z: z + torch.randn(z.shape, generator=torch.Generator().manual_seed(0)),
        "batch_dependent",
    ),
    "a buffer": (count_in_buffer, "stateful"),
    "a new buffer": (replace_buffer, "stateful"),
}


def make_images(n=20):
    images = torch.randint(256, (n, *SHAPE), generator=torch.Generator().manual_seed(1))
    return images.to(torch.uint8), torch.arange(n) % 10


@pytest.mark.parametrize("images", [1, 2, 30])
@pytest.mark.parametrize("what", UNSOUND)
def test_what_is_no_function_of_single_images_is_found(what, images):
    before, doubt = UNSOUND[what]
    net = Net(before)
    assert list(examine(net, torch.rand(images, *SHAPE)).doubts) == [doubt]
    assert not net.seen


def divide_by_largest(net, z):
    return z / z.max()


def round_to_levels(net, z):
    """As quantization does that chooses its levels for each batch."""
    step = z.abs().max() / 127
    return (z @ net.fc.weight.T @ net.fc.weight / step).round() * step


@pytest.mark.parametrize("before", [divide_by_largest, round_to_levels])
@pytest.mark.parametrize("images", [2, 16, 128])
@pytest.mark.parametrize("odd", [1.0, 0.2])
def test_what_images_of_equal_brightness_hide_is_found(before, images, odd):
    x = torch.rand(images, *SHAPE, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0, :2] = torch.tensor([0.0, 1.0])
    x[1::2] *= odd
    assert list(examine(Net(before), x).doubts) == ["batch_dependent"]


def give_each_class_twelve(net, z):
    out = z.clone()
    for c in range(z.shape[1]):
        out[(z.argmax(1) == c).nonzero().flatten()[12:]] = 0
    return out


def center_large(net, z):
    return z - z.mean(0) if len(z) >= 32 else z


def divide_large(net, z):
    return z / z.max() if len(z) >= 32 else z


@pytest.mark.parametrize("after", [give_each_class_twelve, center_large, divide_large])
def test_what_large_batches_alone_do_is_found(after):
    net = Net(after=after)
    assert list(examine(net, torch.rand(128, *SHAPE)).doubts) == ["batch_dependent"]
    assert examine(net, torch.rand(3, *SHAPE)).doubts == {}


@pytest.mark.parametrize("images", [1, 2, 30])
@pytest.mark.parametrize(
    "net",
    [
        Net(),
        Net(lambda net, z: F.dropout(z, 0.5, net.training)),
        Net(after=lambda net, z: z * 0),  # constant
        Net(after=lambda net, z: z * 1e20),
        Net(after=lambda net, z: z + 1e6),
        Net(after=lambda net, z: z.half()),
        Net(after=lambda net, z: z.bfloat16()),
        Net(after=lambda net, z: z / 0),  # no number, but always the same
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)),
    ],
)
def test_what_is_one_is_left_alone(net, images):
    assert examine(net, torch.rand(images, *SHAPE)).doubts == {}
    assert net.training


def test_a_look_draws_nothing_from_the_generators():
    net = Net(lambda net, z: F.dropout(z, 0.5) * random.random() * np.random.rand())
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    expected = torch.rand(2), np.random.rand(), random.random()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    examine(net, torch.rand(4, *SHAPE, generator=torch.Generator()))
    assert torch.equal(torch.rand(2), expected[0])
    assert (np.random.rand(), random.random()) == expected[1:]


@pytest.mark.parametrize("what", ["dropout", "mean of the batch", "a buffer"])
def test_every_judgement_tells_of_it(what, tmp_path):
    before, doubt = UNSOUND[what]
    attack = {"use": "pgd", "steps": 2, "restarts": 1}
    net = Net(before)
    found = prunekit.evaluate(net, make_images(), ["clean", attack], threat="1/255")
    note = found.notes[0]
    assert note.startswith("clean, pgd: the network")
    assert "evaluation mode" in note
    assert found.metrics[f"clean.{doubt}"] == 20
    assert found.metrics[f"pgd.{doubt}"].kind == "diagnosis"


def test_a_sound_network_gets_no_note_and_no_other_metric():
    found = prunekit.evaluate(Net(), make_images(), "clean")
    assert (found.notes, found.metrics.keys()) == ((), {"clean.accuracy"})


def test_validation_tells_too_and_leaves_no_image_in_the_network(tmp_path):
    """A buffer that counts the passes: those of validation are undone."""
    x, y = make_images(40)
    stages = [{"kind": "pretrain", "epochs": 2}]
    recipe = {"dataset": {"use": "given", "batch_size": 10, "validation": 0.25}}
    recipe |= {"objective": "benign", "stage": stages}
    data = (x, y, x, y)
    found = prunekit.run(
        recipe, model=Net(count_in_buffer), data=data, out=tmp_path / "r", quiet=True
    )
    # Three batches an epoch; building may try the network once.
    assert found.model.seen - 2 * 3 in (0, 1)
    (stage,) = json.loads((tmp_path / "r" / "run.json").read_text())["stages"]
    (note,) = stage["notes"]
    assert note.startswith("validation: the network's forward pass changes seen")


@pytest.mark.parametrize("evaluator", ["certify", "verified"])
@pytest.mark.parametrize("what", ["dropout", "mean of the batch", "a buffer"])
def test_there_is_no_certificate_of_what_is_no_function(evaluator, what):
    pytest.importorskip("auto_LiRPA" if evaluator == "verified" else "torch")
    options = {"certify": {"sigma": 0.25, "n0": 10, "n": 100, "radii": [0.1]}, "verified": {}}[
        evaluator
    ]
    with pytest.raises(RunError, match=r"evaluation mode.* would mean nothing"):
        prunekit.evaluate(
            Net(UNSOUND[what][0]), make_images(), {"use": evaluator, **options}, threat="1/255"
        )


def spoil(rows, value=torch.nan):
    """Gives `value` for images whose first pixel is one of `rows` / 255."""

    def after(net, x):
        return x.masked_fill(
            torch.isin((255 * net.input[:, 0]).round(), torch.tensor(rows))[:, None], value
        )

    return after


def keep(net, z):
    net.input = z.detach()
    return z


def number_images(n=20):
    """Images whose first pixel is their number."""
    x, y = make_images(n)
    x[:, 0, 0, 0] = torch.arange(n)
    return x, y


ALL = [
    "clean",
    {"use": "pgd", "steps": 2, "restarts": 1},
    {"use": "certify", "sigma": 0.25, "n0": 5, "n": 20, "radii": [0.1]},
    {"use": "autoattack", "attacks": ["square"], "queries": 3},
]


@pytest.mark.parametrize("evaluator", ALL, ids=["clean", "pgd", "certify", "autoattack"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_number_for_any_image_is_an_error(evaluator, value):
    if evaluator == ALL[3]:
        pytest.importorskip("pyautoattack")
    net = Net(after=lambda net, z: z * 0 + value)
    with pytest.raises(RunError, match="NaN or infinity for each of the 20 images"):
        prunekit.evaluate(net, make_images(), evaluator, threat="1/255")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_number_for_some_images_is_told_with_their_number_and_wrong(value):
    x, _ = number_images()
    sound = Net()
    y = sound(x / 255).argmax(1)
    net = Net(keep, spoil([2, 3, 15], value))
    found = prunekit.evaluate(net, (x, y), ["clean", ALL[1]], threat="0.0001", batch_size=8)
    assert found.metrics["clean.accuracy"] == 17 / 20
    assert found.records["clean.correct"][[2, 3, 15]].tolist() == [False] * 3
    for name in ("clean", "pgd"):
        assert found.metrics[f"{name}.not_finite"] == 3
        assert not found.records[f"{name}.correct"][[2, 3, 15]].any()
    (note,) = found.notes
    assert note.startswith("clean, pgd: the network gives NaN or infinity for 3 of 20 images")


def test_no_number_under_attack_alone_is_told():
    """Logits are NaN at images that are not multiples of 1/255."""

    def after(net, logits):
        pixels = 255 * net.input
        odd = ((pixels - pixels.round()).abs() > 0.01).any(1)
        return logits.masked_fill(odd[:, None], torch.nan)

    x, _ = make_images()
    y = Net()(x / 255).argmax(1)
    attacks = ["clean", ALL[1]]
    found = prunekit.evaluate(Net(keep, after), (x, y), attacks, threat="0.001")
    assert found.metrics["clean.accuracy"] == 1
    assert found.metrics["pgd.accuracy"] == 0
    told = "pgd: the network gives NaN or infinity for 20 of 20 images"
    assert any(note.startswith(told) for note in found.notes)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("norm.running_var", -0.5, "negative variances in norm.running_var"),
        ("norm.running_var", -1e-7, "negative variances in norm.running_var"),
        ("norm.running_var", torch.inf, "NaN or infinity in norm.running_var"),
        ("norm.running_mean", torch.nan, "NaN or infinity in norm.running_mean"),
        ("seen", torch.nan, "NaN or infinity in seen"),
        ("fc.weight", torch.nan, "NaN or infinity in fc.weight"),
    ],
)
def test_numbers_that_no_network_can_hold_are_named(name, value, what):
    net = Net()
    net.norm = nn.BatchNorm1d(64)
    net.state_dict()[name].view(-1)[0] = value
    with pytest.raises(RunError, match=f"{what}: there is nothing to judge"):
        prunekit.evaluate(net, make_images(), "clean")


def test_classes_that_are_left_out_with_minus_infinity_are_told_what_to_write():
    """Nine classes for all images; all ten but for those of which a pixel says so."""

    def leave_out(net, z):
        return z.masked_fill(torch.arange(10) == 9, -torch.inf)

    with pytest.raises(RunError, match=r"write -1e4 as their logits, not -inf"):
        prunekit.evaluate(Net(after=leave_out), make_images(), "clean")
    net = Net(keep, lambda net, z: torch.where(spoil([4])(net, z).isnan(), leave_out(net, z), z))
    found = prunekit.evaluate(net, number_images(), "clean")
    assert found.metrics["clean.not_finite"] == 1
    assert found.notes[0].endswith("(to leave classes out, write -1e4 as their logits, not -inf)")


def test_a_mask_of_minus_infinity_is_no_mistake():
    net = Net()
    net.seen.fill_(-torch.inf)
    assert prunekit.evaluate(net, make_images(), "clean").notes == ()


def test_what_is_no_logits_is_named_while_it_is_watched_too():
    net = Net(after=lambda net, z: (z, z))
    with pytest.raises(RunError, match="the network gives a tuple for 9 images"):
        examine(net, torch.rand(30, *SHAPE))
    with pytest.raises(RunError, match="the network gives a tuple"), watching(net):
        net(torch.rand(6, *SHAPE))


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(m)])
def test_a_scripted_network_is_judged_as_others(wrap):
    x, _ = make_images()
    y = torch.arange(20) % 10
    plain = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    expected = prunekit.evaluate(plain, (x, y), ["clean", ALL[1]], threat="1/255")
    scripted = wrap(torch.jit.script(plain))
    found = prunekit.evaluate(scripted, (x, y), ["clean", ALL[1]], threat="1/255")
    assert found.metrics == expected.metrics
    assert [note.split(":")[1] for note in found.notes] == [" the network is scripted"]
    assert not expected.notes


def test_a_network_with_nothing_to_prune_is_judged():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))
    assert 0 <= prunekit.evaluate(net, make_images(), "clean").metrics["clean.accuracy"] <= 1


@pytest.mark.parametrize("objective", ["pgd-at", "trades", "mart", "free-adv"])
def test_training_against_attacks_needs_a_gradient_to_the_images(objective, tmp_path):
    x, y = make_images(40)
    recipe = {"dataset": {"use": "given", "batch_size": 10}, "threat": {"eps": 0.1}}
    recipe |= {"objective": objective, "stage": [{"kind": "pretrain", "epochs": 1}]}
    net = Net(lambda net, z: z.detach())
    with pytest.raises(RunError, match=r"rehearsal.*lets no gradient through to its images"):
        prunekit.run(recipe, model=net, data=(x, y, x, y), out=tmp_path / "r", quiet=True)


def test_what_a_network_changed_is_put_back():
    net = Net(replace_buffer)
    buffer = net.seen
    standing = Standing(net)
    net(torch.rand(2, *SHAPE))
    net.register_buffer("late", torch.ones(1))
    net.fc.bias.data.fill_(3)
    assert standing.moved() == standing.restore() == ("fc.bias", "late", "seen")
    assert standing.moved() == ()
    assert net.seen is buffer


def grow(net, z):
    net.seen.data = torch.cat([net.seen.view(-1), z.detach()[:, 0]])
    return z


def narrow(net, z):
    net.seen.data = net.seen.double() + 1
    return z


@pytest.mark.parametrize("after", [grow, narrow])
def test_what_a_network_put_into_the_data_of_a_buffer_is_put_back(after):
    net = Net(after=after)
    found = prunekit.evaluate(net, make_images(), "clean", batch_size=8)
    assert found.metrics["clean.stateful"] == 20
    buffer, standing = net.seen, Standing(net)
    net(torch.rand(2, *SHAPE))
    assert standing.moved() == ("seen",)
    standing.restore()
    assert net.seen is buffer
    assert (buffer.shape, buffer.dtype, float(buffer)) == ((), torch.float32, 0)


def test_a_buffer_that_changes_late_is_told_too():
    def change(net, z):
        net.calls += 1
        net.seen += net.calls > 25
        return z

    net = Net(change)
    assert examine(net, torch.rand(1, *SHAPE)).doubts == {}
    net.calls = 0
    found = prunekit.evaluate(net, make_images(), "clean", batch_size=1)
    assert found.metrics["clean.stateful"] == 20


def draw_in(part):
    """Noise in one forward pass of so many, by chance."""
    return lambda net, z: z + torch.randn_like(z) * (torch.rand(()) < 1 / part)


def draw_at_one(net, z):
    """Noise at the image with number 8."""
    return z + torch.randn_like(z) * ((255 * z[:, :1]).round() == 8)


@pytest.mark.parametrize("before", [draw_in(2), draw_at_one])
def test_draws_that_come_now_and_then_are_found_and_called_random(before):
    net, x = Net(before), number_images(60)[0] / 255
    for seed in range(10):
        torch.manual_seed(seed)
        assert list(examine(net, x).doubts) == ["random"]


PASSES = {"left": 0}


def stop_in_time(net, z):
    """Stops at once, as a second Ctrl-C does, in the forward pass that a test chose."""
    PASSES["left"] -= 1
    if not PASSES["left"]:
        raise KeyboardInterrupt
    return keep(net, z)


RESUMED = {
    "pgd": {"use": "pgd", "steps": 2, "restarts": 1},
    "any": {"use": "pgd", "steps": 2, "restarts": 1, "iterate": "any"},
    "autoattack": {"use": "autoattack", "attacks": ["apgd-ce", "square"], "steps": 2, "queries": 3},
    "certify": ALL[2],
}


@pytest.mark.parametrize("evaluator", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("rows", [[1, 2, 9], range(4, 12)], ids=["some", "after the first batch"])
def test_a_judgement_stopped_anywhere_ends_as_one_that_was_not(evaluator, rows, tmp_path):
    if evaluator["use"] == "autoattack":
        pytest.importorskip("pyautoattack")
    x, _ = number_images(12)
    data = *make_images(), x, Net()(x / 255).argmax(1)
    recipe = {"dataset": {"use": "given", "batch_size": 4}, "threat": {"eps": 0.0001}}
    recipe |= {"stage": [{"kind": "evaluate", "with": [evaluator]}]}
    (run,) = plan_recipe(recipe, Net(stop_in_time, spoil(list(rows))), data, None).runs
    (use,) = run.stages[0].options.with_
    compute = open_compute("cpu")
    loaded = Inputs(compute, lambda event: None).load(run)
    state = build_state(run, loaded.data, compute)

    def judge_until(left, name):
        """What is found, and after how many forward passes."""
        PASSES["left"] = left
        folder = StageFolder(tmp_path / str(name))
        work = Work(run, loaded, compute, folder, "", lambda event: None, Stop())
        found = judge(state, run.stages[0], use, work)
        records = {name: record.tolist() for name, record in found.records.items()}
        return (found.metrics, found.notes, records), left - PASSES["left"]

    whole, passes = judge_until(10**6, "whole")
    assert whole[0]["not_finite"] >= len(rows)
    for left in range(1, passes + 1, max(passes // 40, 1)):
        with pytest.raises(KeyboardInterrupt):
            judge_until(left, left)
        assert judge_until(10**6, left)[0] == whole, left


def drift(net, z):
    net.seen += 1
    return z * (1 + 0.01 * net.seen)


@pytest.mark.parametrize(
    ("before", "random"), [(UNSOUND["noise"][0], True), (UNSOUND["a counter"][0], True),
                           (drift, False), (lambda net, z: z, False)],
    ids=["noise", "a counter", "a buffer", "sound"],
)  # fmt: skip
def test_autoattack_takes_for_random_what_the_result_says_is(before, random):
    pytest.importorskip("pyautoattack")
    x, _ = make_images(4)
    data = x, Net()(x / 255).argmax(1)
    few = {"use": "autoattack", "steps": 1, "queries": 1}
    found = prunekit.evaluate(Net(before), data, few, threat="1/255").metrics
    assert ("autoattack.draws" in found) == ("autoattack.random" in found) == random
    assert not random or not found["autoattack.random"].doubtful  # it attacks what draws
    named = {**few, "attacks": ["square"]}
    found = prunekit.evaluate(Net(before), data, named, threat="1/255").metrics
    assert ("autoattack.random" in found) == random
    assert not random or found["autoattack.random"].doubtful
    assert "autoattack.zero_gradient" not in found  # nothing looked at gradients


def test_a_look_sets_up_no_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *a: asked.append(a))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *a: None)
    examine(Net(), torch.rand(4, *SHAPE))
    assert asked == []
