"""Pruners: weights scored by learning (HYDRA), magnitude, gradients, or at random; weights that
are trained until few of them are large (TwinRep, ADMM)."""

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
the target. There is no `sparsity_schedule`: the budget loss takes its place.

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


def count_start(options: ScoreOptions | HarpOptions, batches: int, loss: int) -> int:
    """Forward passes that make the scores to start from: those of `snip` take one."""
    return int(options.start == "snip")


@hookimpl
def prunekit_pruners() -> Iterator[PrunerComponent]:
    """Declare the pruners."""
    yield PrunerComponent(
        name="score",
        summary="Scores learned on the stage's objective, with straight-through gradients (HYDRA)",
        build="prunekit_pruners.scores:build_score",
        options=ScoreOptions,
        learns=True,
        cost="no more passes; a selection of masks in every step",
        forward_passes=count_start,
        paper=_HYDRA,
    )
    yield PrunerComponent(
        name="lwm",
        summary="Least weight magnitude: keeps the largest weights, one-shot",
        build="prunekit_pruners.scores:build_lwm",
        paper="Han et al., NeurIPS 2015, arXiv 1506.02626; HYDRA's baseline",
        cost="no passes",
    )
    yield PrunerComponent(
        name="snip",
        summary="Sensitivity of the clean loss to each weight, on one batch, one-shot",
        build="prunekit_pruners.scores:build_snip",
        paper="Lee et al., SNIP, ICLR 2019, arXiv 1810.02340",
        cost="once: a forward and backward pass of the clean loss on a batch",
        forward_passes=lambda options, batches, loss: 1,
    )
    yield PrunerComponent(
        name="random",
        summary="Uniformly random scores, one-shot: the simplest baseline",
        build="prunekit_pruners.scores:build_random",
        cost="no passes",
    )
    yield PrunerComponent(
        name="harp",
        summary="Scores and the keep rates of layers, learned together (HARP)",
        build="prunekit_pruners.harp:build_harp",
        options=HarpOptions,
        learns=True,
        allocates=True,
        paces=True,
        paper="Zhao and Wressnegger, HARP, ICLR 2023, arXiv 2412.14714",
        details=_HARP,
        cost="nothing beyond `score`: a rate a layer, whose gradient comes with the scores'",
        forward_passes=count_start,
    )
    yield PrunerComponent(
        name="fashapley",
        summary="Shapley values of weights for the loss, by gradients on the way from 0, one-shot",
        build="prunekit_pruners.contributions:build_fashapley",
        options=FaShapleyOptions,
        paper="Kang et al., FaShapley, SaTML 2023, openreview mJF9_Fs52ut",
        cost="once: `steps` forward and backward passes of the loss on each of `batches` batches",
        forward_passes=lambda options, batches, loss: options.steps * options.batches * loss,
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
        signed=True,
        forward_passes=lambda options, batches, loss: (options.batches or batches) * loss,
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
        paces=True,
        trains_weights=True,
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
        trains_weights=True,
        paper="Ye et al., ICCV 2019, arXiv 1903.12561",
        cost="no more passes; a penalty over all weights in every step, a selection each round",
        details="It changes the weights: the stage ends with those that it trained, under the mask "
        "of their magnitudes, which is also what validation judges. The paper starts from a robust "
        "network and takes 10 rounds of 20 epochs. It lets the learning rate fall and start again "
        "in every round; here it follows the optimizer's schedule. In a short stage, write a "
        "larger rho: the weights outside the mask have to become small before it ends.",
    )
