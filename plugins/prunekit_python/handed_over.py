"""Networks and data that a Python program passes in, instead of naming components."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from prunekit_arrays.reading import KEYS, Channels, to_data, to_levels, to_split
from torch import Tensor, bfloat16, no_grad
from torch.utils.data import DataLoader

from prunekit import DataMissingError, UserError
from prunekit.contexts import ArchitectureContext, DatasetContext
from prunekit.contracts import Data
from prunekit_python import GivenDataOptions, GivenModelOptions


def build_model(options: GivenModelOptions, context: ArchitectureContext) -> Any:
    """A copy of the network; raises `UserError` if none was passed in."""
    if context.value is None:
        raise UserError(
            f"the network ({options.name}) came from a Python program; call prunekit.run or "
            "prunekit.load there with model=..., or choose another architecture"
        )
    with no_grad():  # or the copy of a scripted module would depend on it
        return copy.deepcopy(context.value)


def build_data(options: GivenDataOptions, context: DatasetContext) -> Data:
    """A data set made from (x_train, y_train, x_test, y_test), or from (x, y) for evaluation only.

    Images are (N, C, H, W) if they are tensors, (N, H, W) or (N, H, W, C) if they are numpy arrays;
    pixels are integers from 0 to 255, or floats in [0, 1] that are multiples of 1/255. A `Data` is
    returned unchanged. For evaluation, floats may be any in [0, 1], and a DataLoader of batches
    (x, y) will do. The number of classes is that of the options, else that of the outputs of the
    network that came with the data, where the labels have fewer.

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
    if context.test_only and isinstance(data, DataLoader):
        return _to_test(_read_loader(data), "first")
    if isinstance(data, Sequence) and data and all(map(_is_batch, data)):
        raise UserError(
            "data is a list of batches; hand over all images and labels: (torch.cat([x for x, _ in "
            "batches]), torch.cat([y for _, y in batches]))"
        )
    # Without training, (x, y) is enough.
    sizes, wanted = ((2, 4), "(x, y), a DataLoader, or ") if context.test_only else ((4,), "")
    if not isinstance(data, Sequence) or len(data) not in sizes:
        size = f" of {len(data)}" if isinstance(data, Sequence) else ""
        raise UserError(
            f"data has to be {wanted}({', '.join(KEYS)}), or a prunekit.contracts.Data; got "
            f"{type(data).__name__}{size}"
        )
    channels: Channels = "first" if isinstance(data[0], Tensor) else "last"
    arrays = [_to_array(value) for value in data]
    if len(data) == 4:
        named = dict(zip(KEYS, arrays, strict=True))
        return to_data(
            named,
            "data",
            classes=options.classes or _count_classes(arrays, channels, context),
            channels=channels,
            floats=context.test_only,
            where='say how many there are with settings={"dataset.classes": K}',
        )
    return _to_test(dict(zip("xy", arrays, strict=True)), channels)


def _is_batch(part: Any) -> bool:
    return isinstance(part, Sequence) and len(part) == 2 and getattr(part[0], "ndim", 0) > 2


def _count_classes(
    arrays: Sequence[np.ndarray], channels: Channels, context: DatasetContext
) -> int | None:
    """The outputs of the network, where the labels leave some of them out."""
    x, y = arrays[0], arrays[1]
    if context.outputs is None or x.ndim not in (3, 4) or not x.size:
        return None
    if any(part.dtype.kind not in "ui" or not part.size for part in arrays[1::2]):
        return None
    one = x[:1] if x.ndim == 4 else x[:1, None]
    _, c, h, w = (one.transpose(0, 3, 1, 2) if x.ndim == 4 and channels == "last" else one).shape
    outputs, there = context.outputs((c, h, w)), len(np.unique(y))
    if outputs is None or outputs == there or max(map(np.max, arrays[1::2])) >= outputs:
        return None  # as many as labels, or `to_data` tells what is wrong
    warnings.warn(
        f"data: the network has {outputs} outputs, and the training images have {there} different "
        "labels: the others are classes without images",
        stacklevel=2,
    )
    return outputs


def _to_test(arrays: dict[str, np.ndarray], channels: Channels) -> Data:
    part = to_split(arrays, ("x", "y"), "data", channels, floats=True)
    _, c, h, w = part.images.shape
    return Data(part, part, (c, h, w), int(part.labels.max()) + 1)


def _read_loader(loader: Iterable[Any]) -> dict[str, np.ndarray]:
    """All images and labels of a DataLoader, in the order in which it gives them."""
    images, labels = [], []
    for batch in loader:
        if not isinstance(batch, Sequence) or len(batch) != 2 or not isinstance(batch[0], Tensor):
            raise UserError(
                "data: the DataLoader has to give batches (x, y) of tensors; it gave a "
                f"{type(batch).__name__}"
            )
        x, y = map(_to_array, batch)
        if not y.ndim:
            raise UserError("data: the DataLoader gives single images; give it a batch_size")
        # A quarter of the memory, wherever that is exact.
        images.append(to_levels(x, "data: x", floats=True))
        labels.append(y)
    if not images:
        raise UserError("data: the DataLoader gives no batch")
    if len({part.dtype for part in images}) > 1:
        images = [p / np.float32(255) if p.dtype == np.uint8 else p for p in images]
    return {"x": np.concatenate(images), "y": np.concatenate(labels)}


def _to_array(values: Any) -> np.ndarray:
    if not isinstance(values, Tensor):
        try:
            return np.asarray(values)
        except (ValueError, TypeError) as error:  # parts of different sizes
            reason = str(error).partition(".")[0]
            raise UserError(f"data: a {type(values).__name__} is no array: {reason}") from error
    plain = values.detach().cpu()
    return (plain.float() if plain.dtype == bfloat16 else plain).numpy()
