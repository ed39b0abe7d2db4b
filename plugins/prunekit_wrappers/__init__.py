"""Wrappers of training steps: weight perturbation, and averages of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from prunekit import WrapperComponent, hookimpl, option


@dataclass(frozen=True)
class AwpOptions:
    """Options of `awp`."""

    gamma: float = option(
        0.01, help="length of the perturbation, as a fraction of each weight's norm", above=0
    )
    start: int = option(
        0, help="epochs of the stage before it begins", unit="epochs", delays=True, low=0
    )


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """Options of every average."""

    bn: Literal["average", "recalibrate"] = option(
        "average", help="statistics of batch normalization: averaged too, or measured anew"
    )
    batches: int = option(50, help="training batches that measure them", low=1, smoke=1)


@dataclass(frozen=True, kw_only=True)
class EmaOptions(AverageOptions):
    """Options of `ema`."""

    decay: float = option(
        0.995, help="what is left of the average in a step; less in the first ones", low=0, below=1
    )


@dataclass(frozen=True)
class S2apOptions:
    """Options of `s2ap`."""

    gamma: float = option(
        0.01, help="length of the perturbation, as a fraction of each layer's scores", above=0
    )
    start: int = option(
        5, help="epochs of the stage before it begins", unit="epochs", delays=True, low=0
    )


@dataclass(frozen=True, kw_only=True)
class SwaOptions(AverageOptions):
    """Options of `swa`."""

    start: float = option(
        0.75, help="fraction of the stage's epochs before the first that counts", low=0, below=1
    )
    bn: Literal["average", "recalibrate"] = option(
        "recalibrate", help="statistics of batch normalization: averaged too, or measured anew"
    )


def count_batches(options: AverageOptions) -> int:
    """The training batches that measure statistics in an epoch."""
    return options.batches if options.bn == "recalibrate" else 0


def count_idle(options: SwaOptions, epochs: int) -> int:
    """The epochs of a stage before the first that counts in the mean."""
    return int(Fraction(repr(options.start)) * epochs)  # of the decimal that was written


AWP_DETAILS = """\
The authors' gamma is 0.01 for adversarial training (pgd-at), and 0.005 from epoch 10 on for TRADES.
Where training stops learning, as it may on small networks, lower it or start later. Kept weights
alone are measured and moved; under learned scores they are frozen, and the gradient goes to scores.

Unlike in the authors' code, v comes from the gradient itself, not from a step of a copy of the
network (the copy's rate cancels), and the optimizer, with its weight decay, steps from w. Only the
last pass, at w + v, moves statistics of batch normalization.

In prune stages: under learned scores, layers that stay dense are not perturbed; under `twinrep` it
perturbs w, and not w a; under `radmm` the gradient is that of the loss with its penalty."""

STATISTICS = """\
With bn = "recalibrate", statistics of batch normalization are the average over `batches` batches of
augmented training images under the stage's objective, so of its own mixture of clean and attacked
ones. They are the same images in every epoch."""

SWA_DETAILS = f"""\
The mean is over the ends of epochs, under the masks of the moment; the learning rate remains the
stage's. Epochs before `start` are judged as they are, and one of them may be the best.

{STATISTICS}"""


@hookimpl
def prunekit_wrappers() -> Iterable[WrapperComponent]:
    """Declare the wrappers."""
    yield WrapperComponent(
        name="awp",
        summary="Adversarial weight perturbation: the loss at the worst weights nearby",
        build="prunekit_wrappers.awp:build",
        options=AwpOptions,
        paper="Wu et al., NeurIPS 2020, arXiv 2004.05884",
        details=AWP_DETAILS,
        passes=lambda options: 2,
        idle=lambda options, epochs: options.start,
    )
    yield WrapperComponent(
        name="ema",
        summary="Judges and keeps an exponential moving average of what is trained",
        build="prunekit_wrappers.averages:build_ema",
        options=EmaOptions,
        paper="as used by Rebuffi et al., NeurIPS 2021, arXiv 2103.01946",
        details=STATISTICS,
        cost="a copy of what is trained; recalibrating, the forward passes of `batches` an epoch",
        averages=True,
        batches=count_batches,
    )
    yield WrapperComponent(
        name="swa",
        summary="Judges and keeps the mean of what is trained over the last epochs",
        build="prunekit_wrappers.averages:build_swa",
        options=SwaOptions,
        paper="Izmailov et al., UAI 2018, arXiv 1803.05407",
        details=SWA_DETAILS,
        cost="a copy of what is trained; recalibrating, the forward passes of `batches` an epoch",
        averages=True,
        batches=count_batches,
        idle=count_idle,
    )
    yield WrapperComponent(
        name="s2ap",
        summary="Learns scores where the worst scores nearby would select the masks (S2AP)",
        build="prunekit_wrappers.s2ap:build",
        options=S2apOptions,
        paper="S2AP, arXiv 2510.18381",
        passes=lambda options: 2,
        idle=lambda options, epochs: options.start,
        scores=True,
    )
