"""Sparse execution on a CPU: declarations, without torch and numba."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from prunekit import BackendComponent, hookimpl, option

PRUNEKIT_API = 3


@dataclass(frozen=True)
class NumbaOptions:
    """Options of `numba`."""

    costs: Path | None = option(
        None,
        help="what layers cost on this machine, as `prunekit doctor --calibrate` writes it; "
        "default: as measured for prunekit",
        exists=True,
    )


@hookimpl
def prunekit_backends() -> Iterable[BackendComponent]:
    yield BackendComponent(
        name="numba",
        summary="Convolutions and linear layers on kept weights alone, compiled for this CPU",
        build="prunekit_sparse.running:build",
        options=NumbaOptions,
        needs=("numba",),
        install='pip install "prunekit[sparse]"',
        devices=("cpu",),
        calibrate="prunekit_sparse.costs:calibrate",
        details="Layers run on kernels where these are faster: 2-d convolutions of any size, "
        "stride, padding and dilation, and linear layers, in single precision. Those with groups, "
        "different strides along rows and columns, or too many kept weights stay dense, and "
        "results name them. Whatever lies between is the network's own, in a layout with images "
        "innermost; normalizations, sums and ReLUs go into the convolution before them. Sums are "
        "in another order than torch's, so results differ by rounding.",
    )
