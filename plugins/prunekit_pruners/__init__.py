"""Pruners: weights scored by learning (HYDRA), magnitude, gradients, or at random; weights that
are trained until few of them are large (TwinRep, ADMM)."""

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


@dataclass(frozen=True)
class FaShapleyOptions:
    """Options of `fashapley`."""

    steps: int = option(10, help="points on the way from zero to the weights", low=1, smoke=2)
    batches: int = option(10, help="training batches", low=1, smoke=2)


@dataclass(frozen=True)
class MovementOptions:
    """Options of `movement`."""

    batches: int | None = option(None, help="training batches; default: an epoch", low=1, smoke=2)


@dataclass(frozen=True)
class TwinRepOptions:
    """Options of `twinrep`."""

    select: float = option(
        0.1, help="fraction of the stage after which masks are set", low=0, below=1
    )
    decay: float = option(2e-4, help="weight decay of both factors", low=0)
    floor: float = option(
        0.1, help="least density of a layer, in units of the whole's", above=0, high=1
    )
    start: Literal["kaiming-uniform", "ones"] = option(
        "kaiming-uniform", help="the second factor at first; ones keep a pretrained network"
    )


@dataclass(frozen=True)
class RadmmOptions:
    """Options of `radmm`."""

    rounds: int = option(
        10, help="rounds of the stage, all but the last end in a projection", low=1
    )
    rho: float = option(1e-3, help="factor of the penalty in the first round", above=0)
    growth: float = option(1.3, help="what the factor is multiplied by after a round", low=1)


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
        name="fashapley",
        summary="Shapley values of weights for the loss, by gradients on the way from 0, one-shot",
        build="prunekit_pruners.contributions:build_fashapley",
        options=FaShapleyOptions,
        paper="Kang et al., FaShapley, SaTML 2023, openreview mJF9_Fs52ut",
        cost="once: `steps` forward and backward passes of the loss on each of `batches` batches",
        details="The loss is the stage's objective, or the cross-entropy on clean images if the "
        "recipe has none. All prunable weights are scaled together. The size of a contribution "
        "counts, whether it lowers the loss or raises it: of a trained network without "
        "normalization, the signed ones leave nothing that finetuning could mend. A channel's "
        "score is the mean over its weights (the paper sums them), which differs only between "
        "layers.",
    )
    yield PrunerComponent(
        name="movement",
        summary="Keeps the weights that the loss moves away from zero, one-shot",
        build="prunekit_pruners.contributions:build_movement",
        options=MovementOptions,
        paper="Sanh et al., Movement Pruning, NeurIPS 2020, arXiv 2005.07683",
        cost="once: a forward and backward pass of the loss on each of `batches` batches",
        details="The loss is the stage's objective, or the cross-entropy on clean images if the "
        "recipe has none. Scores are signed: weights that move towards zero go first, so that "
        'budget = "lamp" refuses them. The weights stand still meanwhile; the paper sums up while '
        "it finetunes them. It is meant for networks that go on to another loss than that of "
        "their pretraining: at the end of a training on the same loss, gradients are mostly noise, "
        "and it may keep less than chance does; `fashapley` or `snip` are safer there.",
    )
    yield PrunerComponent(
        name="twinrep",
        summary="Trains weights as products, until decay has made most of them small (TwinRep)",
        build="prunekit_pruners.twinrep:build",
        options=TwinRepOptions,
        learns=True,
        allocates=True,
        paper="Li et al., AAAI 2023, doi 10.1609/aaai.v37i7.26027",
        cost="no more passes; a product of each weight, and its gradient, in every step",
        details="It changes the weights: the stage ends with the products. The paper trains from "
        "scratch, 100 epochs at lr = 0.1, a tenth of it from 70 % and 85 % on. After a pretraining "
        'write start = "ones". Masks come from one threshold over all layers, as in the paper, '
        "but a layer keeps its floor, since at 99 % the threshold alone can empty one. Channels go "
        "by the L2 norms of their filters; the paper's second variant for channels, products of "
        "matrices, is not here. An epoch before masks are set is never the best one.",
    )
    yield PrunerComponent(
        name="radmm",
        summary="Trains weights on the objective and towards sparse ones, by ADMM",
        build="prunekit_pruners.admm:build",
        options=RadmmOptions,
        learns=True,
        paper="Ye et al., ICCV 2019, arXiv 1903.12561",
        cost="no more passes; a penalty over all weights in every step, a selection each round",
        details="It changes the weights: the stage ends with those that it trained, under the mask "
        "of their magnitudes, which is also what validation judges. The paper starts from a robust "
        "network and takes 10 rounds of 20 epochs. It lets the learning rate fall and start again "
        "in every round; here it follows the optimizer's schedule. In a short stage, write a "
        "larger rho: the weights outside the mask have to become small before it ends.",
    )
