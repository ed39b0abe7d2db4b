"""Networks and data that a Python program hands over, in place of components that it names."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from prunekit.catalog.component import Use
from prunekit.contracts import Context, Data
from prunekit.data.arrays import KEYS, Channels, to_data, to_split
from prunekit.errors import UserError


@dataclass(frozen=True)
class Given(Use[Any]):
    """The component "given", with what was given in its place."""

    value: Any = None

    def build(self, context: Context) -> Any:
        """The data; of a network a copy, so that the caller's own stays as it is."""
        return copy.deepcopy(self.value) if isinstance(self.value, nn.Module) else self.value


def hand_over(use: Use[Any], value: Any) -> Given:
    """What a recipe names as "given", with the value."""
    return Given(**{f.name: getattr(use, f.name) for f in dataclasses.fields(use)}, value=value)


def read_data(data: Any) -> Data:
    """A data set of arrays: (x_train, y_train, x_test, y_test), or a `Data` as it is.

    Images are (N, C, H, W) where they are tensors, (N, H, W) or (N, H, W, C) where they are numpy
    arrays; pixels are integers 0 to 255 or floats in [0, 1] that are multiples of 1/255.

    Raises `UserError` for anything else.
    """
    if isinstance(data, Data):
        return data
    if not isinstance(data, Sequence) or len(data) != len(KEYS):
        raise _wants(f"({', '.join(KEYS)})", data)
    arrays = dict(zip(KEYS, map(_to_array, data), strict=True))
    return to_data(arrays, "data", channels=_find_channels(data))


def read_images(data: Any, classes: int | None = None) -> Data:
    """The same where only some images are looked at: a pair (x, y) serves as well.

    `classes` is their number where a network tells; without it the largest label does. Raises
    `UserError` as `read_data` does, and for a label beyond the classes.
    """
    if isinstance(data, Data) or (isinstance(data, Sequence) and len(data) == len(KEYS)):
        found = read_data(data)
    elif isinstance(data, Sequence) and len(data) == 2:
        arrays = dict(zip("xy", map(_to_array, data), strict=True))
        part = to_split(arrays, ("x", "y"), "data", _find_channels(data))
        _, c, h, w = part.images.shape
        found = Data(part, part, (c, h, w), int(part.labels.max()) + 1)
    else:
        raise _wants(f"(x, y), or ({', '.join(KEYS)})", data)
    largest = int(found.test.labels.max())
    if classes is not None and largest >= classes:
        raise UserError(
            f"data: there is a label {largest}, and the network has {classes} classes: 0 to "
            f"{classes - 1}"
        )
    return found if classes is None else dataclasses.replace(found, classes=classes)


def _wants(wanted: str, data: Any) -> UserError:
    size = f" of {len(data)}" if isinstance(data, Sequence) else ""
    return UserError(
        f"data is {wanted}, or a prunekit.contracts.Data; got: {type(data).__name__}{size}"
    )


def _find_channels(data: Sequence[Any]) -> Channels:
    return "first" if isinstance(data[0], Tensor) else "last"


def _to_array(values: Any) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
