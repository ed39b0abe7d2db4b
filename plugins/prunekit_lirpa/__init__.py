"""Certified training and verification by bound propagation: declarations, without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from prunekit import EvaluatorComponent, ObjectiveComponent, Threatened, hookimpl, option
from prunekit.errors import OptionError

# --no-deps: its own requirements name an old torch; of the others it only needs appdirs.
_LIRPA: dict[str, Any] = {
    "needs": ("auto_LiRPA",),
    "install": "pip install --no-deps auto_LiRPA==0.3 appdirs",
    "loads": "prunekit_lirpa.versions:load",
}


@dataclass(frozen=True)
class BoxOptions(Threatened):
    """The box around an image, which is a ball in L-infinity."""

    norms = ("linf",)


@dataclass(frozen=True)
class CertifiedOptions(BoxOptions):
    """Options of every objective: extra images are a mistake unless they are allowed."""

    allow_extra: bool = option(False, help="train on the extra images of a data set all the same")


def refuse_extra(options: CertifiedOptions) -> str:
    """Why extra images are not for certified training; "" where they are allowed."""
    if options.allow_extra:
        return ""
    return (
        "training by bounds gets worse with them (MTL-IBP, CIFAR-10, 8/255: 32.04 % certified "
        "with 100,000 generated images, 35.08 % without); remove extra, or write allow_extra = "
        "true in the objective"
    )


@dataclass(frozen=True)
class IbpOptions(CertifiedOptions):
    """Options of `ibp`."""

    ramp: float = option(
        0.6,
        help="fraction of pretraining over which eps grows from 0, step by step",
        low=0,
        below=1,
    )
    ramp_epochs: float | None = option(
        None, help="length of the ramp in epochs; overrides ramp", unit="epochs", low=0, smoke=0.5
    )
    kappa_start: float = option(
        1.0, help="weight of the clean loss at the start of the ramp", low=0, high=1
    )
    kappa_end: float = option(
        0.5, help="weight of the clean loss from the end of the ramp on", low=0, high=1
    )


@dataclass(frozen=True)
class CrownIbpOptions(IbpOptions):
    """Options of `crown-ibp`."""

    kappa_start: float = option(
        0.0, help="weight of the clean loss at the start of the ramp", low=0, high=1
    )
    kappa_end: float = option(
        0.0, help="weight of the clean loss from the end of the ramp on", low=0, high=1
    )
    mix_start: float = option(
        1.0, help="weight of CROWN-IBP in the bound at the start of the ramp", low=0, high=1
    )
    mix_end: float = option(
        0.0, help="its weight from the end of the ramp on; the rest is IBP", low=0, high=1
    )


@dataclass(frozen=True)
class MixTrainOptions(CertifiedOptions):
    """Options of `mixtrain`."""

    ramp: float = option(
        0.25,
        help="fraction of pretraining over which eps grows from 0, epoch by epoch",
        low=0,
        below=1,
    )
    ramp_epochs: int | None = option(
        None, help="length of the ramp in epochs; overrides ramp", unit="epochs", low=0, smoke=0
    )
    images: int = option(5, help="images of a batch that get bounds", low=1, smoke=1)
    probability: float = option(
        0.8, help="probability that a batch has images that get bounds", above=0, high=1
    )
    weight: float = option(0.1, help="weight of the robust loss until the ramp ends", above=0)
    growth: float = option(2.5, help="factor by which the weight grows after the ramp", low=1)
    every: int = option(5, help="epochs between two increases of the weight", low=1)
    most: float = option(50.0, help="upper limit of the weight", above=0)


Method = Literal["ibp", "crown-ibp", "crown", "alpha-crown"]


@dataclass(frozen=True)
class VerifiedOptions(BoxOptions):
    """Options of `verified`."""

    methods: tuple[Method, ...] = option(
        ("ibp", "crown-ibp", "crown"),
        help="bounds, cheapest first; each is tried on the images not yet verified",
    )
    iterations: int = option(20, help="optimization steps of alpha-crown", low=1, smoke=2)
    batch: int | None = option(
        None, help="images bounded at once; default: the recipe's batch_size", low=1
    )
    seconds: float | None = option(
        None, help="time limit for each batch; images left then are timeouts", unit="s", above=0
    )
    precision: Literal["fp32", "fp64"] = option(
        "fp32", help="precision in which bounds are searched; fp64 decides in any case"
    )

    def __post_init__(self) -> None:
        if not self.methods:
            raise OptionError(
                "methods", 'methods is empty; name a bound, such as "crown", or leave methods out'
            )
        if len(set(self.methods)) < len(self.methods):
            raise OptionError("methods", "methods names a bound twice; remove one")


PASSES = {"ibp": 2, "crown-ibp": 12, "crown": 200, "alpha-crown": 200}
"""Approximate cost of bounding an image, in forward passes; see `count_verified`."""


def count_verified(options: VerifiedOptions) -> int:
    """Approximate forward passes for an image that only the last method verifies.

    Each iteration of alpha-crown costs another 10.
    """
    iterations = 10 * options.iterations if "alpha-crown" in options.methods else 0
    return 1 + sum(PASSES[method] for method in options.methods) + iterations


@hookimpl
def prunekit_objectives() -> Iterable[ObjectiveComponent]:
    """Declare the objectives of certified training."""
    yield ObjectiveComponent(
        name="ibp",
        summary="Certified training: the loss at the worst logits that interval bounds allow",
        build="prunekit_lirpa.objectives:build_ibp",
        options=IbpOptions,
        paper="Gowal et al., ICCV 2019, arXiv 1810.12715",
        forward_passes=lambda options: 3,
        validation_passes=lambda options: 1 + PASSES["ibp"],
        validates=("accuracy", "verified_accuracy"),
        select="verified_accuracy",
        refuses_extra=refuse_extra,
        **_LIRPA,
    )
    yield ObjectiveComponent(
        name="crown-ibp",
        summary="Certified training: interval bounds, tightened by CROWN while eps grows",
        build="prunekit_lirpa.objectives:build_crown_ibp",
        options=CrownIbpOptions,
        paper="Zhang et al., ICLR 2020, arXiv 1906.06316",
        forward_passes=lambda options: 3,
        validation_passes=lambda options: 1 + PASSES["crown-ibp" if options.mix_end else "ibp"],
        validates=("accuracy", "verified_accuracy"),
        select="verified_accuracy",
        refuses_extra=refuse_extra,
        **_LIRPA,
    )
    yield ObjectiveComponent(
        name="mixtrain",
        summary="Certified training: symbolic bounds for a few images of each batch",
        build="prunekit_lirpa.objectives:build_mixtrain",
        options=MixTrainOptions,
        paper="Wang et al., 2018, arXiv 1811.02625",
        forward_passes=lambda options: 1 + options.images,
        validation_passes=lambda options: 1 + PASSES["crown"],
        validates=("accuracy", "verified_accuracy"),
        select="verified_accuracy",
        refuses_extra=refuse_extra,
        **_LIRPA,
    )


@hookimpl
def prunekit_evaluators() -> Iterable[EvaluatorComponent]:
    """Declare the evaluator of certified accuracy."""
    yield EvaluatorComponent(
        name="verified",
        summary="Verified accuracy: a proof that no image within the box is misclassified",
        build="prunekit_lirpa.evaluators:build_verified",
        options=VerifiedOptions,
        paper="Xu et al., NeurIPS 2020, arXiv 2002.12920",
        forward_passes=count_verified,
        judges="proof",
        **_LIRPA,
    )
