"""Optimizers and learning-rate schedules: declarations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from prunekit import OptimizerComponent, OptionError, ScheduleComponent, Use, hookimpl, option
from prunekit.contracts import Schedule


def _warmup() -> Any:
    return option(0.0, help="epochs of linear warmup from 0", unit="epochs", delays=True, low=0)


@dataclass(frozen=True)
class ConstantOptions:
    """Options of the schedule `constant`."""

    warmup: float = _warmup()


@dataclass(frozen=True)
class CosineOptions:
    """Options of the schedule `cosine`."""

    warmup: float = _warmup()
    final: float = option(0.0, help="fraction of the rate left at the end", low=0, high=1)
    every: Literal["step", "epoch"] = option("step", help="how often the rate changes")


@dataclass(frozen=True)
class StepOptions:
    """Options of the schedule `step`."""

    milestones: tuple[float, ...] = option(
        (0.5, 0.75), help="fractions of the stage at which the rate drops"
    )
    factor: float = option(
        0.1, help="what the rate is multiplied by at each milestone", above=0, high=1
    )
    warmup: float = _warmup()

    def __post_init__(self) -> None:
        if not all(0 < m < 1 for m in self.milestones):
            raise OptionError(
                "milestones",
                "milestones are fractions of the stage between 0 and 1, such as [0.5, 0.75]; got "
                f"{list(self.milestones)}",
            )


@dataclass(frozen=True)
class CyclicOptions:
    """Options of the schedule `cyclic`."""

    peak: float = option(
        0.5, help="fraction of the stage at which the rate is highest", above=0, below=1
    )


def _rate(default: float) -> Any:
    return option(default, help="learning rate", above=0)


def _decay() -> Any:
    return option(1e-4, help="L2 penalty on every trained parameter", low=0)


def _betas() -> Any:
    return option((0.9, 0.999), help="decay rates of the two moments", low=0, below=1)


@dataclass(frozen=True)
class SgdOptions:
    """Options of the optimizer `sgd`."""

    lr: float = _rate(0.1)
    momentum: float = option(0.9, help="momentum", low=0, below=1)
    weight_decay: float = _decay()
    nesterov: bool = option(False, help="use Nesterov momentum")
    schedule: Use[Schedule] = option("cosine", help="learning-rate schedule")

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise OptionError("nesterov", "nesterov needs a momentum above 0")


@dataclass(frozen=True)
class AdamOptions:
    """Options of the optimizer `adam`."""

    lr: float = _rate(1e-3)
    betas: tuple[float, float] = _betas()
    weight_decay: float = _decay()
    schedule: Use[Schedule] = option("cosine", help="learning-rate schedule")


@dataclass(frozen=True)
class AdamWOptions:
    """Options of the optimizer `adamw`."""

    lr: float = _rate(1e-3)
    betas: tuple[float, float] = _betas()
    weight_decay: float = option(1e-2, help="decoupled weight decay", low=0)
    schedule: Use[Schedule] = option("cosine", help="learning-rate schedule")


@hookimpl
def prunekit_optimizers() -> Iterable[OptimizerComponent]:
    """Declare the optimizers."""
    yield OptimizerComponent(
        name="sgd",
        summary="Stochastic gradient descent with momentum",
        build="prunekit_optimizers.optimizers:sgd",
        options=SgdOptions,
    )
    yield OptimizerComponent(
        name="adam",
        summary="Adam (Kingma 2015)",
        build="prunekit_optimizers.optimizers:adam",
        options=AdamOptions,
    )
    yield OptimizerComponent(
        name="adamw",
        summary="Adam with decoupled weight decay",
        build="prunekit_optimizers.optimizers:adamw",
        options=AdamWOptions,
    )


@hookimpl
def prunekit_schedules() -> Iterable[ScheduleComponent]:
    """Declare the learning-rate schedules."""
    yield ScheduleComponent(
        name="constant",
        summary="The same rate throughout",
        build="prunekit_optimizers.optimizers:constant",
        options=ConstantOptions,
    )
    yield ScheduleComponent(
        name="cosine",
        summary="Decays along half a cosine to a final rate",
        build="prunekit_optimizers.optimizers:cosine",
        options=CosineOptions,
    )
    yield ScheduleComponent(
        name="step",
        summary="Drops by a factor at milestones",
        build="prunekit_optimizers.optimizers:step_decay",
        options=StepOptions,
    )
    yield ScheduleComponent(
        name="cyclic",
        summary="Rises from 0 to the rate and falls back to 0, both linearly",
        build="prunekit_optimizers.optimizers:cyclic",
        options=CyclicOptions,
    )
