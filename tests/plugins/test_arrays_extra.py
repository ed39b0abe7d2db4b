"""Extra training images: every way in which they may lie in a file, and files made to harm."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prunekit_arrays import ExtraOptions
from prunekit_arrays.extra import build

from prunekit import Arrays
from prunekit.contexts import DatasetContext
from prunekit.contracts import Data
from prunekit.errors import UserError

NONE = Arrays(torch.empty(0), torch.empty(0, dtype=torch.int64))
EXTENDED = Data(NONE, NONE, (3, 8, 9), 10)
CONTEXT = DatasetContext(seed=0, folder=Path(), extra_of=EXTENDED)
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(2, 256, (6, 8, 9, 3), dtype=np.uint8)
LABELS = np.array([0, 9, 2, 0, 1, 5])

GOOD: dict[str, Callable[[Path], Any]] = {
    "npz": lambda f: np.savez(f.open("wb"), x_extra=IMAGES, y_extra=LABELS),
    "npz beside others": lambda f: np.savez(
        f.open("wb"), x_extra=IMAGES, y_extra=LABELS, x_train=np.array([Bomb()], dtype=object)
    ),
    "npz of generated images": lambda f: np.savez(f.open("wb"), image=IMAGES, label=LABELS),
    "channels first": lambda f: np.savez(
        f.open("wb"), x_extra=IMAGES.transpose(0, 3, 1, 2), y_extra=LABELS
    ),
    "list of labels": lambda f: write_pickle(f, labels=LABELS.tolist()),
    "other entries": lambda f: write_pickle(f, more={"model": "wrn", "score": np.float64(0.5)}),
    "Fortran order": lambda f: write_pickle(f, images=np.asfortranarray(IMAGES)),
    "big endian": lambda f: write_pickle(f, labels=LABELS.astype(">i4")),
} | {
    f"pickle protocol {p}": (lambda f, p=p: write_pickle(f, protocol=p)) for p in range(6)
}  # fmt: skip


def write_pickle(
    file: Path,
    *,
    images: Any = IMAGES,
    labels: Any = LABELS,
    more: Any = None,
    protocol: int = 4,
) -> None:
    content = {"data": images, "extrapolated_targets": labels, **(more or {})}
    file.write_bytes(pickle.dumps(content, protocol=protocol))


def go_off() -> None:
    pytest.fail("a pickle was executed")


class Bomb:
    """Goes off when it is unpickled."""

    def __reduce__(self) -> Any:
        return (go_off, ())


@pytest.mark.parametrize("write", GOOD.values(), ids=GOOD)
def test_extra_images_are_read(write: Callable[[Path], Any], tmp_path: Path) -> None:
    file = tmp_path / "extra"
    write(file)
    extra = build(ExtraOptions(file=file), CONTEXT).train
    assert np.array_equal(extra.images.numpy(), IMAGES.transpose(0, 3, 1, 2))
    assert extra.images.is_contiguous()
    assert extra.labels.tolist() == LABELS.tolist()


def test_pickles_of_older_numpy_and_of_python_2(tmp_path: Path) -> None:
    file = tmp_path / "extra.pickle"
    write_pickle(file, protocol=2)
    content = file.read_bytes()
    assert b"numpy._core.multiarray" in content
    file.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert build(ExtraOptions(file=file), CONTEXT).train.labels.tolist() == LABELS.tolist()
    # Python 2 wrote the bytes of arrays as strings (opcode T), and names as such too (opcode U).
    raw, image = LABELS.astype("<i8").tobytes(), IMAGES.tobytes()

    def string(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    def array(kind: bytes, shape: bytes, value: bytes) -> bytes:
        return (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt" + string(b"b") + b"tR"
            b"(I1\n(" + shape + b"tcnumpy\ndtype\n(" + string(kind) + b"I0\nI1\ntR(I3\n"
            + string(b"<") + b"NNNI-1\nI-1\nI0\ntbI0\n" + string(value) + b"tb"
        )  # fmt: skip

    images = array(b"u1", b"I6\nI8\nI9\nI3\n", image)
    file.write_bytes(
        b"\x80\x02}(" + string(b"data") + images
        + string(b"extrapolated_targets") + array(b"i8", b"I6\n", raw) + b"u."
    )  # fmt: skip
    extra = build(ExtraOptions(file=file), CONTEXT).train
    assert np.array_equal(extra.images.numpy(), IMAGES.transpose(0, 3, 1, 2))
    assert extra.labels.tolist() == LABELS.tolist()


class Pointers:
    """An array of objects whose dtype says that they are no objects, so that bytes are pointers."""

    def __reduce__(self) -> Any:
        return (np.ndarray, ((6,), ForgedDtype(), b"\x01" * 48))


class ForgedDtype:
    def __reduce__(self) -> Any:
        return (np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0))


class ForgedArray:
    def __reduce__(self) -> Any:
        state = (1, (6,), ForgedDtype(), False, b"\x01" * 48)
        return (np.ndarray.__reduce__(LABELS)[0], (np.ndarray, (0,), b"b"), state)


class Codec:
    def __reduce__(self) -> Any:
        import codecs

        return (codecs.encode, ("text", "zlib_codec"))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (
        lambda f: write_pickle(f, more={"x": Bomb()}),
        "test_arrays_extra.go_off, but prunekit reads only arrays",
    ),
    "code in a label": (lambda f: write_pickle(f, labels=Bomb()), "a pickle that uses "),
    "objects": (
        lambda f: write_pickle(f, labels=np.array([1, 2, None], dtype=object)),
        "its arrays do not hold plain numbers",
    ),
    "forged pointers": (lambda f: write_pickle(f, labels=Pointers()), "is not an array of numbers"),
    "forged dtype": (lambda f: write_pickle(f, labels=ForgedArray()), "do not hold plain numbers"),
    "codec": (lambda f: write_pickle(f, labels=Codec()), "is not an array of numbers"),
    "set of labels": (lambda f: write_pickle(f, labels={1, 2}), "is not an array of numbers"),
    "texts": (lambda f: write_pickle(f, labels=["a", "b"]), "is not an array of numbers"),
    "no dictionary": (lambda f: f.write_bytes(pickle.dumps([1])), "it is not a dictionary"),
    "cut off": (lambda f: f.write_bytes(pickle.dumps({"data": IMAGES})[:-9]), "neither an .npz"),
    "text": (lambda f: f.write_text("hello"), "is neither an .npz file nor a pickle of arrays"),
    "nothing": (lambda f: f.write_text(""), "is neither an .npz file nor a pickle of arrays"),
    "persistent": (lambda f: f.write_bytes(b"Pname\n."), "neither an .npz file nor a pickle"),
    "other keys": (
        lambda f: f.write_bytes(pickle.dumps({"data": IMAGES})),
        "has no arrays data and extrapolated_targets; save extra images with numpy.savez",
    ),
    "other npz keys": (
        lambda f: np.savez(f.open("wb"), x_train=IMAGES, y_extra=LABELS),
        "has no arrays x_extra and y_extra or image and label; save extra images with",
    ),
    "too few labels": (
        lambda f: write_pickle(f, labels=LABELS[:5]),
        "data has 6 images, but extrapolated_targets has 5 labels; save one label for each image",
    ),
    "probabilities": (
        lambda f: write_pickle(f, labels=np.full(6, 0.5)),
        "extrapolated_targets is of type float64; save class numbers",
    ),
    "not there": (lambda f: None, "there is no file"),
}


@pytest.mark.parametrize(("write", "message"), BAD.values(), ids=BAD)
def test_bad_files_are_told_in_one_line(
    write: Callable[[Path], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "extra.pickle"
    write(file)
    with pytest.raises(UserError) as error:
        build(ExtraOptions(file=file), CONTEXT)
    text = str(error.value)
    assert "extra.pickle" in text
    assert message in text
    assert "\n" not in text
