"""Digits, and `.npz` files: good ones, and broken ones made on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prunekit_arrays import NpzOptions, prunekit_datasets
from prunekit_arrays.reading import read_npz

from prunekit.catalog.component import NoOptions, Use
from prunekit.contexts import DatasetContext
from prunekit.contracts import Data
from prunekit.data.batches import Arrays
from prunekit.errors import UserError
from prunekit.testing import example_context

COMPONENTS = {component.name: component for component in prunekit_datasets()}
RANDOM = np.random.default_rng(0)


def build(name: str, options: Any) -> Data:
    use: Use[Data] = Use(COMPONENTS[name], options, "arrays")
    return use.build(example_context(DatasetContext))


def images_of(split: object) -> torch.Tensor:
    assert isinstance(split, Arrays)
    return split.images


def make_arrays(**changes: Any) -> dict[str, np.ndarray]:
    """Six training and three test images of 4x5 pixels with the classes 0, 1, 2."""
    arrays: dict[str, Any] = {
        "x_train": RANDOM.integers(2, 256, (6, 4, 5), dtype=np.uint8),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": RANDOM.integers(2, 256, (3, 4, 5), dtype=np.uint8),
        "y_test": np.array([2, 1, 0]),
    }
    arrays.update(changes)
    return {key: value for key, value in arrays.items() if value is not None}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_file(**changes: Any) -> Path:
        file = tmp_path / "mine.npz"
        np.savez_compressed(file, **make_arrays(**changes))
        return file

    return write_file


def test_digits_are_what_their_facts_say() -> None:
    data = build("digits", NoOptions())
    facts = COMPONENTS["digits"].facts
    assert facts is not None
    told = facts(NoOptions())
    assert images_of(data.train).shape == (told.train, *told.shape) == (1437, 1, 8, 8)
    assert images_of(data.test).shape == (told.test, *told.shape) == (360, 1, 8, 8)
    assert (data.shape, data.classes, data.augment) == (told.shape, told.classes, told.augment)
    assert torch.equal(data.test.labels.bincount(), torch.full((10,), 36))
    # The 178, 182, 177, ... images of each digit in the original file, less 36.
    expected = [142, 146, 141, 147, 145, 146, 145, 143, 138, 144]
    assert data.train.labels.bincount().tolist() == expected
    assert images_of(data.train).dtype == torch.uint8


def test_digits_are_the_originals_scaled() -> None:
    data = build("digits", NoOptions())
    # The first line of optdigits.tes is a zero; 0 1 5 9 10 13 are 0 16 80 143 159 207 of 255.
    assert data.train.labels[:10].tolist() == list(range(10))
    first = images_of(data.train)[0, 0]
    assert first[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert first[7].tolist() == [0, 0, 96, 207, 159, 0, 0, 0]
    both = torch.cat([images_of(data.train), images_of(data.test)])
    assert both.unique().tolist() == [int(v * 255 / 16 + 0.5) for v in range(17)]
    # The last line of the file is an eight.
    assert data.test.labels[-1] == 8
    last = images_of(data.test)[-1, 0, 0]
    assert last.tolist() == [int(v * 255 / 16 + 0.5) for v in (0, 0, 10, 14, 8, 1, 0, 0)]


def test_digits_do_not_share_images_between_parts() -> None:
    data = build("digits", NoOptions())
    train = {image.numpy().tobytes() for image in images_of(data.train)}
    test = {image.numpy().tobytes() for image in images_of(data.test)}
    assert len(train) == 1437
    assert not train & test


def test_npz_of_grey_images(write: Callable[..., Path]) -> None:
    arrays = make_arrays()
    data = build("npz", NpzOptions(write(**arrays)))
    assert (data.shape, data.classes, data.augment) == ((1, 4, 5), 3, ())
    assert np.array_equal(images_of(data.train)[:, 0].numpy(), arrays["x_train"])
    assert np.array_equal(images_of(data.test)[:, 0].numpy(), arrays["x_test"])
    assert data.train.labels.dtype == torch.int64
    assert data.test.labels.tolist() == [2, 1, 0]


def test_npz_of_colour_images_in_both_orders(write: Callable[..., Path]) -> None:
    last = {
        "x_train": RANDOM.integers(2, 256, (6, 8, 9, 3), dtype=np.uint8),
        "x_test": RANDOM.integers(2, 256, (3, 8, 9, 3), dtype=np.uint8),
    }
    first = {key: value.transpose(0, 3, 1, 2) for key, value in last.items()}
    of_last = build("npz", NpzOptions(write(**last)))
    of_first = build("npz", NpzOptions(write(**first), channels="first"))
    assert of_last.shape == of_first.shape == (3, 8, 9)
    assert torch.equal(images_of(of_last.train), images_of(of_first.train))
    assert images_of(of_last.train)[1, 2, 3, 4] == last["x_train"][1, 3, 4, 2]
    assert images_of(of_last.train).is_contiguous()


def test_npz_with_more_classes_than_labels(write: Callable[..., Path]) -> None:
    assert build("npz", NpzOptions(write(), classes=7)).classes == 7


@pytest.mark.parametrize("labels", [np.uint8, np.int32, ">i8"])
def test_npz_labels_may_be_columns_of_any_integers(write: Callable[..., Path], labels: Any) -> None:
    column = np.array([[0], [1], [2], [0], [1], [2]], dtype=labels)
    data = build("npz", NpzOptions(write(y_train=column)))
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("precision", [np.float16, np.float32, np.float64])
def test_floats_that_are_levels_are_read_exactly(
    write: Callable[..., Path], precision: Any
) -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(6).reshape(6, 16, 16)
    divided = levels.astype(precision) / precision(255)
    multiplied = levels.astype(precision) * precision(1 / 255)
    data = build("npz", NpzOptions(write(x_train=divided, x_test=multiplied[:3].clip(0, 1))))
    assert np.array_equal(images_of(data.train)[:, 0].numpy(), levels)
    assert np.array_equal(images_of(data.test)[:, 0].numpy(), levels[:3])


def test_wide_integers_within_a_byte_are_read(write: Callable[..., Path]) -> None:
    wide = np.full((6, 4, 5), 255, dtype=np.int64)
    assert images_of(build("npz", NpzOptions(write(x_train=wide))).train).unique().tolist() == [255]


GREY = np.full((6, 4, 5), 100, dtype=np.uint8)
BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "one key missing": ({"x_test": None}, "has no x_test; name the arrays x_train, "),
    "two keys missing": ({"x_test": None, "y_test": None}, "has no x_test and no y_test"),
    "flat images": (
        {"x_train": np.ones((6, 20), np.uint8)},
        "x_train has the shape 6 x 20; save at least one image, as (N, H, W) or (N, H, W, C)",
    ),
    "five axes": ({"x_train": np.ones((6, 1, 4, 5, 1), np.uint8)}, "the shape 6 x 1 x 4 x 5 x 1"),
    "no images": ({"x_test": np.ones((0, 4, 5), np.uint8)}, "x_test has the shape 0 x 4 x 5"),
    "a number": ({"x_train": np.uint8(3)}, "x_train has the shape of a single number"),
    "a label too few": (
        {"y_train": np.array([0, 1, 2, 0, 1])},
        "x_train has 6 images, but y_train has 5 labels",
    ),
    "no labels": (
        {"y_test": np.array([], np.int64)},
        "but y_test has 0 labels",
    ),
    "two sizes": (
        {"x_test": np.full((3, 5, 4), 9, np.uint8)},
        "training images are 1 x 4 x 5, but test images are 1 x 5 x 4 (channels x height x width)",
    ),
    "grey and colour": (
        {"x_test": np.full((3, 4, 5, 3), 9, np.uint8)},
        "training images are 1 x 4 x 5, but test images are 3 x 4 x 5",
    ),
    "channels first": (
        {"x_train": np.full((6, 3, 8, 8), 9, np.uint8)},
        "x_train is 6 x 3 x 8 x 8, which means 8 channels; if it has 3, write "
        'channels = "first" with use = "npz", or give x.transpose(0, 2, 3, 1) in Python',
    ),
    "NaN": ({"x_train": np.where(GREY > 0, np.nan, 0)}, "x_train has NaN or infinite pixels"),
    "infinity": ({"x_train": np.where(GREY > 0, np.inf, 0)}, "NaN or infinite pixels"),
    "floats to 255": (
        {"x_train": GREY.astype(np.float32)},
        "x_train has floats from 100 to 100, but pixels are in [0, 1]; save uint8 images",
    ),
    "normalised floats": ({"x_train": GREY / 255 - 0.5}, "floats from -0.10784314 to -0.10784314"),
    "floats between levels": (
        {"x_train": np.full((6, 4, 5), 0.1234, np.float32)},
        "floats that are not multiples of 1/255, such as 0.1234; save uint8 images",
    ),
    "negative pixels": ({"x_train": -GREY.astype(int)}, "x_train has pixels from -100 to -100"),
    "16 bit": ({"x_train": np.full((6, 4, 5), 4095)}, "has pixels from 4095 to 4095"),
    "booleans": (
        {"x_train": GREY > 0},
        "x_train is of type bool; save uint8 images with",
    ),
    "texts": ({"x_train": GREY.astype(str)}, "x_train is of type <U3"),
    "bits": (
        {"x_train": GREY // 100},
        "x_train has no pixel brighter than 1 of 255; if 1 means white",
    ),
    "negative labels": ({"y_train": np.array([0, 1, 2, 0, 1, -1])}, "y_train has a label -1"),
    "huge labels": (
        {"y_train": np.array([0, 1, 2, 0, 1, 2**64 - 1], np.uint64)},
        "y_train has a label -1",
    ),
    "one-hot labels": (
        {"y_train": np.eye(6, dtype=int)},
        "y_train has the shape 6 x 6; save one class number for each image (for one-hot rows, "
        "numpy.argmax(y, axis=1))",
    ),
    "a single label": ({"y_train": np.int64(1)}, "y_train has the shape of a single number"),
    "float labels": (
        {"y_train": np.array([0.0, 1, 2, 0, 1, 2])},
        "y_train is of type float64; save class numbers from 0 to K - 1 as integers",
    ),
    "text labels": ({"y_train": np.array(list("abcabc"))}, "y_train is of type <U1"),
    "one class": (
        {"y_train": np.zeros(6, int), "y_test": np.zeros(3, int)},
        "all labels are 0; a classifier needs at least two classes",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_bad_arrays_are_told_in_one_line(
    write: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    file = write(**changes)
    monkeypatch.chdir(file.parent)
    with pytest.raises(UserError) as error:
        build("npz", NpzOptions(file))
    text = str(error.value)
    assert text.startswith("mine.npz")
    assert message in text
    assert "\n" not in text


def test_channels_last_although_first_was_said(write: Callable[..., Path]) -> None:
    file = write(x_train=np.full((6, 8, 8, 3), 9, np.uint8))
    with pytest.raises(UserError, match='8 channels; if it has 3, write channels = "last"'):
        build("npz", NpzOptions(file, channels="first"))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([1, 2, 3], "the largest label is 3, and no training image has label 0: number"),
        ([0, 100, 200], "the largest label is 200, and no training image has label 1, 2, 3, ...: "),
        ([0, 10**15, 1], "label 2, 3, 4, ...: number the classes 0, 1, 2, ... without gaps (numpy"),
    ],
    ids=["from 1", "gaps", "identifiers"],
)
def test_labels_with_gaps(write: Callable[..., Path], labels: list[int], told: str) -> None:
    y = np.array(labels)
    file = write(y_train=np.tile(y, 2), y_test=y)
    with pytest.raises(UserError) as error:
        build("npz", NpzOptions(file))
    assert told in str(error.value)
    if max(labels) < 1000:  # said to be meant
        assert build("npz", NpzOptions(file, classes=201)).classes == 201


def test_labels_beyond_the_given_classes(write: Callable[..., Path]) -> None:
    message = "there is a label 2, but 2 classes have the labels 0 to 1; number the classes from 0"
    with pytest.raises(UserError, match=message):
        build("npz", NpzOptions(write(), classes=2))


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def flip_a_byte(file: Path) -> None:
    # Within the first array's compressed data, behind its local header.
    content = bytearray(file.read_bytes())
    content[120] ^= 0xFF
    file.write_bytes(bytes(content))


def replace_with_text(file: Path) -> None:
    file.write_text("x_train = 1")


def replace_with_pickle(file: Path) -> None:
    import pickle

    file.write_bytes(pickle.dumps({"x_train": Bomb(), "y_train": 1}))


def replace_with_single_array(file: Path) -> None:
    with file.open("wb") as stream:
        np.save(stream, np.ones(3))


def replace_array_with_text(file: Path) -> None:
    import zipfile

    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x_train.npy", "no numpy header")


def remove(file: Path) -> None:
    file.unlink()


class Bomb:
    """Goes off when it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize(
    "damage",
    [
        cut_off, flip_a_byte, replace_with_text, replace_with_pickle, replace_with_single_array,
        replace_array_with_text,
    ],
)  # fmt: skip
def test_damaged_files_are_told_in_one_line(
    write: Callable[..., Path], damage: Callable[[Path], None]
) -> None:
    file = write()
    damage(file)
    with pytest.raises(UserError) as error:
        read_npz(file)
    text = str(error.value)
    assert "mine.npz cannot be read as an .npz file (" in text
    assert "write it with numpy.savez_compressed(file, x_train=..., y_train=..., " in text
    assert "allow_pickle" not in text
    assert "\n" not in text


def test_arrays_of_objects_are_never_unpickled(write: Callable[..., Path]) -> None:
    file = write(y_train=np.array([Bomb() for _ in range(6)], dtype=object))
    with pytest.raises(UserError, match="is an array of Python objects, which prunekit never"):
        read_npz(file)


def test_other_keys_of_the_file_do_not_matter(write: Callable[..., Path]) -> None:
    assert read_npz(write(names=np.array([Bomb()], dtype=object))).classes == 3
