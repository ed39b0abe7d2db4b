"""Randomized smoothing: declarations. What they name is imported on first use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from prunekit import EvaluatorComponent, ObjectiveComponent, Radius, hookimpl, option
from prunekit.errors import OptionError

CHUNK = 100
"""Samples of an image that are drawn together, from one seed."""
SMOKE_SAMPLES = 10
"""The most samples that a smoke run draws."""
GROWTH = 1.05
"""Sequential sampling: factor by which the number of samples grows from one look to the next."""
SURE = 0.7
"""The weight of "each sample hits" among the alternatives that `log_evidence` averages."""


@dataclass(frozen=True)
class SmoothingOptions:
    """Options of the objective `smoothing`."""

    sigma: float = option(
        0.25, help="standard deviation of the noise", unit="pixels in [0, 1]", above=0
    )
    loss: Literal["stability", "noise"] = option(
        "stability",
        help="stability: clean cross-entropy + beta * KL to the noisy prediction (Carmon 2019); "
        "noise: cross-entropy on noisy images only (Cohen 2019)",
    )
    beta: float | None = option(
        None, help="weight of the KL in the stability loss; default: 6", low=0
    )
    label_smoothing: float = option(
        0.0, help="part of a label's probability that all classes share alike", low=0, below=1
    )
    validation_draws: int = option(4, help="noisy copies of each validation image", low=1, smoke=1)

    def __post_init__(self) -> None:
        if self.loss == "stability" and self.beta is None:
            object.__setattr__(self, "beta", 6.0)
        if self.loss == "noise" and self.beta is not None:
            raise OptionError("beta", 'loss = "noise" has no KL to weight; remove beta')


@dataclass(frozen=True)
class CertifyOptions:
    """Options of the evaluator `certify`."""

    sigma: float = option(
        0.25,
        help="standard deviation of the noise; best the same as in training",
        unit="pixels in [0, 1]",
        above=0,
    )
    radii: tuple[Radius, ...] = option(
        (Radius(0.25), Radius(110 / 255), Radius(0.5), Radius(0.75)),
        help="radii at which the certified accuracy is reported",
        unit="L2, pixels in [0, 1]",
        norm="l2",
        above=0,
    )
    n0: int = option(100, help="samples that select the class", low=1, smoke=SMOKE_SAMPLES)
    n: int = option(
        10_000,
        help="further samples that bound its probability (the most, with sequential)",
        low=1,
        smoke=SMOKE_SAMPLES,
    )
    alpha: float = option(
        0.001, help="probability that the certificate of an image is wrong", above=0, below=0.5
    )
    sequential: bool = option(
        False, help="stop sampling an image once the radii are decided; the metric acr is left out"
    )
    batch: int | None = option(
        None, help="noisy images in a forward pass; default: 50 on a CPU, otherwise 1000", low=1
    )

    def __post_init__(self) -> None:
        if not self.radii:
            raise OptionError("radii", "radii is empty; name a radius, such as radii = [0.25]")
        names = [name_radius(radius) for radius in self.radii]
        if twice := {name for name in names if names.count(name) > 1}:
            raise OptionError(
                "radii", f"two radii are {min(twice)} when rounded to four digits; remove one"
            )
        # A smoke run has too few samples to certify anything, which is fine.
        if max(self.radii) > reach(self) and self.n > SMOKE_SAMPLES:
            raise OptionError(
                "radii",
                f"sigma = {self.sigma:g} with n = {self.n} and alpha = {self.alpha:g} can certify "
                f"radii up to {reach(self):.4g}, but not {name_radius(max(self.radii))}; increase "
                "n or sigma, or write smaller radii",
            )


def name_radius(radius: float) -> str:
    """The radius (pixel units) as it is written in names of metrics.

    >>> name_radius(0.25), name_radius(110 / 255)
    ('0.25', '0.4314')
    """
    return f"{radius:.4g}"


def plan_looks(options: CertifyOptions) -> tuple[int, ...]:
    """Increasing numbers of samples after which a decision is tried; only n if not sequential.

    >>> plan_looks(CertifyOptions(radii=(0.25,), n=450, sequential=True))
    (100, 200, 300, 400, 450)
    """
    looks = []
    look = CHUNK
    while options.sequential and look < options.n:
        looks.append(look)
        look = max(look + CHUNK, CHUNK * int(GROWTH * look / CHUNK))
    return (*looks, options.n)


def reach(options: CertifyOptions) -> float:
    """The largest radius (pixel units) that can be certified: all n samples of an image agree.

    >>> round(reach(CertifyOptions()), 4)
    0.7996
    """
    alpha = options.alpha * (SURE if options.sequential else 1)
    return options.sigma * NormalDist().inv_cdf(alpha ** (1 / options.n))


@hookimpl
def prunekit_objectives() -> Iterable[ObjectiveComponent]:
    """Declare the objective `smoothing`."""
    yield ObjectiveComponent(
        name="smoothing",
        summary="Training for randomized smoothing: stability under noise, or noise augmentation",
        build="prunekit_smoothing.objectives:build_smoothing",
        options=SmoothingOptions,
        paper="Carmon et al., NeurIPS 2019, arXiv 1905.13736; "
        "Cohen et al., ICML 2019, arXiv 1902.02918",
        forward_passes=lambda options: 2 if options.loss == "stability" else 1,
        validation_passes=lambda options: options.validation_draws + 1,
        accuracy_of=lambda options: (
            "training images" if options.loss == "stability" else "noisy training images"
        ),
        validates=("accuracy", "noisy_accuracy"),
        select="noisy_accuracy",
    )


@hookimpl
def prunekit_evaluators() -> Iterable[EvaluatorComponent]:
    """Declare the evaluator `certify`."""
    yield EvaluatorComponent(
        name="certify",
        summary="Certified L2 radii of the smoothed classifier, by sampling (Cohen 2019)",
        build="prunekit_smoothing.certify:build_certify",
        options=CertifyOptions,
        paper="Cohen et al., ICML 2019, arXiv 1902.02918",
        forward_passes=lambda options: options.n0 + options.n,
        guarantees=True,
    )
