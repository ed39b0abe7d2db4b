"""Activations with images innermost: their memory, and threads over it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

INNER, OUTER = (1, 2, 3, 0), (3, 0, 1, 2)

LEAST = 100_000
"""Multiplications below which another thread costs more than it saves."""


def is_inner(x: Tensor) -> bool:
    """Whether the memory of x (N, C, H, W) is [C][H][W][N]."""
    return x.permute(INNER).is_contiguous()


def inner(x: Tensor) -> Tensor:
    """x (N, C, H, W) with memory [C][H][W][N]: itself if it is so, otherwise a copy."""
    if is_inner(x):
        return x
    from prunekit_sparse.pixels import turn  # numba takes a second to import

    y = empty(x.shape)
    own, to, rows, columns = x.detach().reshape(-1).numpy(), flat(y), len(x), x[0].numel()
    share(lambda a, b: turn(own, to, rows, columns, a, b), columns, x.numel())
    return y


def flat(x: Tensor) -> Array:
    """The memory of a tensor with images innermost."""
    return x.detach().permute(INNER).reshape(-1).numpy()


class _Pool:
    """Memory of activations, used again once nothing refers to it: to touch fresh pages costs more
    than what is computed into them."""

    def __init__(self) -> None:
        self._free: dict[int, list[Array]] = {}

    def take(self, size: int) -> Array:
        """A float32 array (size,) with any content."""
        free = self._free.setdefault(size, [])
        block = free.pop() if free else np.empty(size, np.float32)
        lent = block[:]
        # A list that was let go of meanwhile takes the block with it.
        weakref.finalize(lent, free.append, block).atexit = False
        return lent

    def clear(self) -> None:
        """Let go of what is not in use."""
        self._free.clear()


POOL = _Pool()


def empty(shape: tuple[int, ...] | torch.Size) -> Tensor:
    """A tensor (N, C, H, W) with images innermost and any content."""
    n, c, h, w = shape
    return torch.from_numpy(POOL.take(c * h * w * n)).view(c, h, w, n).permute(OUTER)


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "prunekit-sparse")


def share(run: Callable[[int, int], object], count: int, work: int) -> None:
    """run(begin, end) over `count` rows or channels, on as many threads as torch uses.

    `work` is roughly the number of multiplications. What a row or channel gets does not depend on
    the threads.
    """
    threads = min(torch.get_num_threads(), count, 1 + work // LEAST)
    if threads <= 1:
        run(0, count)
        return
    cuts = [count * k // threads for k in range(threads + 1)]
    pool = _workers(torch.get_num_threads() - 1)
    jobs = [pool.submit(run, a, b) for a, b in pairwise(cuts[1:])]
    try:
        run(cuts[0], cuts[1])
    finally:
        for job in jobs:
            job.result()
