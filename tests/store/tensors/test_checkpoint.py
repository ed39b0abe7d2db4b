"""One file format, read with suspicion."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from prunekit.errors import UserError
from prunekit.pruning.masks import apply_masks
from prunekit.store.tensors.checkpoint import (
    load_weights,
    read_checkpoint,
    read_model,
    write_checkpoint,
    write_model,
)
from prunekit.store.tensors.states import read_states


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


# Writing and reading back


def test_round_trip_to_the_bit(path):
    tensors = {"a": torch.randn(3), "b/c": torch.tensor(7), "empty": torch.zeros(0, 2)}
    write_checkpoint(path, tensors, {"x": [1.5, float("nan"), None]})
    found, header = read_checkpoint(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert (header["format"], header["x"][0], header["x"][2]) == (1, 1.5, None)


def test_the_same_content_gives_the_same_bytes(path, tmp_path):
    tensors = {"b": torch.ones(2), "a": torch.zeros(3)}
    write_checkpoint(path, tensors, {"p": 1, "q": 2})
    other = tmp_path / "other.safetensors"
    write_checkpoint(other, dict(reversed(tensors.items())), {"q": 2, "p": 1})
    assert path.read_bytes() == other.read_bytes()


def test_tied_weights_are_written_under_both_names(path):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    write_model(path, net, {}, {})
    assert load_file(path).keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_model_loads_without_prunekit_and_masks_come_back(path):
    net = make_net()
    masks = {"0.weight": torch.rand(3, 4) > 0.5, "2.weight": torch.zeros(2, 3, dtype=torch.bool)}
    masks["2.weight"][0, 1] = masks["2.weight"][1, 2] = True
    apply_masks(net, masks)
    with torch.no_grad():
        net[2].weight[0, 1] = 0.0  # kept, and zero by chance
    write_model(path, net, masks, {"architecture": {"use": "x"}})
    plain = make_net()
    plain.load_state_dict(load_file(path), strict=True)
    assert not plain[0].weight[~masks["0.weight"]].any()
    other = make_net()
    found = read_model(path, other)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], masks[name]) for name in masks)
    assert all(
        torch.equal(value, net.state_dict()[name]) for name, value in other.state_dict().items()
    )
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["prunekit"])
    assert header["masked"] == ["0.weight", "2.weight"]
    assert header["kept_zeros"] == {"2.weight": [1]}


# Bad files


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[:-5],
            "empty": b"",
            "text": b"hello, this is no checkpoint",
            "header": b"\xff" * 16 + content[16:],
        }[how]
    )


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "header"])
@pytest.mark.parametrize("read", [read_checkpoint, read_states])
def test_damaged_files_are_told(path, how, read):
    write_checkpoint(path, {"a": torch.ones(100)}, {})
    damage(path, how)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        read(path)


def test_foreign_safetensors_have_an_empty_header(path):
    save_file({"a": torch.ones(1)}, path, metadata={"format": "pt"})
    assert read_checkpoint(path)[1] == {}


def test_a_later_format_asks_for_an_update(path):
    save_file({"a": torch.ones(1)}, path, metadata={"prunekit": '{"format": 2}'})
    with pytest.raises(UserError, match=r"format 2.*update prunekit"):
        read_checkpoint(path)


def test_what_does_not_fit_is_listed(path):
    state = make_net().state_dict()
    del state["1.running_mean"]
    state["3.weight"] = torch.ones(1)
    state["0.weight"] = torch.ones(3, 5)
    net = make_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(net, state, path)
    for words in ("missing: 1.running_mean", "not in the network: 3.weight",
                  "0.weight is (3, 5), in the network (3, 4)"):  # fmt: skip
        assert words in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
