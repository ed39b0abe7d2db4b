"""Verdicts of several evaluators on the same images, held against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np

from prunekit.component import Use
from prunekit.contracts import Evaluator

TOLERATED = 0.002
"""So much of the images may an attack leave standing beyond one that it should beat."""


def cross_examine(
    uses: Sequence[Use[Evaluator]], records: Mapping[str, np.ndarray]
) -> Iterator[str]:
    """What cannot be: warnings about verdicts under one threat that contradict each other.

    `records` holds `NAME.correct` (N,) of each attack and `NAME.verified` (N,) of each proof, as
    `Component.judges` says. An attack that is declared to beat another should not leave more
    images standing than that (a sign of masked gradients, or of too small a budget), and an image
    with a proof cannot be broken by an attack within the same radius.
    """
    for one, other in permutations(uses, 2):
        if one.threat is None or one.threat != other.threat:
            continue
        if other.component.name in one.component.beats:
            yield from _compare_attacks(one.name, other.name, records)
        if (one.component.judges, other.component.judges) == ("proof", "attack"):
            yield from _refute(one.name, other.name, records)


def _compare_attacks(strong: str, weak: str, records: Mapping[str, np.ndarray]) -> Iterator[str]:
    standing = [float(_read(records, name, "correct").mean()) for name in (strong, weak)]
    if standing[0] - standing[1] > TOLERATED + 1e-9:
        yield (
            f"{strong} leaves {standing[0]:.1%} of the images standing, {weak} at the same radius "
            f"only {standing[1]:.1%}: the worse of the two is the network's; give {strong} more "
            "steps or restarts"
        )


def _refute(proof: str, attack: str, records: Mapping[str, np.ndarray]) -> Iterator[str]:
    broken = _read(records, proof, "verified") & ~_read(records, attack, "correct")
    if broken.any():
        first = ", ".join(str(i) for i in np.asarray(records["index"])[broken][:5])
        yield (
            f"UNSOUND: {attack} breaks {int(broken.sum())} images that {proof} says are verified "
            f"at the same radius (test images {first}): trust neither, and report this"
        )


def _read(records: Mapping[str, np.ndarray], name: str, record: str) -> Any:
    return np.asarray(records[f"{name}.{record}"], dtype=bool)
