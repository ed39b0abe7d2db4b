"""Networks and data that a Python program passes in, instead of naming components."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from prunekit_arrays.reading import KEYS, Channels, to_data, to_split
from torch import Tensor

from prunekit import DataMissingError, NoOptions, UserError
from prunekit.contexts import ArchitectureContext, DatasetContext
from prunekit.contracts import Data
from prunekit_python import GivenModelOptions


def build_model(options: GivenModelOptions, context: ArchitectureContext) -> Any:
    """A copy of the network; raises `UserError` if none was passed in."""
    if context.value is None:
        raise UserError(
            f"the network ({options.name}) came from a Python program; call prunekit.run or "
            "prunekit.load there with model=..., or choose another architecture"
        )
    return copy.deepcopy(context.value)


def build_data(options: NoOptions, context: DatasetContext) -> Data:
    """A data set made from (x_train, y_train, x_test, y_test), or from (x, y) for evaluation only.

    Images are (N, C, H, W) if they are tensors, (N, H, W) or (N, H, W, C) if they are numpy arrays;
    pixels are integers from 0 to 255, or floats in [0, 1] that are multiples of 1/255. A `Data` is
    returned unchanged.

    Raises `UserError` for anything else, `DataMissingError` if nothing was passed in.
    """
    data = context.value
    if data is None:
        raise DataMissingError(
            "the images came from a Python program; call prunekit.run there with data=..., or "
            "choose another data set"
        )
    if isinstance(data, Data):
        return data
    # Without training, (x, y) is enough.
    sizes, wanted = ((2, 4), "(x, y), or ") if context.test_only else ((4,), "")
    if not isinstance(data, Sequence) or len(data) not in sizes:
        size = f" of {len(data)}" if isinstance(data, Sequence) else ""
        raise UserError(
            f"data has to be {wanted}({', '.join(KEYS)}), or a prunekit.contracts.Data; got "
            f"{type(data).__name__}{size}"
        )
    channels: Channels = "first" if isinstance(data[0], Tensor) else "last"
    arrays = [v.detach().cpu().numpy() if isinstance(v, Tensor) else np.asarray(v) for v in data]
    if len(data) == 4:
        return to_data(dict(zip(KEYS, arrays, strict=True)), "data", channels=channels)
    part = to_split(dict(zip("xy", arrays, strict=True)), ("x", "y"), "data", channels)
    _, c, h, w = part.images.shape
    return Data(part, part, (c, h, w), int(part.labels.max()) + 1)
