"""Randomized smoothing: declarations. What they name is imported on first use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from prunekit import Component, Radius, hookimpl, option
from prunekit.errors import OptionError

CHUNK = 100
"""Samples of an image that are drawn together, from one seed."""
SMOKE_SAMPLES = 10
GROWTH = 1.5
"""Sequential sampling: the next look comes when there are so many times more samples."""


@dataclass(frozen=True)
class SmoothingOptions:
    sigma: float = option(
        0.25, help="standard deviation of the noise", unit="pixels in [0, 1]", above=0
    )
    loss: Literal["stability", "noise"] = option(
        "stability",
        help="stability: clean cross-entropy + beta * KL to the noisy prediction (Carmon 2019); "
        "noise: cross-entropy on the noisy image alone (Cohen 2019)",
    )
    beta: float | None = option(
        None, help="weight of the KL; default 6 (stability; noise has none)", low=0
    )
    validation_draws: int = option(4, help="noisy copies of each validation image", low=1, smoke=1)

    def __post_init__(self) -> None:
        if self.loss == "stability" and self.beta is None:
            object.__setattr__(self, "beta", 6.0)
        if self.loss == "noise" and self.beta is not None:
            raise OptionError("beta", 'loss = "noise" has no KL to weigh; remove beta')


@dataclass(frozen=True)
class CertifyOptions:
    sigma: float = option(
        0.25,
        help="standard deviation of the noise; best that of training",
        unit="pixels in [0, 1]",
        above=0,
    )
    radii: tuple[Radius, ...] = option(
        (Radius(0.25), Radius(110 / 255), Radius(0.5), Radius(0.75)),
        help="radii to give the certified accuracy at",
        unit="L2, pixels in [0, 1]",
        norm="l2",
        above=0,
    )
    n0: int = option(100, help="samples that choose the class", low=1, smoke=SMOKE_SAMPLES)
    n: int = option(
        10_000, help="fresh samples that bound its probability; sequential: at most", low=1,
        smoke=SMOKE_SAMPLES,
    )  # fmt: skip
    alpha: float = option(
        0.001, help="probability that the certificate of an image is wrong", above=0, below=0.5
    )
    sequential: bool = option(
        False, help="stop sampling an image once the given radii are decided; no acr then"
    )
    batch: int | None = option(
        None, help="noisy images in a forward pass; default 50 on a CPU, 1000 elsewhere", low=1
    )

    def __post_init__(self) -> None:
        if not self.radii:
            raise OptionError("radii", "name a radius at least, such as radii = [0.25]")
        names = [name_radius(radius) for radius in self.radii]
        if twice := {name for name in names if names.count(name) > 1}:
            raise OptionError("radii", f"{min(twice)} is there twice in four digits; remove one")
        # A smoke run certifies nothing, and need not.
        if max(self.radii) > reach(self) and self.n > SMOKE_SAMPLES:
            raise OptionError(
                "radii",
                f"sigma = {self.sigma:g} with n = {self.n} and alpha = {self.alpha:g} certifies "
                f"nothing beyond {reach(self):.4g}, so not {name_radius(max(self.radii))}; raise n "
                "or sigma, or write smaller radii",
            )


def name_radius(radius: float) -> str:
    """As it stands in the names of metrics.

    >>> name_radius(0.25), name_radius(110 / 255)
    ('0.25', '0.4314')
    """
    return f"{radius:.4g}"


def plan_looks(options: CertifyOptions) -> tuple[int, ...]:
    """Numbers of samples after which the bound is computed, ascending: n alone, unless sequential.

    >>> plan_looks(CertifyOptions(n=1000, sequential=True))
    (100, 200, 300, 500, 1000)
    """
    looks = []
    look = CHUNK
    while options.sequential and GROWTH * look <= options.n:
        looks.append(look)
        look = CHUNK * -(-int(GROWTH * look) // CHUNK)
    return (*looks, options.n)


def reach(options: CertifyOptions) -> float:
    """The largest radius that can come out: that of an image whose n samples all agree.

    >>> round(reach(CertifyOptions()), 4)
    0.7996
    """
    alpha = options.alpha / len(plan_looks(options))
    return options.sigma * NormalDist().inv_cdf(alpha ** (1 / options.n))


@hookimpl
def prunekit_objectives() -> Iterable[Component]:
    yield Component(
        name="smoothing",
        summary="Training for randomized smoothing: stability under Gaussian noise, or noise alone",
        build="prunekit_smoothing.objectives:build_smoothing",
        options=SmoothingOptions,
        paper="Carmon et al., NeurIPS 2019, arXiv 1905.13736; "
        "Cohen et al., ICML 2019, arXiv 1902.02918",
        forward_passes=lambda options: 2 if options.loss == "stability" else 1,
        select="noisy_accuracy",
    )


@hookimpl
def prunekit_evaluators() -> Iterable[Component]:
    yield Component(
        name="certify",
        summary="Certified L2 radii of the smoothed classifier, by sampling (Cohen 2019)",
        build="prunekit_smoothing.certify:build_certify",
        options=CertifyOptions,
        paper="Cohen et al., ICML 2019, arXiv 1902.02918",
        forward_passes=lambda options: options.n0 + options.n,
    )
