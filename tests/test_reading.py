"""Files that users hand over: what they are is looked at before they are read."""

import io
import json
import os
import re
import struct
import zipfile

import numpy as np
import pytest

from prunekit.errors import UserError
from prunekit.reading import (
    ObjectArrayError,
    check_file,
    hash_file,
    parse_json,
    read_arrays,
    read_bytes,
)

pytestmark = pytest.mark.usefixtures("here")


def test_only_regular_files_of_limited_size_are_read(here):
    os.mkfifo(here / "pipe")
    (here / "large").write_bytes(b"12345")
    (here / "link").symlink_to("large")
    (here / "round").symlink_to("round")
    assert read_bytes(here / "link", 5) == b"12345"
    device = type(here)("/dev/zero")
    for path, message in {
        here / "pipe": "pipe is a pipe, not a file",
        device: "/dev/zero is a device, not a file",
        here: "is a folder; name a file in it",
        here / "none": "there is no file none",
        here / "large/inner": "cannot read large/inner: Not a directory",
        here / "round": "cannot read round: Too many levels of symbolic links",
        here / ("x" * 300): "File name too long",
        here / "large": "large is too large: at most ",
    }.items():
        with pytest.raises(UserError) as caught:
            read_bytes(path, 4)
        assert message in str(caught.value)
    # A file of /proc says that it is empty.
    with pytest.raises(UserError, match="too large"):
        read_bytes(type(here)("/proc/self/maps"), 4)
    check_file(here / "large")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "it has the key 'a' twice"),
        ('{"a": [1, NaN]}', "a.1 is nan, which is not finite"),
        ('{"a": -Infinity}', "a is -inf, which is not finite"),
        ('{"a": 1e400}', "a is inf, which is not finite"),
        ("1" * 400, "it is a number that does not fit into 64 bits"),
        ("1" * 10_000, "Exceeds the limit"),
        ('{"a": "\\ud800"}', "a is not Unicode"),
        ('{"\\ud800": 1}', "it has the key '\\ud800', which is not Unicode"),
        ('{"a": "\\u0000"}', "a holds the character NUL"),
        ("[" * 40 + "]" * 40, "0.0.0.0 is nested more than 32 levels deep"),
        ("[" * 100_000 + "]" * 100_000, "it is nested more than 32 levels deep"),
        ("[", "Expecting value"),
        ("\udcff".encode("utf-8", "surrogateescape"), "can't decode byte 0xff"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_is_plain_data(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_json(text)


def test_json_of_a_checkpoint_may_hold_what_is_not_finite():
    assert parse_json('{"a": [1, Infinity]}', finite=False) == {"a": [1, float("inf")]}


def test_arrays_that_inflate_to_more_than_their_file_could_hold_are_refused(here):
    with zipfile.ZipFile("bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            head, {"descr": "|u1", "fortran_order": False, "shape": (2**29,)}
        )
        with archive.open("x.npy", "w") as file:
            file.write(head.getvalue())
            for _ in range(2**9):
                file.write(bytes(2**20))
        archive.writestr("y.npy", npy(np.arange(3)))
    with pytest.raises(ValueError, match=r"would take 512 MB, and at most 100 times the size"):
        read_arrays(here / "bomb.npz")
    assert read_arrays(here / "bomb.npz", ["y"])["y"].tolist() == [0, 1, 2]


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.zeros(3)).replace(b"(3,)", b"(9,)"), "its x is not as large as it says"),
        (npy(np.zeros(3)).replace(b"(3,)", b"(-3,)"), "is not as large"),
        (npy(np.zeros(3)).replace(b"\x01\x00", b"\x09\x00", 1), "unknown format"),
        (npy(np.zeros(3)).replace(b"'<f8'", b"'<q9'"), "not a valid dtype"),
        (b"", "EOF|expected|reading magic"),
    ],
    ids=["more", "negative", "version", "type", "empty"],
)
def test_a_forged_header_of_an_array_is_found(here, content, message):
    with zipfile.ZipFile("a.npz", "w") as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(ValueError, match=message):
        read_arrays(here / "a.npz")


def test_other_archives_are_refused(here):
    np.savez("objects.npz", x=np.array([{}], dtype=object))
    with pytest.raises(ObjectArrayError, match=r"^x$"):
        read_arrays(here / "objects.npz")
    (here / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match="not a complete archive"):
        read_arrays(here / "text.npz")
    np.savez("plain.npz", x=np.float32([1, 2]), y=np.array(3))
    found = read_arrays(here / "plain.npz")
    assert (found["x"].tolist(), found["y"].tolist()) == ([1, 2], 3)


def test_a_header_that_lies_about_its_types_is_named(here):
    from prunekit.store.tensors.checkpoint import read_checkpoint

    def write(header):
        table = {"__metadata__": {"prunekit": json.dumps(header)}}
        text = json.dumps(table).encode()
        (here / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)

    for header, message in [
        ({"dataset": 1}, "its dataset is 1"),
        ({"threat": {"eps": 1}}, "its threat is {'eps': 1}"),
        ({"threat": {"eps": float("nan"), "norm": "linf"}}, "its threat is"),
        ({"shape": [1, 8]}, "its shape is [1, 8]"),
        ({"shape": [3, 60000, 60000]}, "its shape is [3, 60000, 60000]"),
        ({"classes": True}, "its classes is True"),
        ({"masked": "0.weight"}, "its masked is '0.weight'"),
        ({"kept_zeros": {"a": [-1]}}, "its kept_zeros is {'a': [-1]}"),
        ({"seed": "1"}, "its seed is '1'"),
        ({"sparsity": 7}, "its sparsity is 7"),
        ({"sparsity": -0.1}, "its sparsity is -0.1"),
        ([], "it is no table"),
    ]:
        write(header)
        with pytest.raises(UserError) as caught:
            read_checkpoint(here / "m.safetensors")
        assert str(caught.value).startswith("m.safetensors is damaged: its header")
        assert message in str(caught.value)


def test_a_file_is_hashed_by_what_it_holds(here):
    (here / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of FIPS 180
    assert hash_file(here / "a") == known
