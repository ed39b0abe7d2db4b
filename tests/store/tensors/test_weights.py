"""Files of other programs: wrappings are taken off, what is no weights is refused."""

import io
import pickle
import re
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from prunekit.errors import UserError
from prunekit.store.tensors.checkpoint import load_weights
from prunekit.store.tensors.states import read_states
from prunekit.store.tensors.weights import find_weights, start_from


def make_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(body=nn.Linear(4, 3), bn=nn.BatchNorm1d(3), fc=nn.Linear(3, 2))
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pt"


def prefixed(state, *starts):
    return {start + name: value for start in starts for name, value in state.items()}


def check_equal(found, state):
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


# What is read


WRAPPED = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"epoch": 3, "state_dict": s},
    "net": lambda s: {"net": s, "acc": 1.0},
    "model": lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "deep": lambda s: {"last": {"weights": {"net": s}}},
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "parallel": lambda s: prefixed(s, "module."),
    "compiled in parallel": lambda s: prefixed(s, "module._orig_mod."),
    "parallel in compiled": lambda s: {"state_dict": prefixed(s, "_orig_mod.module.")},
    "lightning": lambda s: {"state_dict": prefixed(s, "model."), "epoch": 1},
    "lightning, metrics": lambda s: prefixed(s, "model.") | {"acc.tp": torch.zeros(3).long()},
    "lightning, compiled": lambda s: {"state_dict": prefixed(s, "net._orig_mod.")},
    "averaged model": lambda s: {"n_averaged": torch.tensor(3), **prefixed(s, "module.")},
    "part in parallel": lambda s: {n.replace("fc.", "fc.module."): v for n, v in s.items()},
    "attacker's copy": lambda s: {"model": prefixed(s, "module.model.", "module.attacker.model.")},
    "other name of the head": lambda s: {n.replace("fc.", "linear."): v for n, v in s.items()},
    "timm's name of the head": lambda s: {n.replace("fc.", "head.fc."): v for n, v in s.items()},
    "of old torch": lambda s: {n: v for n, v in s.items() if "num_batches" not in n},
    "half": lambda s: {n: v.half() if v.is_floating_point() else v for n, v in s.items()},
    "epoch among them": lambda s: {"epoch": 3, "name": "x", **s},
    "unused block": lambda s: {**s, "sub_block1.layer.0.conv1.weight": torch.ones(2)},
}  # fmt: skip


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_weights_are_found_in_what_wraps_them(path, wrap):
    net = make_net()
    if wrap is WRAPPED["half"]:
        net.half().float()
    torch.save(wrap(net.state_dict()), path)
    other = make_net(1)
    found = find_weights(path, other)
    assert not found.notes
    load_weights(other, found.tensors, path)
    check_equal(other.state_dict(), net.state_dict())
    start_from(path, make_net(1))


def test_a_child_of_a_wrappers_name_keeps_it(path):
    net = nn.Sequential(OrderedDict(module=make_net()))
    for state in (net.state_dict(), prefixed(net.state_dict(), "module.")):
        torch.save(state, path)
        check_equal(find_weights(path, net).tensors, net.state_dict())
    # The file may also be of what is inside.
    torch.save(make_net().state_dict(), path)
    check_equal(find_weights(path, net).tensors, net.state_dict())


def test_the_counter_that_old_files_lack_starts_at_zero(path):
    net = make_net()
    net.bn.num_batches_tracked += 7
    torch.save({n: v for n, v in net.state_dict().items() if "num_batches" not in n}, path)
    found = find_weights(path, net).tensors["bn.num_batches_tracked"]
    assert (found.item(), found.dtype) == (0, torch.int64)


def test_the_colors_of_a_normalizer_that_a_file_lacks_are_the_networks_and_told(path):
    net = make_net()
    net.register_buffer("mu", torch.full((1, 3, 1, 1), 0.25))
    torch.save(make_net().state_dict(), path)
    found = find_weights(path, net)
    assert found.tensors["mu"].eq(0.25).all()
    assert found.notes == ("does not hold mu: left as the network has them",)
    # A wrapper with colors of its own, and the file of what it wraps.
    outer = nn.Sequential(OrderedDict(model=make_net(1)))
    outer.register_buffer("mean", torch.zeros(3))
    found = find_weights(path, outer)
    assert torch.equal(found.tensors["model.fc.weight"], make_net().fc.weight)
    assert found.notes == ("does not hold mean: left as the network has them",)
    with pytest.raises(UserError, match=r"does not hold mu.*begin with: prunekit import dense"):
        start_from(path, net)


def test_averages_beside_the_weights(path):
    plain, averaged = make_net(0).state_dict(), make_net(1).state_dict()
    for content, places in (
        ({"state_dict": plain, "state_dict_ema": averaged}, ("state_dict", "state_dict_ema")),
        (prefixed(plain, "net.") | prefixed(averaged, "ema_net."), ("net", "ema_net")),
        ({"s": prefixed(plain, "student.") | prefixed(averaged, "teacher.")},
         ("s.student", "s.teacher")),
    ):  # fmt: skip
        torch.save(content, path)
        found = find_weights(path, make_net(2))
        check_equal(found.tensors, plain)
        assert found.notes == (f"took {places[0]}; there is also {places[1]}",)
        found = find_weights(path, make_net(2), places[1])
        check_equal(found.tensors, averaged)
        assert not found.notes
    told = "has no state dict 'ema'; there is s, s.student, s.teacher$"
    with pytest.raises(UserError, match=told):
        find_weights(path, make_net(), "ema")
    torch.save(plain, path)
    with pytest.raises(UserError, match=r"there is one at the top \(leave --entry out\)$"):
        find_weights(path, make_net(), "ema")


def test_two_that_fit_alike_are_not_chosen_between(path):
    torch.save({"best": make_net(0).state_dict(), "last": make_net(1).state_dict()}, path)
    with pytest.raises(UserError, match=r"several state dicts that fit: best, last; .* --entry"):
        find_weights(path, make_net())
    check_equal(find_weights(path, make_net(), "last").tensors, make_net(1).state_dict())


class Residual(nn.Module):
    def __init__(self, shortcut, head):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3)
        setattr(self, shortcut, nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
        setattr(self, head, nn.Linear(2, 2))


@pytest.mark.parametrize("head", ["fc", "classifier", "last_linear"])
def test_names_of_timm_and_others_are_those_of_a_small_resnet(path, head):
    theirs, ours = Residual("downsample", head), Residual("shortcut", "linear")
    torch.save(prefixed(theirs.state_dict(), "module."), path)
    check_equal(
        find_weights(path, ours).tensors,
        {
            name.replace("downsample", "shortcut").replace(head, "linear"): value
            for name, value in theirs.state_dict().items()
        },
    )


def test_names_are_matched_only_where_shapes_agree_and_one_to_one(path):
    ours = Residual("shortcut", "linear")
    other = Residual("downsample", "fc")
    other.conv1 = nn.Conv2d(1, 2, 5)
    torch.save(other.state_dict(), path)
    with pytest.raises(UserError, match="does not fit the network: missing: linear"):
        load_weights(ours, find_weights(path, ours).tensors, path)
    # Two heads of one shape: which is which is not known.
    two = nn.ModuleDict({"fc": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    torch.save(prefixed(nn.Linear(2, 2).state_dict(), "linear.", "classifier."), path)
    with pytest.raises(UserError, match="does not fit the network"):
        load_weights(two, find_weights(path, two).tensors, path)


# What is refused


@pytest.mark.parametrize("extra", ["normalize.mean", "other.weight", "mean", "model.fc.mean"])
def test_what_may_decide_something_is_not_left_out(path, extra):
    net = make_net()
    torch.save({**prefixed(net.state_dict(), "model."), extra: torch.rand(3)}, path)
    with pytest.raises(UserError, match=f"not in the network: {extra}; save the network's own"):
        load_weights(net, find_weights(path, net).tensors, path)


def test_integers_of_a_network_are_not_left_out(path):
    net = make_net()
    torch.save({**net.state_dict(), "order": torch.arange(3)}, path)
    with pytest.raises(UserError, match="not in the network: order"):
        load_weights(net, find_weights(path, net).tensors, path)


def test_another_tensor_of_a_networks_name_is_not_lost(path):
    net = make_net()
    torch.save({**prefixed(net.state_dict(), "model."), "fc.weight": torch.rand(7)}, path)
    with pytest.raises(UserError, match=r"not in the network: another fc\.weight"):
        load_weights(net, find_weights(path, net).tensors, path)


NO_WEIGHTS = {
    "masks": lambda v: v.abs() > 0.05,
    "int8": lambda v: (v * 100).to(torch.int8),
    "float8": lambda v: v.to(torch.float8_e4m3fn),
    "complex": lambda v: v + 1j,
    "quantised": lambda v: torch.quantize_per_tensor(v.float(), 0.01, 0, torch.qint8),
    "sparse": lambda v: v.to_sparse(),
    "csr": lambda v: v.to_sparse_csr() if v.dim() == 2 else v,
    "meta": lambda v: v.to("meta"),
}


@pytest.mark.parametrize("change", NO_WEIGHTS.values(), ids=NO_WEIGHTS)
@pytest.mark.parametrize("one", [True, False])
def test_tensors_that_are_no_weights(path, change, one):
    net = make_net()
    state = net.state_dict()
    torch.save({n: change(v) if n == "fc.weight" or not one else v for n, v in state.items()}, path)
    with pytest.raises(UserError) as told:
        load_weights(net, find_weights(path, net).tensors, path)
    assert "weight is " in str(told.value)
    assert "\n" not in str(told.value)
    check_equal(net.state_dict(), make_net().state_dict())


def test_a_pruned_file_is_pointed_to_its_import(path):
    net = make_net()
    scores = {"fc.popup_scores": torch.rand(2, 3)}
    torch.save({"state_dict": {**net.state_dict(), **scores}}, path)
    with pytest.raises(UserError, match="pruned network: prunekit import hydra"):
        start_from(path, make_net())
    prune.l1_unstructured(net.fc, "weight", 0.5)
    torch.save(net.state_dict(), path)
    with pytest.raises(UserError, match="pruned network: prunekit import torch-prune"):
        start_from(path, make_net())


@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm])
def test_a_file_with_weight_norm_is_told_how_to_undo_it(path, norm):
    net = make_net()
    norm(net.fc)
    torch.save(net.state_dict(), path)
    with pytest.raises(UserError, match=r"weight norm: call .*remove_weight_norm.*; save again$"):
        start_from(path, make_net())


@pytest.mark.parametrize("name", ["none.safetensors", "none.pt"])
def test_missing_files_are_told(tmp_path, name):
    with pytest.raises(UserError, match=f"no file .*{name}"):
        read_states(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk", b"\x80\x02junk", b"\x80"])
def test_foreign_bytes_are_told(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.pt is damaged, or not a torch"):
        read_states(path)


@pytest.mark.parametrize("content", [{}, [torch.ones(1)], {"epoch": 3}, torch.ones(2)])
def test_what_is_no_state_dict_is_told(path, content):
    torch.save(content, path)
    with pytest.raises(UserError, match="no state dict") as told:
        read_states(path)
    named = isinstance(content, dict) and bool(content)
    assert ("; it holds epoch" in str(told.value)) == named


def test_a_dict_that_holds_itself_ends(path):
    content = {"a": {}}
    content["a"]["b"] = content
    torch.save(content, path)
    with pytest.raises(UserError, match="no state dict"):
        read_states(path)


def test_safetensors_have_their_state_dict_at_the_top(tmp_path):
    save_file({"module.weight": torch.ones(1), "head": torch.ones(1)}, tmp_path / "w.safetensors")
    assert read_states(tmp_path / "w.safetensors")[""].keys() == {"module.weight", "head"}


# Pickles


def save_old(content, path, numpy1=False):
    """As torch before 1.6 wrote it, where all is one stream; with numpy 1's names."""
    held = io.BytesIO()
    torch.save(content, held, _use_new_zipfile_serialization=False)
    written = held.getvalue()
    if numpy1:
        assert b"numpy._core.multiarray" in written
        written = written.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(written)


NUMBERS = [np.float64(0.1), np.float32(0.1), np.float16(0.1), np.int64(-3), np.uint8(200),
           np.bool_(True), np.dtype(">f8").type(0.1)]  # fmt: skip


@pytest.mark.parametrize("numpy1", [True, False])
@pytest.mark.parametrize("number", NUMBERS, ids=lambda v: v.dtype.name)
def test_numbers_of_numpy_are_read(path, number, numpy1):
    save_old({"state_dict": {"a": torch.ones(2)}, "lr": number}, path, numpy1)
    assert read_states(path).keys() == {"state_dict"}
    torch.save({"state_dict": {"a": torch.ones(2)}, "lr": number}, path)
    assert read_states(path).keys() == {"state_dict"}


def rewrite(path, old, new):
    """Change the pickle inside a file of `torch.save`."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part.replace(old, new) if name.endswith("data.pkl") else part)
            assert not name.endswith("data.pkl") or part.count(old)


def test_numbers_of_numpy_1_in_a_new_file(path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "lr": np.float64(0.1)}, path)
    rewrite(path, b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert read_states(path).keys() == {"state_dict"}


class Evil:
    """Unpickled, it would write a file."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (open, (self.target, "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_never_run(tmp_path, zipped):
    path, target = tmp_path / "evil.pt", tmp_path / "was-here"
    content = {"state_dict": {"a": torch.ones(1)}, "lr": np.float64(0.1), "extra": Evil(target)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    # A bare pickle of today's protocol is not read as far as to what it asks for.
    refusal = "asks for .*open, and only ten" if zipped else "damaged, or not a torch.save"
    with pytest.raises(UserError, match=rf"evil\.pt is .*{refusal}") as told:
        read_states(path)
    assert "weights_only" not in str(told.value)  # how to switch the protection off
    assert not target.exists()
    torch.load(path, weights_only=False) if zipped else pickle.loads(path.read_bytes())
    assert target.exists()  # it would have been


class Call:
    """Pickled as a call of any function."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments, state)

    def __reduce__(self):
        return self.call


def find(name):
    return getattr(np._core.multiarray, name)


HOSTILE = {
    "objects": Call(find("scalar"), np.dtype("O"), b"cos\nsystem\n(S'true'\ntR."),
    "records": Call(find("scalar"), np.dtype([("a", "f8")]), bytes(8)),
    "huge": Call(find("scalar"), np.dtype("V1000000000"), b""),
    "text": Call(find("scalar"), np.dtype("U9"), bytes(36)),
    "too short": Call(find("scalar"), np.dtype("f8"), b"1"),
    "too long": Call(find("scalar"), np.dtype("f8"), bytes(80)),
    "no type": Call(find("scalar"), "f8", bytes(8)),
    "no bytes": Call(find("scalar"), np.dtype("f8"), 3),
    "without bytes": Call(find("scalar"), np.dtype("f8")),
    "fields by state": Call(np.dtype, "f8", state=(3, "<", None, ("a",), {}, -1, -1, 0)),
    "any code": Call(np.dtype, "O"),
    "arrays": np.ones(2),
    "number of code": {"lr": np.float64(1.0), "x": Call(eval, "1")},
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_names_that_are_allowed_do_nothing_else(path, hostile):
    content = {"state_dict": {"a": torch.ones(2)}, "optimizer": {"lr": hostile}}
    for write in (torch.save, save_old):
        write(content, path)
        with pytest.raises(UserError, match=r"weights\.pt is (damaged, or|a pickle that)") as told:
            read_states(path)
        assert re.fullmatch(r"[^\n]+", str(told.value))


def test_what_a_program_allows_of_torch_is_as_it_was(path):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"a": torch.ones(2), "b": {"lr": np.float64(1)}}, path)
    with pytest.raises(UserError):
        read_states(path)
    assert set(torch.serialization.get_safe_globals()) == before
