"""A network is looked at once, when it is built or handed over: what it gives, holds and stores."""

import copy
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import prunekit
from prunekit.engine.handed_over import _guess_shape, plan_recipe
from prunekit.errors import RunError, UserError
from prunekit.models.building import build_network, count_outputs
from prunekit.models.contract import (
    check_start,
    check_state_dict,
    check_tensors,
    copy_network,
    find_logits,
)

SHAPE = (1, 4, 4)


def data(n=16):
    x = torch.arange(n * 16, dtype=torch.uint8).view(n, *SHAPE)
    return x, torch.arange(n) % 2


def train(net, tmp_path, *stages):
    recipe = {
        "dataset": {"use": "given", "batch_size": 8, "validation": 0.25},
        "objective": "benign",
        "stage": list(stages) or [{"kind": "pretrain", "epochs": 1}],
    }
    return prunekit.run(recipe, model=net, data=data() * 2, out=tmp_path / "r", quiet=True)


class Net(nn.Module):
    """Gives `what` of its logits in some mode."""

    def __init__(self, what=lambda z: z, always=True):
        super().__init__()
        self.fc, self.what, self.always = nn.Linear(16, 2), what, always

    def forward(self, x):
        z = self.fc(x.flatten(1))
        return self.what(z) if self.always or self.training else z


OUTPUTS = {
    "a tuple": lambda z: (z, z),
    "a list": lambda z: [z],
    "a dict": lambda z: {"logits": z},
    "a NoneType": lambda z: None,
    "int64 of shape (2, 2)": lambda z: z.argsort(),
    "complex64 of shape (2, 2)": lambda z: z + 0j,
    "float32 of shape (2,)": lambda z: z[:, 0],
    "float32 of shape (2, 2, 1)": lambda z: z[..., None],
    "float32 of shape (1, 2)": lambda z: z[:1],
    "float32 of shape (2, 3)": lambda z: z.t(),  # for 3 images: for 2 it looks like logits
}


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("named", OUTPUTS)
def test_what_is_no_logits_is_told_in_the_mode_that_gives_it(tmp_path, named, always):
    net = Net(OUTPUTS[named], always)
    with pytest.raises(RunError) as told:
        train(net, tmp_path)
    mode = "" if always else " in train mode"
    assert f"gives {named}" in str(told.value)
    assert f"{mode}, instead of" in str(told.value)
    assert "architecture 'given'" in str(told.value)
    for look in (prunekit.evaluate, lambda n, d: prunekit.make_masks(n, 0.5, data=d)):
        if always:
            with pytest.raises(UserError, match=r"^the network gives"):
                look(net, data())
        else:  # nothing looks at it in train mode
            look(net, data())


LOOKS = {
    "run": lambda net, path: train(net, path),
    "masks": lambda net, path: prunekit.make_masks(net, 0.5, data=data()),
    "evaluate": lambda net, path: prunekit.evaluate(net, data()),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("change", [lambda x: x.sub_(0.5), lambda x: x.clamp_(0, 1), F.relu_])
def test_a_network_that_writes_over_its_images_is_told_what_to_write(tmp_path, look, change):
    class Writes(Net):
        def forward(self, x):
            return super().forward(change(x))

    with pytest.raises(RunError, match=r"changes the images that it is given .* x = x - \.\.\."):
        look(Writes(), tmp_path)


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_weights_of_another_precision_are_told_what_to_write(tmp_path, look, dtype):
    with pytest.raises(RunError) as told:
        look(Net().to(dtype), tmp_path)
    name = str(dtype).removeprefix("torch.")
    end = f"; images are float32, and it has weights in {name}: write model.float()"
    assert str(told.value).endswith(end)


def test_a_lack_of_memory_is_no_fault_of_the_network():
    class Large(Net):
        def forward(self, x):
            raise MemoryError

        def __deepcopy__(self, memo):
            raise MemoryError

        def load_state_dict(self, state, *args, **kwargs):
            raise MemoryError

    looks = [
        lambda net: find_logits(net, SHAPE, "it"),
        lambda net: check_state_dict(net, "it"),
        lambda net: copy_network(net, "it"),
        lambda net: count_outputs(net, SHAPE),
        _guess_shape,
    ]
    for look in looks:
        with pytest.raises(MemoryError):
            look(Large())


@pytest.mark.parametrize("kind", ["pretrain", "evaluate"])
def test_a_second_head_in_training_matters_where_something_is_trained(kind):
    stage = {"kind": kind, **({"with": ["clean"]} if kind == "evaluate" else {"epochs": 1})}
    recipe = {"dataset": {"use": "given"}, "objective": "benign", "stage": [stage]}
    (run,) = plan_recipe(recipe, Net(OUTPUTS["a tuple"], always=False), data() * 2, None).runs
    if kind == "evaluate":
        assert build_network(run, SHAPE, 2)
    else:
        with pytest.raises(RunError, match="a tuple for 2 images in train mode"):
            build_network(run, SHAPE, 2)


def test_looking_leaves_the_network_and_all_draws_as_they_are():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(8, 2)
    )
    net[1].eval()

    def draw(*_):
        random.random()
        np.random.rand()

    net.register_forward_hook(draw)
    before, seed = copy.deepcopy(net.state_dict()), torch.random.get_rng_state()
    others = random.getstate(), np.random.get_state()[1].tolist()
    find_logits(net, SHAPE, "it", training=True)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == others
    check_state_dict(net, "it")
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert [net.training, net[1].training, net[2].training] == [True, False, True]


class Keeps(nn.Module):
    """Changes what its state dict holds, in one mode."""

    def __init__(self, change, training=False, buffer=None, **registered):
        super().__init__()
        self.fc, self.change, self.of = nn.Linear(16, 2), change, training
        self.register_buffer("q", buffer, **registered)

    def forward(self, x):
        z = self.fc(x.flatten(1))
        if self.training is self.of:
            self.change(self, z)
        return z


def keep(name, value):
    return lambda net, z: setattr(net, name, value(net, z))


CHANGES = {
    "grows": (keep("q", lambda n, z: torch.cat([n.q, z.detach()])[-9:]), torch.zeros(0, 2)),
    "is made": (keep("q", lambda n, z: z.detach().clone()), None),
    "is unmade": (keep("q", lambda n, z: None), torch.zeros(3)),
    "takes the shape of a batch": (keep("q", lambda n, z: z.detach()), torch.zeros(8, 2)),
    "changes its type": (keep("q", lambda n, z: n.q * 0.9), torch.zeros(2, dtype=torch.int64)),
    "a layer": (keep("late", lambda n, z: nn.Linear(2, 2)), None),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("named", CHANGES)
def test_a_forward_that_changes_the_state_dict_is_refused_before_training(
    tmp_path, named, training
):
    change, buffer = CHANGES[named]
    with pytest.raises(RunError, match=r"changes its state dict in the forward") as told:
        train(Keeps(change, training, buffer), tmp_path)
    assert "\n" not in str(told.value)
    assert ("in train mode" in str(told.value)) == training
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_buffer_that_grows_from_the_second_batch_on_is_refused(tmp_path):
    calls = []

    def grow(net, z):
        calls.append(z.detach())
        net.q.data = torch.cat([net.q, *calls[1:]])

    with pytest.raises(RunError, match=r"changes its state dict .*: q is \(0, 2\) "):
        train(Keeps(grow, True, torch.zeros(0, 2)), tmp_path)


def test_what_the_state_dict_does_not_hold_may_grow(tmp_path):
    change, buffer = CHANGES["grows"]
    net = Keeps(change, True, buffer, persistent=False)
    find_logits(net, SHAPE, "it", training=True, stored=True)
    assert net.q is buffer
    assert len(train(net, tmp_path).masks) == 0


# Tensors


def make_lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))


@pytest.mark.parametrize(
    "look",
    [
        lambda net, path: train(net, path),
        lambda net, path: prunekit.make_masks(net, 0.5),
        lambda net, path: prunekit.make_masks(net, 0.5, data=data()),
        lambda net, path: prunekit.evaluate(net, data()),
    ],
    ids=["run", "masks", "masks of images", "evaluate"],
)
@pytest.mark.parametrize(
    "make",
    [make_lazy, lambda: nn.Sequential(nn.LazyConv2d(2, 3), nn.LazyBatchNorm2d(), nn.Flatten())],
)
def test_lazy_layers_are_told_by_whatever_takes_a_network(tmp_path, look, make):
    with pytest.raises(UserError, match=r"lazy layers.*\(1?0?\.?.*send one image through") as told:
        look(make(), tmp_path)
    assert "\n" not in str(told.value)
    net = make()
    net(torch.zeros(2, *SHAPE))
    check_tensors(net, "it")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (torch.zeros(2, dtype=torch.complex64), "of type torch.complex64"),
        (torch.zeros(2, device="meta"), "without values, on torch's meta device"),
        (torch.zeros(2).to_sparse(), "sparse"),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_tensors_that_nothing_can_train_or_store(value, named, trained):
    net = Net()
    if trained:
        net.scale = nn.Parameter(value)
    else:
        net.register_buffer("scale", value)
    with pytest.raises(UserError, match=f"has a tensor that is {named}: scale"):
        prunekit.evaluate(net, data())


# State dicts


class Inner(nn.Module):
    """Hands out the names of the network inside."""

    def __init__(self):
        super().__init__()
        self.model, self.mean = Net(), nn.Buffer(torch.tensor(0.3))

    def forward(self, x):
        return self.model(x - self.mean)

    def state_dict(self, *args, **kwargs):
        return self.model.state_dict(*args, **kwargs)


class Both(Inner):
    def load_state_dict(self, state, *args, **kwargs):
        return self.model.load_state_dict(state, *args, **kwargs)


class Deaf(Net):
    def load_state_dict(self, state, *args, **kwargs):
        return None


class Strict(Net):
    def load_state_dict(self, state, *args, **kwargs):
        raise KeyError("epoch")


class Rounding(Net):
    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {name: value.half() for name, value in state.items()}


class More(Net):
    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        pass


class Part(Net):
    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if "bias" not in name}


@pytest.mark.parametrize(
    ("make", "override", "fault"),
    [
        (Inner, "Inner.state_dict", "lacks mean"),
        (Both, "Both.state_dict", "lacks mean"),
        (Part, "Part.state_dict", "lacks fc.bias"),
        (Deaf, "Deaf.load_state_dict", "loading it does not bring it back"),
        (Rounding, "Rounding.state_dict", "loading it does not bring it back"),
        (Strict, "Strict.load_state_dict", "loading it fails, KeyError: 'epoch'"),
        (More, "More.get_extra_state", "it holds _extra_state as well"),
    ],
)
def test_a_network_that_could_not_be_read_again_is_not_trained(tmp_path, make, override, fault):
    with pytest.raises(RunError) as told:
        train(make(), tmp_path)
    assert f"overrides its state_dict ({override}), so that it cannot be stored" in str(told.value)
    assert fault in str(told.value)
    assert not list(tmp_path.glob("r/model.safetensors"))
    # Judging it stores nothing.
    assert 0 <= prunekit.evaluate(make(), data()).metrics["clean.accuracy"] <= 1


def test_an_override_that_changes_nothing_is_none_and_hooks_count(tmp_path):
    class Told(Net):
        def state_dict(self, *args, **kwargs):
            return super().state_dict(*args, **kwargs)

    train(Told(), tmp_path)
    net = Net()
    net.register_state_dict_post_hook(lambda module, state, *_: state.__delitem__("fc.bias"))
    with pytest.raises(RunError, match=r"overrides its state_dict \(by a hook\).*lacks fc\.bias"):
        check_state_dict(net, "it")


def tie(net):
    net[3].weight = net[1].weight
    return net


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net,
        tie,
        lambda net: parametrizations.spectral_norm(net[1]) and net,
        lambda net: parametrizations.weight_norm(net[1]) and net,
        lambda net: nn.utils.spectral_norm(net[1]) and net,
        lambda net: prune.l1_unstructured(net[1], "weight", 0.5) and net,
        lambda net: net[1].weight.data.fill_(float("nan")) is not None and net,
        lambda net: prunekit.normalize_inputs(net, [0.5], [0.5]),
        lambda net: net.register_buffer("mask", torch.ones(2) > 0) or net,
        nn.DataParallel,
        torch.compile,
    ],
)
def test_what_torch_itself_does_to_state_dicts_is_right(change):
    torch.manual_seed(0)
    net = change(nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    check_tensors(net, "it")
    check_state_dict(net, "it")
    after = net.state_dict()
    assert all(torch.equal(v.nan_to_num(), after[n].nan_to_num()) for n, v in before.items())


# Blame


class Late(Net):
    """Fails at more images than it is tried with."""

    def forward(self, x):
        if len(x) > 3:
            raise ValueError("too many")
        return super().forward(x)


def test_the_network_is_blamed_for_what_it_raises_in_a_plugin(tmp_path):
    with pytest.raises(RunError) as told:
        train(Late(), tmp_path)
    assert (
        str(told.value)
        == "the network (Late.forward) failed: ValueError: too many (--debug shows where)"
    )


# Weights that a run starts from


NORMALIZED = """\
from torch import nn


def make():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
"""


def make_normalized():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("3.weight", float("nan"), "NaN or infinity in 3.weight"),
        ("1.running_mean", float("inf"), "NaN or infinity in 1.running_mean"),
        ("1.running_var", -1.0, "negative variances in 1.running_var"),
    ],
)
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_what_cannot_be_computed_with_is_told_of_the_file_that_holds_it(
    tmp_path, name, value, told, kind
):
    state = make_normalized().state_dict()
    state[name].view(-1)[0] = value
    torch.save(state, tmp_path / "w.pt")
    recipe = {
        "dataset": {"use": "given", "batch_size": 8, "validation": 0.25},
        "architecture": {
            "use": "python",
            "file": str(tmp_path / "net.py"),
            "init": str(tmp_path / "w.pt"),
        },
        "objective": "benign",
        "stage": [{"kind": kind, "epochs": 1}],
    }
    (tmp_path / "net.py").write_text(NORMALIZED)
    handed = {"data": data() * 2, "out": tmp_path / "r", "quiet": True}
    with pytest.raises(UserError, match=rf"w\.pt holds {told}; start"):
        prunekit.run(recipe, **handed)
    net = make_normalized()
    net.load_state_dict(state)
    with pytest.raises(UserError, match=rf"the network from Python holds {told}; start"):
        prunekit.run(recipe, model=net, **{**handed, "out": tmp_path / "s"})


def test_weights_that_nothing_was_trained_in_are_no_start(tmp_path):
    net = make_normalized()
    for value, told in ((0, "all of them are zero"), (1, "all of them are 0 or 1")):
        with torch.no_grad():
            for weight in (net[0].weight, net[3].weight):
                weight.fill_(value)
        for trained in (False, True):
            with pytest.raises(UserError, match=rf"w\.pt holds no weights: {told}"):
                check_start(net, tmp_path / "w.pt", trained=trained)
        with pytest.raises(UserError, match=rf"from Python holds no weights: {told}"):
            check_start(net, None, trained=False)
        check_start(net, None, trained=True)
    check_start(make_normalized(), tmp_path / "w.pt", trained=False)


# Copies


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 2)

    def forward(self, x):
        self.last = self.fc(x.flatten(1))
        return self.last


def make_stubborn(kind):
    net = Remembers()
    if kind == "lock":
        net.fc.lock = threading.Lock()
    elif kind == "file":
        net.log = open(__file__)  # noqa: SIM115
    elif kind == "activation":
        net(torch.zeros(1, *SHAPE))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(net.fc)
        net(torch.zeros(1, *SHAPE))
        del net.last
    return net


@pytest.mark.parametrize(
    ("kind", "named"),
    [("lock", "fc.lock"), ("file", "log"), ("activation", "last"), ("norm", "fc.weight")],
)
def test_what_cannot_be_copied_is_told_of_the_network(tmp_path, kind, named):
    net = make_stubborn(kind)
    looks = [lambda: prunekit.make_masks(net, 0.5), lambda: train(net, tmp_path)]
    # The forward that evaluate tries first keeps nothing of a graph.
    looks += [lambda: prunekit.evaluate(net, data())] if kind in ("lock", "file") else []
    for look in looks:
        with pytest.raises(UserError, match=rf"the network cannot be copied, .* {named} ") as told:
            look()
        assert "\n" not in str(told.value)


class Strange(torch.Tensor):
    pass


def test_logits_of_another_class_of_tensors_are_told(tmp_path):
    net = Net(lambda z: z.as_subclass(Strange))
    for look in (train, lambda n, _: prunekit.evaluate(n, data())):
        with pytest.raises(RunError, match=r"gives logits of class Strange.*as_subclass\("):
            look(net, tmp_path)


def make_plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.jit.script(make_plain()),
        lambda: torch.jit.trace(make_plain(), torch.zeros(2, *SHAPE)),
        lambda: nn.Sequential(torch.jit.script(make_plain())),
    ],
    ids=["script", "trace", "inside"],
)
def test_a_scripted_network_is_neither_trained_nor_pruned(tmp_path, make):
    told = r"torch\.jit\.script or torch\.jit\.trace made.*take the network as it was before"
    with pytest.raises(RunError, match=told):
        train(make(), tmp_path)
    with pytest.raises(RunError, match=told):
        prunekit.make_masks(make(), 0.5)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_part_is_trained_as_others(tmp_path):
    net = nn.Sequential(make_plain(), torch.jit.script(nn.BatchNorm1d(2)))
    before = net[1].running_mean.clone()
    assert not torch.equal(train(net, tmp_path).model[1].running_mean, before)
