"""Scores of weights: learned (HYDRA), by magnitude, by sensitivity, at random."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from prunekit import Component, hookimpl, option

Start = Literal[
    "scaled", "kaiming-normal", "kaiming-uniform", "xavier-normal", "xavier-uniform", "snip"
]

_HYDRA = "Sehwag et al., HYDRA, NeurIPS 2020, arXiv 2002.10509"


@dataclass(frozen=True)
class ScoreOptions:
    start: Start = option(
        "scaled",
        help="where scores start: the weights' own order, a random draw, or SNIP's sensitivities",
    )


@hookimpl
def prunekit_pruners() -> Iterator[Component]:
    yield Component(
        name="score",
        summary="Scores learned against the stage's objective, straight through the mask (HYDRA)",
        build="prunekit_pruners.scores:build_score",
        options=ScoreOptions,
        learns=True,
        paper=_HYDRA,
    )
    yield Component(
        name="lwm",
        summary="Least weight magnitude: the largest weights are kept, one shot",
        build="prunekit_pruners.scores:build_lwm",
        paper="Han et al., NeurIPS 2015, arXiv 1506.02626; HYDRA's baseline",
    )
    yield Component(
        name="snip",
        summary="What the clean loss is most sensitive to on one batch, |dL/dw * w|, one shot",
        build="prunekit_pruners.scores:build_snip",
        paper="Lee et al., SNIP, ICLR 2019, arXiv 1810.02340",
    )
    yield Component(
        name="random",
        summary="Uniformly random scores, one shot: the baseline of baselines",
        build="prunekit_pruners.scores:build_random",
    )
