"""Scores of weights: learned (HYDRA), by magnitude, at random."""

from __future__ import annotations

from collections.abc import Iterator

from prunekit import Component, hookimpl

_HYDRA = "Sehwag et al., HYDRA, NeurIPS 2020, arXiv 2002.10509"


@hookimpl
def prunekit_pruners() -> Iterator[Component]:
    yield Component(
        name="score",
        summary="Scores learned against the stage's objective, straight through the mask (HYDRA)",
        build="prunekit_pruners.scores:build_score",
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
        name="random",
        summary="Uniformly random scores, one shot: the baseline of baselines",
        build="prunekit_pruners.scores:build_random",
    )
