"""Pruners: weights scored by learning (HYDRA), magnitude, sensitivity, or at random."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from prunekit import PrunerComponent, Use, hookimpl, option
from prunekit.steps import Budget

Start = Literal[
    "scaled", "kaiming-normal", "kaiming-uniform", "xavier-normal", "xavier-uniform", "snip"
]

_HARP = """\
The rates start as the budget `rates` shares out `density`. Channels that are removed together have
one rate, and the stage ends with the fraction of channels that its sparsity says: where `count`
says otherwise than "units", the budget loss wants other rates than those that it ends with.

Beyond the paper: what is validated, selected and stored is always at the target (rates times a
common factor, never under the floor, whole numbers by largest remainder), so any epoch can be the
best one. Rates have no weight decay, which would pull them to about a half, and do not start below
the target. A `sparsity_schedule` has no effect, since the budget loss takes its place.

While the `budget` in the log is not near 0, scores are learned at more than the target keeps:
raise gamma where the stage is of few steps (0.01 is for 20 epochs of CIFAR-10). The gradient of a
rate is a sum over its layer; with rate_scale = "root" it moves at a learning rate divided by the
root of the layer's size, and meets the budget later. On digits at 95 %, "sum" met it in 15 epochs,
from uniform and from "erk" rates, its first and last layer the densest; "root" had hardly moved."""

_HYDRA = "Sehwag et al., HYDRA, NeurIPS 2020, arXiv 2002.10509"


@dataclass(frozen=True)
class ScoreOptions:
    """Options of `score`."""

    start: Start = option(
        "scaled",
        help="initial scores: scaled weights, a random draw, or sensitivities as in SNIP",
    )


@dataclass(frozen=True)
class HarpOptions:
    """Options of `harp`."""

    start: Start = option("scaled", help="initial scores, as for `score`")
    rates: Use[Budget] = option("layer", help="budget that says what layers keep at the start")
    density: float = option(
        0.1, help="fraction kept at the start, or the target if that is more", above=0, high=1
    )
    floor: float = option(
        0.1, help="least fraction that a layer keeps, in units of the target's", above=0, below=1
    )
    gamma: float = option(
        0.01,
        help="factor of the budget loss in the first epoch; in the e-th, e times that",
        above=0,
    )
    count: Literal["units", "weights", "macs"] = option(
        "units", help="what the budget loss counts: what the sparsity does, weights, or their MACs"
    )
    rate_lr: float = option(1.0, help="learning rate of the rates, times the scores'", above=0)
    rate_scale: Literal["sum", "root"] = option(
        "sum", help="root: a rate's learning rate is divided by the root of its layer's size"
    )
    rate_decay: float = option(0.0, help="weight decay of the rates", low=0)


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
    yield PrunerComponent(
        name="harp",
        summary="Scores and the keep rates of layers, learned together (HARP)",
        build="prunekit_pruners.harp:build_harp",
        options=HarpOptions,
        learns=True,
        allocates=True,
        paper="Zhao and Wressnegger, HARP, ICLR 2023, arXiv 2412.14714",
        details=_HARP,
        cost="nothing beyond `score`: a rate a layer, whose gradient comes with the scores'",
    )
