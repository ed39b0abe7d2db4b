"""Where the kept weights of a layer lie, sorted for each direction, once a mask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from prunekit_sparse.memory import Array


@dataclass(frozen=True)
class Geometry:
    """A convolution of images (C, H, W) with weights (O, C, KH, KW); `stride` is that of rows and
    of columns, padding and dilation are (rows, columns). A linear layer is one of single pixels."""

    channels: int
    height: int
    width: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def taps(self) -> int:
        """Weights of a kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def weights(self) -> int:
        """Weights of the layer."""
        return self.outputs * self.channels * self.taps

    @cached_property
    def out(self) -> tuple[int, int]:
        """(P, Q), the size of the output."""
        p, q = (
            (n + 2 * pad - d * (k - 1) - 1) // self.stride + 1
            for n, pad, d, k in zip(
                (self.height, self.width), self.padding, self.dilation, self.kernel, strict=True
            )
        )
        return p, q

    def shifts(self) -> list[tuple[int, int]]:
        """(dw, dh) of each tap: the pixel of x that it reads, next to (stride * i, stride * j)."""
        (ph, pw), (dh, dw) = self.padding, self.dilation
        rows, columns = self.kernel
        return [(kw * dw - pw, kh * dh - ph) for kh in range(rows) for kw in range(columns)]


@dataclass(frozen=True)
class Part:
    """The entries of one call of `loops.convolve`; see there for `ptr`, `places`, `shifts`.

    `entries` says which of the layer's kept weights they are, `grid` is (rows, columns) to compute,
    `phase` (py, qy) where in the output they begin.
    """

    entries: Array
    ptr: Array
    places: Array
    shifts: Array
    grid: tuple[int, int]
    phase: tuple[int, int] = (0, 0)


class Index:
    """The kept weights of a layer, at flat `positions` (E,) in ascending order."""

    def __init__(self, positions: Array, geometry: Geometry) -> None:
        self.positions, self.geometry = positions, geometry
        self.values = np.empty(0, np.float32)
        """The kept weights (E,)."""
        self._read: tuple[Any, ...] = ()

    def read(self, weight: Tensor, pass_: int) -> None:
        """Gather the kept weights, once a pass for a weight that stands."""
        read = (id(weight), weight._version, pass_)
        if self._read != read:
            self.values = weight.detach().reshape(-1).numpy()[self.positions]
            self._read = read

    @cached_property
    def outputs(self) -> Array:
        """(E,) the output channel of each kept weight."""
        return self.positions // (self.geometry.channels * self.geometry.taps)

    @cached_property
    def forward(self) -> Part:
        """From x to the output."""
        g = self.geometry
        taps = dict(enumerate(g.shifts()))
        return self._sort(taps, (g.height, g.width), g.out, (0, 0), forward=True)

    @cached_property
    def backward(self) -> list[Part]:
        """From the output's gradient to that of x: one part for each parity of its pixels."""
        g, s = self.geometry, self.geometry.stride
        parts = []
        for py in range(min(s, g.height)):
            for qy in range(min(s, g.width)):
                taps = {
                    tap: ((qy - dw) // s, (py - dh) // s)
                    for tap, (dw, dh) in enumerate(g.shifts())
                    if (qy - dw) % s == 0 and (py - dh) % s == 0
                }
                grid = (-(-(g.height - py) // s), -(-(g.width - qy) // s))
                parts.append(self._sort(taps, g.out, grid, (py, qy), forward=False))
        return parts

    def _sort(
        self,
        taps: dict[int, tuple[int, int]],
        plane: tuple[int, int],
        grid: tuple[int, int],
        phase: tuple[int, int],
        *,
        forward: bool,
    ) -> Part:
        from prunekit_sparse.loops import sort_entries  # numba takes a second to import

        g = self.geometry
        shifts = sorted(set(taps.values())) or [(0, 0)]
        ranks = np.full(g.taps, -1, np.int64)
        for tap, shift in taps.items():
            ranks[tap] = shifts.index(shift)
        ptr = np.zeros((g.outputs if forward else g.channels) * len(shifts) + 1, np.int64)
        order = np.empty(len(self.positions), np.int64)
        count = sort_entries(self.positions, g.channels, ranks, len(shifts), forward, ptr, order)
        entries = order[:count]
        at = self.positions[entries]
        source = at // g.taps % g.channels if forward else at // (g.taps * g.channels)
        rows = np.array([dh for _, dh in shifts])[ranks[at % g.taps]]
        places = (source * plane[0] + rows) * plane[1]
        return Part(entries, ptr, places, np.array(shifts, np.int64), grid, phase)
