"""What builders of networks share: normalisation inside, and layers that are better left dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunekit.masks import find_weights

Network = TypeVar("Network", bound=nn.Module)


def normalize_inputs(model: Network, mean: Sequence[float], deviation: Sequence[float]) -> Network:
    """Make the network take pixels in [0, 1]: it works on (x - mean) / deviation, channel-wise.

    The constants follow the network to its device and stay out of its state dict, so that weights
    load with and without it. Changes the model, and returns it.
    """
    for name, values in (("input_mean", mean), ("input_deviation", deviation)):
        model.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)
    model.register_forward_pre_hook(_normalize)
    return model


def _normalize(model: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = inputs
    return ((x - model.input_mean) / model.input_deviation, *others)


def find_fragile(model: nn.Module, classifiers: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of weights that hold little and carry much, for the `leave_dense` of a network.

    Plain convolutional networks have none (HYDRA prunes first and last layers too). Where there are
    depthwise convolutions, these, and the first convolution (Zhu & Gupta 2017, arXiv 1710.01878, of
    MobileNets). Where the first convolution cuts the image into patches, that, and the classifier:
    the layers `classifiers`, by default the last linear one.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    convolutions = {n: m for n, m in layers.items() if isinstance(m, nn.Conv2d)}
    found = [n for n, m in convolutions.items() if 1 < m.groups == m.in_channels]
    first, stem = next(iter(convolutions.items()), ("", None))
    patches = stem is not None and stem.stride == stem.kernel_size != (1, 1)
    if patches or found:
        found.append(first)
    if patches:
        found += classifiers or list(layers)[-1:]
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    fragile = {names[layers[n].weight] for n in found if find_weights(layers[n])}
    return tuple(name for name in names.values() if name in fragile)
