"""Pruners: weights scored by learning (HYDRA), magnitude, sensitivity, or at random."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from prunekit import PrunerComponent, hookimpl, option

Start = Literal[
    "scaled", "kaiming-normal", "kaiming-uniform", "xavier-normal", "xavier-uniform", "snip"
]

_HYDRA = "Sehwag et al., HYDRA, NeurIPS 2020, arXiv 2002.10509"


@dataclass(frozen=True)
class ScoreOptions:
    """Options of `score`."""

    start: Start = option(
        "scaled",
        help="initial scores: scaled weights, a random draw, or sensitivities as in SNIP",
    )


@hookimpl
def prunekit_pruners() -> Iterator[PrunerComponent]:
    """Declare the pruners."""
    yield PrunerComponent(
        name="score",
        summary="Scores learned on the stage's objective, with straight-through gradients (HYDRA)",
        build="prunekit_pruners.scores:build_score",
        options=ScoreOptions,
        learns=True,
        paper=_HYDRA,
    )
    yield PrunerComponent(
        name="lwm",
        summary="Least weight magnitude: keeps the largest weights, one-shot",
        build="prunekit_pruners.scores:build_lwm",
        paper="Han et al., NeurIPS 2015, arXiv 1506.02626; HYDRA's baseline",
    )
    yield PrunerComponent(
        name="snip",
        summary="Sensitivity of the clean loss to each weight, on one batch, one-shot",
        build="prunekit_pruners.scores:build_snip",
        paper="Lee et al., SNIP, ICLR 2019, arXiv 1810.02340",
    )
    yield PrunerComponent(
        name="random",
        summary="Uniformly random scores, one-shot: the simplest baseline",
        build="prunekit_pruners.scores:build_random",
    )
