"""Counts: how many weights or channels are kept, and whole numbers that share them out."""

from __future__ import annotations

from collections.abc import Mapping

from prunekit.steps import Layers


def count_kept(n: int, sparsity: float) -> int:
    """How many of n weights are kept: n - int(sparsity * n).

    >>> count_kept(1000, 0.9), count_kept(10, 0.7), count_kept(10, 0.1)
    (100, 3, 9)
    """
    return n - int(sparsity * n)


def uniform(layers: Layers) -> dict[str, int]:
    """The budget that holds where none is chosen: every layer loses the same fraction."""
    return {name: count_kept(s.numel(), layers.sparsity) for name, s in layers.scores.items()}


def share_out(
    densities: Mapping[str, float], sizes: Mapping[str, int], total: int
) -> dict[str, int]:
    """Kept units of each layer: whole numbers that follow the densities and sum to `total`.

    Largest remainders are rounded up, and no layer keeps more than its size.

    >>> share_out({"a": 0.25, "b": 0.5}, {"a": 10, "b": 10}, 8)
    {'a': 3, 'b': 5}
    """
    exact = {name: densities[name] * sizes[name] for name in sizes}
    kept = {name: min(int(value + 1e-9), sizes[name]) for name, value in exact.items()}
    # What rounding down left over goes where most was cut off.
    for name in sorted(sizes, key=lambda n: kept[n] - exact[n]):
        if sum(kept.values()) >= total:
            break
        kept[name] += kept[name] < sizes[name]
    return kept
