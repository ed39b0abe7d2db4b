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
