"""Channels by number: what is known of them in a tensor, and which get one decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NONE, PAD = -1.0, -2.0
"""In place of a channel: of no layer that can lose it; the zeros of a padding."""


class Trail(NamedTuple):
    """What is known of the entries of a tensor; `channels` and `zero` (float32) have its shape."""

    channels: Tensor
    """The number of the channel that an entry belongs to, or NONE, or PAD."""
    zero: Tensor
    """1 where the entry is exactly zero once its channel is removed."""
    sites: frozenset[str] = frozenset()
    """Modules behind which gates would close these channels; "~name" while the module runs."""

    def same(self, other: Trail) -> bool:
        pairs = zip(self[:2], other[:2], strict=True)
        return self.sites == other.sites and all(torch.equal(a, b) for a, b in pairs)


@dataclass(frozen=True)
class Entries:
    """Of a tensor made of a vector's entries: the vector's name, and the index of each."""

    vector: str
    index: Tensor


def at_first(values: Tensor, dims: Sequence[int]) -> Tensor:
    """The slice at index 0 of the dimensions, which stay."""
    for dim in dims:
        values = values.narrow(dim, 0, 1)
    return values


def slim(values: Tensor, beside: int = -1) -> Tensor:
    """One slice along all dimensions that were expanded, except one."""
    return at_first(
        values, [d for d in range(values.dim()) if d != beside and not values.stride(d)]
    )


def align(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """A vector (C,), of an entry for each place along a dimension of `like`, to broadcast to it."""
    shape = [1] * like.dim()
    shape[dim] = -1
    return values.view(shape)


class Decisions:
    """Channels 0 to `count` - 1, which of them go together, and why some never go."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count)
        self._kept: dict[int, str] = {}
        self.mode = ""
        """What is added to reasons."""

    def roots(self, channels: Tensor) -> Tensor:
        """The channel that stands for the decision about each; NONE and PAD stay."""
        while (self._parent[self._parent] != self._parent).any():
            self._parent = self._parent[self._parent]
        table = torch.from_numpy(np.append(self._parent, [PAD, NONE]))  # found at -2 and -1
        return table.to(channels.device, torch.float32)[channels.long()]

    def join(self, a: Tensor, b: Tensor) -> None:
        """One decision about the channels of `a` and of `b`, of equal shapes, at each place."""
        for dim in range(a.dim()):
            if a.stride(dim) == b.stride(dim) == 0:  # expanded: the same all along
                a, b = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1)
        a, b = self.roots(a).long(), self.roots(b).long()
        meet = (a >= 0) & (b >= 0) & (a != b)
        count = len(self._parent)
        for pair in (a[meet] * count + b[meet]).unique().tolist():
            low, high = sorted(self._find(channel) for channel in divmod(pair, count))
            self._parent[high] = low

    def _find(self, channel: int) -> int:
        while self._parent[channel] != channel:
            channel = int(self._parent[channel])
        return channel

    def varies(self, channels: Tensor, dims: Sequence[int]) -> bool:
        """Whether more than one decision, or none beside one, is met along the dimensions."""
        roots = self.roots(slim(channels))
        return bool((roots != at_first(roots, dims)).any())

    def keep(self, channels: Tensor, why: str) -> None:
        """These are never removed."""
        channels = slim(channels)
        for channel in channels[channels >= 0].long().unique().tolist():
            self._kept.setdefault(channel, why + self.mode)

    def reasons(self) -> dict[int, str]:
        """Root -> why the channels that it stands for are never removed."""
        return {self._find(channel): why for channel, why in reversed(self._kept.items())}
