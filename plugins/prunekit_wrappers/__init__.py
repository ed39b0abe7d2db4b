"""Wrappers of training steps: weight perturbation, and averages of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prunekit import WrapperComponent, hookimpl, option


@dataclass(frozen=True)
class AwpOptions:
    """Options of `awp`."""

    gamma: float = option(
        0.01, help="length of the perturbation, as a fraction of each weight's norm", above=0
    )
    start: int = option(0, help="epochs of the stage before it begins", unit="epochs", low=0)


@dataclass(frozen=True)
class EmaOptions:
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
    start: int = option(5, help="epochs of the stage before it begins", unit="epochs", low=0)


@hookimpl
def prunekit_wrappers() -> Iterable[WrapperComponent]:
    """Declare the wrappers."""
    yield WrapperComponent(
        name="awp",
        summary="Adversarial weight perturbation: the loss at the worst weights nearby",
        build="prunekit_wrappers.awp:build",
        options=AwpOptions,
        paper="Wu et al., NeurIPS 2020, arXiv 2004.05884",
        passes=lambda options: 2,
    )
    yield WrapperComponent(
        name="ema",
        summary="Judges and keeps an exponential moving average of what is trained",
        build="prunekit_wrappers.ema:build",
        options=EmaOptions,
        averages=True,
    )
    yield WrapperComponent(
        name="s2ap",
        summary="Learns scores where the worst scores nearby would select the masks (S2AP)",
        build="prunekit_wrappers.s2ap:build",
        options=S2apOptions,
        paper="S2AP, arXiv 2510.18381",
        passes=lambda options: 2,
        scores=True,
    )
