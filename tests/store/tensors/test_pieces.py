"""Tensors by content: nothing twice, and no bit lost."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prunekit.errors import UserError
from prunekit.store.tensors.pieces import TYPES, hash_piece, read_pieces, write_pieces

WHOLE = torch.arange(12.0).reshape(3, 4)
TENSORS = {
    "a": WHOLE,
    "a view": WHOLE.T,
    "again": WHOLE.clone(),
    "as one row": WHOLE.reshape(12),
    "a number": torch.tensor(7),
    "empty": torch.zeros(0, 2),
    "half": torch.tensor([1.5, -2], dtype=torch.bfloat16),
    "zeros": torch.tensor([0.0, -0.0]),
    "other zeros": torch.tensor([0.0, 0.0]),
    "mask": torch.tensor([[True, False, True], [False, False, True], [True, True, True]]),
    "no mask": torch.zeros(0, 3, dtype=torch.bool),
    "yes": torch.tensor(True),
}


def bits(value):
    return value.dtype, tuple(value.shape), value.flatten().view(torch.uint8).tolist()


def test_every_bit_comes_back(tmp_path):
    write_pieces(tmp_path / "p", TENSORS, {"x": [1.5, float("nan"), None]})
    found, header = read_pieces(tmp_path / "p", {})
    assert {n: bits(v) for n, v in found.items()} == {n: bits(v) for n, v in TENSORS.items()}
    assert (header["x"][0], header["x"][2]) == (1.5, None)
    found["a"].add_(1)
    assert torch.equal(found["again"], WHOLE)


@pytest.mark.parametrize("kind", [t for t in TYPES if not t.is_complex], ids=str)
def test_other_programs_read_every_type(tmp_path, kind):
    value = torch.tensor([[1, 2], [3, 0]]).to(kind)
    write_pieces(tmp_path / "p", {"odd": torch.zeros(3, dtype=torch.uint8), "v": value}, {})
    assert bits(load_file(tmp_path / "p")[hash_piece(value)]) == bits(value)
    assert bits(read_pieces(tmp_path / "p", {})[0]["v"]) == bits(value)


def test_what_is_known_or_equal_is_not_written(tmp_path):
    known = {hash_piece(WHOLE): WHOLE}
    pieces = write_pieces(tmp_path / "p", TENSORS, {}, known)
    written = load_file(tmp_path / "p")
    assert known.keys() | written.keys() == pieces
    assert len(written) == len(TENSORS) - 2  # "a" and "again"
    assert torch.equal(read_pieces(tmp_path / "p", known)[0]["again"], WHOLE)
    with pytest.raises(UserError, match="p is damaged"):
        read_pieces(tmp_path / "p", {})


def test_a_mask_takes_a_bit_for_each_weight(tmp_path):
    mask = torch.rand(100, 100) < 0.5
    write_pieces(tmp_path / "p", {"mask": mask}, {})
    (packed,) = load_file(tmp_path / "p").values()
    assert packed.numel() == 1250
    assert packed.numpy().tobytes() == np.packbits(mask.numpy()).tobytes()


def test_every_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "p"
    write_pieces(path, {"a": torch.ones(3), "mask": TENSORS["mask"]}, {"x": 1})
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError):
            read_pieces(path, {})
