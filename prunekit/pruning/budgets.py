"""Counts: how many weights or channels are kept, and whole numbers that share them out."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from prunekit.steps import Layers


def exact(value: float) -> Fraction:
    """The decimal that was written, to count with: as a binary fraction, 0.57 of 100 is less.

    >>> int(0.57 * 100), int(exact(0.57) * 100)
    (56, 57)
    """
    return Fraction(repr(float(value)))


def count_kept(n: int, sparsity: float) -> int:
    """How many of n weights are kept: n minus the rounded down sparsity * n, in `exact` decimals.

    >>> count_kept(1000, 0.9), count_kept(10, 0.7), count_kept(90, 0.7)
    (100, 3, 27)
    """
    return n - int(exact(sparsity) * n)


def uniform(layers: Layers) -> dict[str, int]:
    """The budget that holds where none is chosen: every layer loses the same fraction."""
    return {name: count_kept(s.numel(), layers.sparsity) for name, s in layers.scores.items()}


def share_out(
    densities: Mapping[str, float], sizes: Mapping[str, int], total: int
) -> dict[str, int]:
    """Kept units of each layer: whole numbers that follow the densities and sum to `total`.

    Largest remainders are rounded up, and no layer keeps more than its size. Densities that mean
    another sum are scaled.

    Raises `ValueError` if `total` cannot be reached: it is more than all sizes, or densities are 0.

    >>> share_out({"a": 0.25, "b": 0.5}, {"a": 10, "b": 10}, 8)
    {'a': 3, 'b': 5}
    >>> share_out({"a": 1, "b": 2}, {"a": 10, "b": 10}, 15)
    {'a': 5, 'b': 10}
    """
    exact = {name: densities[name] * sizes[name] for name in sizes}
    full = dict[str, float]()
    # Layers that a common factor fills up leave the rest to the others.
    while sum(exact.values()) > 0 and abs(sum(exact.values()) + sum(full.values()) - total) >= 1:
        factor = (total - sum(full.values())) / sum(exact.values())
        exact = {name: value * factor for name, value in exact.items()}
        over = {name: float(sizes[name]) for name in exact if exact[name] > sizes[name]}
        full |= over
        exact = {name: value for name, value in exact.items() if name not in over}
    exact = {name: full.get(name, exact.get(name, 0.0)) for name in sizes}
    kept = {name: min(int(value + 1e-9), sizes[name]) for name, value in exact.items()}
    # What rounding down left over goes where most was cut off.
    for name in sorted(sizes, key=lambda n: kept[n] - exact[n]):
        if sum(kept.values()) >= total:
            break
        kept[name] += kept[name] < sizes[name]
    if sum(kept.values()) != total:
        raise ValueError(f"densities {dict(densities)} of {dict(sizes)} do not reach {total}")
    return kept
