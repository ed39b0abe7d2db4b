"""Reads and checks images and labels from `.npz` files and arrays.

The keys are those that Keras uses: `x_train`, `y_train`, `x_test`, `y_test`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prunekit import Arrays
from prunekit.contracts import Data
from prunekit.errors import UserError, relative
from prunekit.reading import ObjectArrayError
from prunekit.reading import read_arrays as read_plain_arrays

KEYS = ("x_train", "y_train", "x_test", "y_test")
ROUNDING = 1e-6
"""How far a float may leave [0, 1] by the rounding of what made it, and is then set back."""
Channels = Literal["last", "first"]


def read_npz(path: Path, *, classes: int | None = None, channels: Channels = "last") -> Data:
    """The data set in a file; see `to_data` for the arrays and arguments.

    Raises `UserError` if the file or its arrays cannot be used.
    """
    return to_data(read_arrays(path, KEYS), relative(path), classes=classes, channels=channels)


def read_arrays(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays with these keys; missing keys are left out, other arrays in the file are not read.

    Raises `UserError` if the file or one of the arrays cannot be read.
    """
    name = relative(path)
    try:
        return read_plain_arrays(path, keys)
    except ObjectArrayError as error:
        raise UserError(
            f"{name}: {error} is an array of Python objects, which prunekit never unpickles; "
            "save an array of numbers, with all images of the same size"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{name} cannot be read as an .npz file ({error}); write it with "
            f"numpy.savez_compressed(file, {', '.join(f'{key}=...' for key in keys)})"
        ) from error


def to_data(
    arrays: Mapping[str, np.ndarray],
    source: str,
    *,
    classes: int | None = None,
    channels: Channels = "last",
    floats: bool = False,
    where: str = "say how many there are (classes of npz)",
) -> Data:
    """Make a data set from arrays: images (N, H, W) or (N, H, W, C), labels (N,) or (N, 1).

    With `channels="first"`, color images are (N, C, H, W). Pixels are integers from 0 to 255, or
    floats in [0, 1] that are multiples of 1/255. Labels are integers from 0 to K - 1; K is
    `classes`; by default there are as many as labels, without gaps. `source` says in messages
    where the arrays come from, and `where` how to give the number of classes.

    Raises `UserError` if an array is missing or cannot be used.
    """
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise UserError(
            f"{source} has no {' and no '.join(missing)}; name the arrays {', '.join(KEYS)}"
        )
    train, test = (
        to_split(arrays, (f"x_{part}", f"y_{part}"), source, channels, floats=floats)
        for part in ("train", "test")
    )
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"{source}: training images are {_size(train.images)}, but test images are "
            f"{_size(test.images)} (channels x height x width); save images of the same size"
        )
    largest = max(int(train.labels.max()), int(test.labels.max()))
    if classes is None:
        classes = largest + 1
        _check_gaps(train.labels, classes, source, where)
    if largest >= classes:
        raise UserError(
            f"{source}: there is a label {largest}, but {classes} classes have the labels 0 to "
            f"{classes - 1}; number the classes from 0"
        )
    if classes < 2:
        raise UserError(f"{source}: all labels are 0; a classifier needs at least two classes")
    _, c, h, w = train.images.shape
    return Data(train, test, shape=(c, h, w), classes=classes)


def _check_gaps(labels: Tensor, classes: int, source: str, where: str) -> None:
    """Refuse labels from 1, or with gaps, where nobody said how many classes there are."""
    there = set(labels.unique().tolist())
    if len(there) < classes and classes > 1:
        missing = islice((k for k in range(classes) if k not in there), 3)
        raise UserError(
            f"{source}: the largest label is {classes - 1}, and no training image has label "
            f"{', '.join(map(str, missing))}{', ...' if classes - len(there) > 3 else ''}: number "
            "the classes 0, 1, 2, ... without gaps (numpy.unique(y, return_inverse=True)[1]), or "
            f"{where}"
        )


def to_split(
    arrays: Mapping[str, np.ndarray],
    keys: tuple[str, str],
    source: str,
    channels: Channels,
    *,
    floats: bool = False,
) -> Arrays:
    """The images and labels under these two keys; see `to_data` for the arrays and arguments.

    With `floats`, images may be any floats in [0, 1]; they stay float32 if they are no multiples of
    1/255.

    Raises `UserError` if they cannot be used, or if their numbers differ.
    """
    x, y = keys
    images = _to_images(arrays[x], f"{source}: {x}", channels, floats)
    labels = _to_labels(arrays[y], f"{source}: {y}")
    if len(images) != len(labels):
        raise UserError(
            f"{source}: {x} has {len(images)} images, but {y} has {len(labels)} labels; save one "
            "label for each image"
        )
    return Arrays(images, labels)


def _to_images(images: np.ndarray, name: str, channels: Channels, floats: bool) -> Tensor:
    """Convert images to uint8 (N, C, H, W); with `floats`, see `to_split`."""
    shape = " x ".join(map(str, images.shape))
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise UserError(
            f"{name} has the shape {shape or 'of a single number'}; save at least one image, as "
            "(N, H, W) or (N, H, W, C)"
        )
    if images.ndim == 4:
        # More than 4 channels are accepted only if the other layout has more than 4 as well.
        first, last = images.shape[1], images.shape[3]
        given, other, way, axes = first, last, "last", "permute(0, 3, 1, 2)"
        if channels == "last":
            given, other, way, axes = last, first, "first", "transpose(0, 2, 3, 1)"
        if given > 4 >= other:
            raise UserError(
                f"{name} is {shape}, which means {given} channels; if it has {other}, "
                f'write channels = "{way}" with use = "npz", or give x.{axes} in Python'
            )
    levels = to_levels(images, name, floats)
    if levels.dtype == np.uint8 and levels.max() <= 1:
        raise UserError(
            f"{name} has no pixel brighter than {levels.max()} of 255; if 1 means white, multiply "
            "the images by 255 and save them as uint8"
        )
    if images.ndim == 3:
        levels = levels[:, None]
    elif channels == "last":
        levels = levels.transpose(0, 3, 1, 2)
    # torch warns about arrays that are not writable; `require` copies only if it has to.
    return torch.from_numpy(np.require(levels, requirements=["C", "W"]))


def to_levels(images: np.ndarray, name: str, floats: bool = False) -> np.ndarray:
    """Convert pixels to uint8 of the same shape; with `floats`, see `to_split`."""
    if images.dtype.kind == "f":
        levels = _round_floats(images, name, floats)
    elif images.dtype.kind in "ui":
        if images.min() < 0 or images.max() > 255:
            raise UserError(
                f"{name} has pixels from {images.min()} to {images.max()}; save uint8 images with "
                "pixels from 0 to 255"
            )
        levels = images.astype(np.uint8, copy=False)
    else:
        raise UserError(
            f"{name} is of type {images.dtype}; save uint8 images with pixels from 0 to 255"
        )
    return levels


def _round_floats(images: np.ndarray, name: str, keep: bool) -> np.ndarray:
    """Convert floats in [0, 1] that are multiples of 1/255 to uint8 of the same shape.

    Others are refused, or made float32 with `keep`.
    """
    levels, exact = np.empty(images.shape, np.uint8), True
    # In parts, because a float64 copy of a whole data set could exceed the memory.
    for start in range(0, len(images), 1000):
        part = images[start : start + 1000].astype(np.float64)
        if not np.isfinite(part).all():
            raise UserError(
                f"{name} has NaN or infinite pixels; save uint8 images with pixels from 0 to 255"
            )
        if keep and part.min() >= -ROUNDING and part.max() <= 1 + ROUNDING:
            part = part.clip(0, 1)
        if part.min() < 0 or part.max() > 1:
            raise UserError(
                f"{name} has floats from {part.min():.8g} to {part.max():.8g}, but pixels are in "
                "[0, 1]; save uint8 images with pixels from 0 to 255, without normalization"
            )
        rounded = np.rint(part * 255)
        # Twice the rounding error of a product with 1/255 in the array's own precision.
        wrong = np.abs(part * 255 - rounded) > 255 * np.finfo(images.dtype).eps
        exact = exact and not wrong.any()
        if not (exact or keep):
            raise UserError(
                f"{name} has floats that are not multiples of 1/255, such as "
                f"{part[wrong][0]:.6g}; save uint8 images with pixels from 0 to 255"
            )
        levels[start : start + 1000] = rounded
    return levels if exact else images.astype(np.float32).clip(0, 1)


def _to_labels(labels: np.ndarray, name: str) -> Tensor:
    """Convert labels to int64 (N,)."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        shape = " x ".join(map(str, labels.shape))
        raise UserError(
            f"{name} has the shape {shape or 'of a single number'}; save one class number for each "
            "image (for one-hot rows, numpy.argmax(y, axis=1))"
        )
    if labels.dtype.kind not in "ui":
        raise UserError(
            f"{name} is of type {labels.dtype}; save class numbers from 0 to K - 1 as integers"
        )
    numbers = labels.astype(np.int64)
    if numbers.size and numbers.min() < 0:
        raise UserError(f"{name} has a label {numbers.min()}; number the classes from 0")
    return torch.from_numpy(numbers)


def _size(images: Tensor) -> str:
    return " x ".join(map(str, images.shape[1:]))
