"""Extra training images with labels or pseudo-labels, from a file.

In an `.npz` file they are called `x_extra` and `y_extra`, or `image` and `label` (the names in
files of generated images). In a pickle they are called `data` and `extrapolated_targets`, the names
in the 500,000 pseudo-labeled TinyImages of Carmon et al. (NeurIPS 2019, arXiv 1905.13736).
"""

from __future__ import annotations

import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunekit import Arrays
from prunekit.contexts import DatasetContext
from prunekit.contracts import Data
from prunekit.errors import UserError, explain_briefly, relative
from prunekit.reading import check_file
from prunekit_arrays import ExtraOptions
from prunekit_arrays.reading import read_arrays, to_split

NPZ_KEYS = (("x_extra", "y_extra"), ("image", "label"))
PICKLE_KEYS = ("data", "extrapolated_targets")
CONVERT = "numpy.savez_compressed(file, x_extra=..., y_extra=...)"


def build(options: ExtraOptions, context: DatasetContext) -> Data:
    """Extra images and labels to train on; the test part is empty.

    Code in a pickle is never executed: see `read_pickle`. Images that have the shape (C, H, W) of
    those they extend are taken as they are, others as (H, W, C). Raises `UserError` if the file
    cannot be used.
    """
    path = options.file
    name = relative(path)
    check_file(path)
    packed = zipfile.is_zipfile(path)
    choices = NPZ_KEYS if packed else (PICKLE_KEYS,)
    wanted = [key for keys in choices for key in keys]
    arrays = read_arrays(path, wanted) if packed else read_pickle(path, wanted)
    found = [keys for keys in choices if arrays.keys() >= set(keys)]
    if not found:
        needed = " or ".join(" and ".join(keys) for keys in choices)
        raise UserError(f"{name} has no arrays {needed}; save extra images with {CONVERT}")
    images = arrays[found[0][0]]
    known = context.extra_of
    first = known is not None and images.ndim == 4 and images.shape[1:] == known.shape
    split = to_split(arrays, found[0], name, "first" if first else "last")
    _, c, h, w = split.images.shape
    none = Arrays(split.images[:0], split.labels[:0])
    return Data(split, none, (c, h, w), int(split.labels.max()) + 1)


@dataclass(eq=False)
class _Call:
    """Stands for an object that a pickle would have built: only a record of what it asked for."""

    name: str
    args: tuple[Any, ...]
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass(frozen=True, eq=False)
class _Function:
    """Stands for a function that a pickle would have called."""

    name: str

    def __call__(self, *args: Any) -> _Call:
        return _Call(self.name, args)


class _Refused(Exception):
    """The pickle uses something that arrays of numbers do not need."""


class _Inspector(pickle.Unpickler):
    """Reads a pickle without importing or calling anything that it names."""

    ARRAYS = (
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.core.numeric._frombuffer",
        "numpy.ndarray",
        "numpy.dtype",
        "_codecs.encode",
    )

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if full not in self.ARRAYS:
            raise _Refused(full)
        return _Function(full)


def read_pickle(path: Path, keys: list[str]) -> dict[str, np.ndarray]:
    """The arrays of numbers that a pickled dictionary has under these keys, if it has them.

    Nothing in the pickle is executed, not even NumPy's own reconstruction of arrays (a forged dtype
    could turn numbers into pointers): the arrays are rebuilt here from their bytes, type and shape.

    Raises `UserError` if the pickle needs anything but arrays of numbers, or is damaged.
    """
    name = relative(path)
    convert = f"if you trust the file, load it yourself and save the images with {CONVERT}"
    try:
        with path.open("rb") as file:
            found = _Inspector(file, encoding="latin1").load()
        if not isinstance(found, dict):
            raise ValueError("it is not a dictionary")
        return {key: _to_array(found[key], key) for key in keys if key in found}
    except _Refused as error:
        raise UserError(
            f"{name} is a pickle that uses {error}, but prunekit reads only arrays of numbers from "
            f"pickles; {convert}"
        ) from error
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror})") from error
    # A damaged pickle may raise anything.
    except Exception as error:
        raise UserError(
            f"{name} is neither an .npz file nor a pickle of arrays ({explain_briefly(error)}); "
            f"{convert}"
        ) from error


def _to_array(value: Any, key: str) -> np.ndarray:
    match value:
        case _Call("numpy.core.multiarray._reconstruct", _, (_, shape, dtype, fortran, content)):
            return _from_bytes(content, dtype, shape, "F" if fortran else "C")
        case _Call("numpy.core.numeric._frombuffer", (content, dtype, shape, "C" | "F" as order)):
            return _from_bytes(content, dtype, shape, order)
        case list() if all(type(number) is int for number in value):
            return np.asarray(value)
    raise ValueError(f"its {key} is not an array of numbers")


def _from_bytes(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    match dtype:
        case _Call("numpy.dtype", (str(kind), *_), (_, str(endian), *_)) if re.fullmatch(
            "[<>=|][uif][1248]", endian + kind
        ):
            numbers = np.dtype(endian + kind)
        case _:
            raise ValueError("its arrays do not hold plain numbers")
    match content:
        case _Call("_codecs.encode", (str(text), "latin1")) | str(text):  # protocol 2, Python 2
            content = text.encode("latin1")
    return np.frombuffer(content, numbers).reshape(shape, order=order)
