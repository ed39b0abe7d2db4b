"""Images and labels from `.npz` files and arrays, checked before anything is made of them.

The keys are those of Keras: `x_train`, `y_train`, `x_test`, `y_test`.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prunekit import Arrays
from prunekit.contracts import Data
from prunekit.errors import UserError, relative

KEYS = ("x_train", "y_train", "x_test", "y_test")
Channels = Literal["last", "first"]


# All that numpy and zipfile raise on files that are cut off, damaged, encrypted or no archive.
_READ_ERRORS = (
    OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_npz(path: Path, *, classes: int | None = None, channels: Channels = "last") -> Data:
    """The data set in a file; see `to_data` for what its arrays may be.

    Raises `UserError` with what is wrong with the file and what to write instead.
    """
    return to_data(read_arrays(path, KEYS), relative(path), classes=classes, channels=channels)


def read_arrays(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the arrays that the file has; nothing else in it is looked at.

    Raises `UserError` where the file or one of the arrays cannot be read.
    """
    name = relative(path)
    arrays: dict[str, np.ndarray] = {}
    try:
        with path.open("rb") as file:
            # Else numpy takes the file for a pickle, and says how to open it all the same.
            if not zipfile.is_zipfile(file):
                raise ValueError("it is no complete archive")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                for key in (key for key in keys if key in archive.files):
                    arrays[key] = archive[key]
                    if not isinstance(arrays[key], np.ndarray):
                        raise ValueError(f"its {key} is no array")
    except _READ_ERRORS as error:
        if "Object arrays" in str(error):
            raise UserError(
                f"{name}: {key} is an array of Python objects, which are never unpickled; save "
                "numbers, images of one size in one array"
            ) from error
        raise UserError(
            f"{name} cannot be read as an .npz file ({_first_line(error)}); write it with "
            f"numpy.savez_compressed(file, {', '.join(f'{key}=...' for key in keys)})"
        ) from error
    return arrays


def to_data(
    arrays: Mapping[str, np.ndarray],
    source: str,
    *,
    classes: int | None = None,
    channels: Channels = "last",
) -> Data:
    """Make a data set of arrays: images (N, H, W) or (N, H, W, C), labels (N,) or (N, 1).

    With `channels="first"`, images are (N, C, H, W). Pixels are integers 0 to 255, or floats that
    are multiples of 1/255. Labels are integers 0 to K - 1; K is `classes`, by default the largest
    label plus 1. `source` is what messages call the arrays' origin.

    Raises `UserError` with what is wrong and what to write instead.
    """
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise UserError(
            f"{source} has no {' and no '.join(missing)}; the arrays have to be called "
            f"{', '.join(KEYS)}"
        )
    train, test = (
        to_split(arrays, (f"x_{part}", f"y_{part}"), source, channels) for part in ("train", "test")
    )
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"{source}: training images are {_size(train.images)}, test images "
            f"{_size(test.images)} (channels x height x width); save images of one size"
        )
    largest = max(int(train.labels.max()), int(test.labels.max()))
    if classes is None:
        classes = largest + 1
    if largest >= classes:
        raise UserError(
            f"{source}: there is a label {largest}, but {classes} classes have the labels 0 to "
            f"{classes - 1}; number the classes from 0"
        )
    if classes < 2:
        raise UserError(f"{source}: all labels are 0; a classifier needs at least two classes")
    _, c, h, w = train.images.shape
    return Data(train, test, shape=(c, h, w), classes=classes)


def to_split(
    arrays: Mapping[str, np.ndarray], keys: tuple[str, str], source: str, channels: Channels
) -> Arrays:
    """The images and labels under these two keys; see `to_data` for what they may be."""
    x, y = keys
    images = _to_images(arrays[x], f"{source}: {x}", channels)
    labels = _to_labels(arrays[y], f"{source}: {y}")
    if len(images) != len(labels):
        raise UserError(
            f"{source}: {x} has {len(images)} images, {y} {len(labels)} labels; save one label "
            "for each image"
        )
    return Arrays(images, labels)


def _to_images(images: np.ndarray, name: str, channels: Channels) -> Tensor:
    """-> uint8 (N, C, H, W)."""
    shape = " x ".join(map(str, images.shape))
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise UserError(
            f"{name} has the shape {shape or 'of one number'}; save at least one image, as "
            "(N, H, W) or (N, H, W, C)"
        )
    if images.ndim == 4:
        # More than 4 channels are believed only where the other reading is no better.
        first, last = images.shape[1], images.shape[3]
        given, other, way = first, last, 'write channels = "last"'
        if channels == "last":
            given, other = last, first
            way = 'save it as (N, H, W, C), or with use = "npz" write channels = "first"'
        if given > 4 >= other:
            raise UserError(
                f"{name} is {shape}, which would be {given} channels; if there are {other}, {way}"
            )
    levels = _to_levels(images, name)
    if images.ndim == 3:
        levels = levels[:, None]
    elif channels == "last":
        levels = levels.transpose(0, 3, 1, 2)
    # Writable, or torch warns; a copy only where it is neither that nor contiguous.
    return torch.from_numpy(np.require(levels, requirements=["C", "W"]))


def _to_levels(images: np.ndarray, name: str) -> np.ndarray:
    """-> uint8 of the same shape."""
    if images.dtype.kind == "f":
        levels = _round_floats(images, name)
    elif images.dtype.kind in "ui":
        if images.min() < 0 or images.max() > 255:
            raise UserError(
                f"{name} holds pixels from {images.min()} to {images.max()}; save uint8 images, "
                "0 to 255"
            )
        levels = images.astype(np.uint8, copy=False)
    else:
        raise UserError(f"{name} is of type {images.dtype}; save uint8 images, 0 to 255")
    if levels.max() <= 1:
        raise UserError(
            f"{name} holds nothing brighter than {levels.max()} of 255; if 1 stands for white, "
            "save the images times 255, as uint8"
        )
    return levels


def _round_floats(images: np.ndarray, name: str) -> np.ndarray:
    levels = np.empty(images.shape, np.uint8)
    # A part at a time: float64 copies of a whole data set would fill the memory.
    for start in range(0, len(images), 1000):
        part = images[start : start + 1000].astype(np.float64)
        if not np.isfinite(part).all():
            raise UserError(f"{name} holds NaN or infinite pixels; save uint8 images, 0 to 255")
        if part.min() < 0 or part.max() > 1:
            raise UserError(
                f"{name} holds floats from {part.min():.4g} to {part.max():.4g}, which are no "
                "pixels in [0, 1]; save uint8 images, 0 to 255, without normalisation"
            )
        rounded = np.rint(part * 255)
        # Twice the rounding error of a product with 1/255 in the array's own precision.
        wrong = np.abs(part * 255 - rounded) > 255 * np.finfo(images.dtype).eps
        if wrong.any():
            raise UserError(
                f"{name} holds floats that are no multiples of 1/255, such as "
                f"{part[wrong][0]:.6g}; save uint8 images, 0 to 255"
            )
        levels[start : start + 1000] = rounded
    return levels


def _to_labels(labels: np.ndarray, name: str) -> Tensor:
    """-> int64 (N,)."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        shape = " x ".join(map(str, labels.shape))
        raise UserError(
            f"{name} has the shape {shape or 'of one number'}; save one class number for each "
            "image (one-hot rows: numpy.argmax(y, axis=1))"
        )
    if labels.dtype.kind not in "ui":
        raise UserError(
            f"{name} is of type {labels.dtype}; save class numbers 0 to K - 1 as integers"
        )
    numbers = labels.astype(np.int64)
    if numbers.size and numbers.min() < 0:
        raise UserError(f"{name} has a label {numbers.min()}; number the classes from 0")
    return torch.from_numpy(numbers)


def _size(images: Tensor) -> str:
    return " x ".join(map(str, images.shape[1:]))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
