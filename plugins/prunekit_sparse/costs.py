"""What layers cost, dense and on kept weights: which of them run on kernels."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from prunekit.errors import UserError, relative
from prunekit.reading import parse_json, read_bytes
from prunekit_sparse.index import Geometry, Index
from prunekit_sparse.memory import inner


@dataclass(frozen=True)
class Costs:
    """Nanoseconds on one thread; the defaults were measured on a Zen 4 core with AVX-512.

    `dense` is of a multiplication in a dense convolution, `single` in one of 1 x 1 pixels or a
    linear layer, `sparse` in one by a kept weight; `visit` of applying a kept weight to a row of
    pixels, `output` of each number that is written, and `layout` of each that is brought into the
    other layout, as behind a dense layer among sparse ones, `call` of a call of a layer beyond a
    dense one, whatever its size.
    """

    dense: float = 0.017
    single: float = 0.024
    sparse: float = 0.035
    visit: float = 5.0
    output: float = 0.23
    layout: float = 0.9
    call: float = 80_000

    def pays(self, g: Geometry, kept: int, images: int, *, whole: bool) -> bool:
        """Whether kernels are faster for `kept` of the weights and a batch of `images`.

        `whole`: the gradient of all weights is wanted, which a dense layer computes for both.
        """
        p, q = g.out
        one = self.single if g.taps == 1 else self.dense
        outputs, inputs = g.outputs * p * q * images, g.channels * g.height * g.width * images
        dense = one * g.weights * p * q * images + self.layout * outputs
        sparse = kept * p * (q * images * self.sparse + self.visit) + self.output * outputs
        sparse += self.call
        # The two parts of a step that are not the weights' gradient, against two copies for it.
        return (
            2 * sparse + self.layout * (inputs + outputs) < 2 * dense if whole else sparse < dense
        )


def read_costs(path: Path | None) -> Costs:
    """What `calibrate` wrote; the costs that prunekit comes with if there is no file.

    Raises `UserError` if the file is something else.
    """
    if path is None:
        return Costs()
    try:
        found = parse_json(read_bytes(path, 10_000))
        costs = Costs(**{name: float(value) for name, value in found.items()})
        good = found.keys() == asdict(costs).keys() and min(found.values()) >= 0
    except (ValueError, TypeError, AttributeError):
        good = False
    if not good:
        where = relative(path)
        raise UserError(
            f"{where} is no table of costs; write one with: prunekit doctor --calibrate {where}"
        )
    return costs


def calibrate() -> str:
    """Measure this machine on one thread, in some ten seconds; the text of a file of costs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            found = _measure()
    finally:
        torch.set_num_threads(before)
    return json.dumps({k: float(f"{v:.4g}") for k, v in asdict(found).items()}, indent=2) + "\n"


SIZES = ((32, 32, 32), (64, 16, 32), (128, 8, 32), (64, 16, 8))
"""(channels, height and width, images) that are measured."""


def _measure() -> Costs:
    from scipy.optimize import nnls

    from prunekit_sparse.layers import Convolution
    from prunekit_sparse.running import Running

    generator = torch.Generator().manual_seed(0)
    rows, times = [], []
    found: dict[int, list[float]] = {0: [], 1: [], 3: []}  # layout, and kernels of this size
    for channels, side, images in SIZES:
        x = torch.rand(images, channels, side, side, generator=generator)
        pixels = side * side * images
        found[0].append(_time(inner, x) / (channels * pixels))
        for kernel in (1, 3):
            size = (channels, channels, kernel, kernel)
            g = Geometry(channels, side, side, channels, size[2:], 1, (kernel // 2,) * 2)
            weight = torch.randn(size, generator=generator)
            whole = _time(F.conv2d, x, weight, None, 1, kernel // 2)
            found[kernel].append(whole / (g.weights * pixels))
            for density in (0.01, 0.05, 0.2):
                count = max(1, int(density * g.weights))
                kept = torch.randperm(g.weights, generator=generator)[:count]
                index = Index(np.sort(kept.numpy()), g)
                index.read(weight, 0)
                given = (inner(x), weight, None, None, None, index, True, True)
                times.append(_time(Convolution.apply, *given))
                rows.append((count * pixels, count * side, channels * pixels))
    tiny, layer = torch.rand(8, 2, 2, 2), nn.Conv2d(2, 2, 1)
    call = -_time(layer, tiny)
    with Running(None).around(layer, {}, still=True):
        layer.weight.zero_()
        call += _time(lambda: layer(tiny) * 1)
    spent, made = np.array(times), np.array(rows, float)
    # Relative errors count alike.
    (sparse, visit, output), _ = nnls(made / spent[:, None], np.ones(len(spent)))
    layout, single, dense = (median(found[kernel]) for kernel in (0, 1, 3))
    return Costs(dense, single, sparse, visit, output, layout, max(0.0, call))


def _time(run: Callable[..., object], *args: object) -> float:
    """Nanoseconds of a call, the median of some."""
    run(*args)
    found = []
    for _ in range(7):
        began = time.perf_counter_ns()
        run(*args)
        found.append(time.perf_counter_ns() - began)
    return float(median(found))
