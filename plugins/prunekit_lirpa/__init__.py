"""Certified training and verification by bound propagation: declarations, without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prunekit import Component, Radius, hookimpl, option
from prunekit.errors import OptionError

NEEDS = ("auto_LiRPA",)
INSTALL = "pip install --no-deps auto_LiRPA==0.3 appdirs"
"""Its own requirements name a torch of long ago; the only one it needs besides is appdirs."""
LOADS = "prunekit_lirpa.versions:load"


@dataclass(frozen=True)
class Threatened:
    """The box around an image; the core makes `context.threat` of it and the recipe's [threat]."""

    eps: Radius | None = option(None, help="radius of the box; default that of [threat]")
    norm: Literal["linf"] | None = option(None, help="norm; default that of [threat]")


@dataclass(frozen=True)
class IbpOptions(Threatened):
    ramp: float = option(
        0.6, help="part of pretraining over which eps grows from 0, step by step", low=0, below=1
    )
    ramp_epochs: float | None = option(
        None, help="the same in epochs; takes the place of ramp", unit="epochs", low=0, smoke=0.5
    )
    kappa_start: float = option(
        1.0, help="weight of the clean loss at the start of the ramp", low=0, high=1
    )
    kappa_end: float = option(
        0.5, help="and at its end; the bounds' loss has the rest", low=0, high=1
    )


@dataclass(frozen=True)
class CrownIbpOptions(IbpOptions):
    kappa_start: float = option(
        0.0, help="weight of the clean loss at the start of the ramp", low=0, high=1
    )
    kappa_end: float = option(
        0.0, help="and at its end; the bounds' loss has the rest", low=0, high=1
    )
    mix_start: float = option(
        1.0, help="part of CROWN-IBP in the bound at the start of the ramp", low=0, high=1
    )
    mix_end: float = option(
        0.0, help="and from its end on; the rest is IBP, which is cheaper", low=0, high=1
    )


@dataclass(frozen=True)
class MixTrainOptions(Threatened):
    ramp: float = option(
        0.25, help="part of pretraining over which eps grows from 0, epoch by epoch", low=0, below=1
    )
    ramp_epochs: int | None = option(
        None, help="the same in epochs; takes the place of ramp", unit="epochs", low=0, smoke=0
    )
    images: int = option(5, help="images of a batch that are bounded", low=1, smoke=1)
    probability: float = option(
        0.8, help="how often a batch has any images bounded", above=0, high=1
    )
    weight: float = option(0.1, help="weight of their loss, up to the end of the ramp", above=0)
    growth: float = option(2.5, help="what it is multiplied with then, again and again", low=1)
    every: int = option(5, help="epochs from one multiplication to the next", low=1)
    most: float = option(50.0, help="largest weight", above=0)


Method = Literal["ibp", "crown-ibp", "crown", "alpha-crown"]


@dataclass(frozen=True)
class VerifiedOptions(Threatened):
    methods: tuple[Method, ...] = option(
        ("ibp", "crown-ibp", "crown"),
        help="bounds, cheap to dear; each gets the images that those before left open",
    )
    iterations: int = option(20, help="steps in which alpha-crown optimises", low=1, smoke=2)
    batch: int | None = option(
        None, help="images bounded at once; default: the recipe's batch_size", low=1
    )
    seconds: float | None = option(
        None, help="time for so many images; what is open then is a timeout", unit="s", above=0
    )
    precision: Literal["fp32", "fp64"] = option("fp32", help="of the bounds and the network's sums")

    def __post_init__(self) -> None:
        if not self.methods:
            raise OptionError("methods", 'name a bound, such as "crown", or leave methods out')
        if len(set(self.methods)) < len(self.methods):
            raise OptionError("methods", "methods names a bound twice; once is enough")


@hookimpl
def prunekit_objectives() -> Iterable[Component]:
    yield Component(
        name="ibp",
        summary="Certified training: the loss at the worst logits that interval bounds allow",
        build="prunekit_lirpa.objectives:build_ibp",
        options=IbpOptions,
        needs=NEEDS,
        install=INSTALL,
        loads=LOADS,
        paper="Gowal et al., ICCV 2019, arXiv 1810.12715",
        forward_passes=lambda options: 3,
        select="verified_accuracy",
    )
    yield Component(
        name="crown-ibp",
        summary="Certified training: interval bounds, helped by CROWN while eps grows",
        build="prunekit_lirpa.objectives:build_crown_ibp",
        options=CrownIbpOptions,
        needs=NEEDS,
        install=INSTALL,
        loads=LOADS,
        paper="Zhang et al., ICLR 2020, arXiv 1906.06316",
        forward_passes=lambda options: 3,
        select="verified_accuracy",
    )
    yield Component(
        name="mixtrain",
        summary="Certified training: symbolic bounds of a few images of each batch",
        build="prunekit_lirpa.objectives:build_mixtrain",
        options=MixTrainOptions,
        needs=NEEDS,
        install=INSTALL,
        loads=LOADS,
        paper="Wang et al., 2018, arXiv 1811.02625",
        forward_passes=lambda options: 1 + options.images,
        select="verified_accuracy",
    )


PASSES = {"ibp": 2, "crown-ibp": 12, "crown": 200, "alpha-crown": 200}
"""Roughly, what a bound of an image costs; alpha-crown on top of that 10 for each iteration."""


def count_verified(options: VerifiedOptions) -> int:
    """Forward passes, roughly, of an image that every method but the last leaves open."""
    optimised = 10 * options.iterations if "alpha-crown" in options.methods else 0
    return 1 + sum(PASSES[method] for method in options.methods) + optimised


@hookimpl
def prunekit_evaluators() -> Iterable[Component]:
    yield Component(
        name="verified",
        summary="Accuracy with a proof that no image of the box around is misjudged",
        build="prunekit_lirpa.evaluators:build_verified",
        options=VerifiedOptions,
        needs=NEEDS,
        install=INSTALL,
        loads=LOADS,
        paper="Xu et al., NeurIPS 2020, arXiv 2002.12920",
        forward_passes=count_verified,
        judges="proof",
    )
