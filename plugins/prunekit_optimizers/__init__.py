"""Optimizers, and schedules of their learning rates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prunekit import Component, OptionError, Use, hookimpl, option
from prunekit.contracts import Schedule


@dataclass(frozen=True)
class ConstantOptions:
    warmup: float = option(0.0, help="epochs of linear warm-up from 0", unit="epochs", low=0)


@dataclass(frozen=True)
class CosineOptions:
    warmup: float = option(0.0, help="epochs of linear warm-up from 0", unit="epochs", low=0)
    final: float = option(0.0, help="fraction of the rate that is left at the end", low=0, high=1)
    every: Literal["step", "epoch"] = option("step", help="when the rate changes")


@dataclass(frozen=True)
class StepOptions:
    milestones: tuple[float, ...] = option(
        (0.5, 0.75), help="parts of the stage after which the rate drops"
    )
    factor: float = option(0.1, help="what the rate is multiplied with at each", above=0, high=1)
    warmup: float = option(0.0, help="epochs of linear warm-up from 0", unit="epochs", low=0)

    def __post_init__(self) -> None:
        if not all(0 < m < 1 for m in self.milestones):
            raise OptionError(
                "milestones", f"milestones are parts of the stage, between 0 and 1, such as "
                f"[0.5, 0.75]; got {list(self.milestones)}"
            )  # fmt: skip


def _rate(default: float) -> float:
    return option(default, help="learning rate", above=0)


@dataclass(frozen=True)
class SgdOptions:
    lr: float = _rate(0.1)
    momentum: float = option(0.9, help="momentum", low=0, below=1)
    weight_decay: float = option(1e-4, help="L2 penalty, on every trained parameter", low=0)
    nesterov: bool = option(False, help="Nesterov's momentum")
    schedule: Use[Schedule] = option("cosine", help="how the rate changes")

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise OptionError("nesterov", "nesterov needs a momentum above 0")


@dataclass(frozen=True)
class AdamOptions:
    lr: float = _rate(1e-3)
    betas: tuple[float, float] = option(
        (0.9, 0.999), help="decay of the two moments", low=0, below=1
    )
    weight_decay: float = option(1e-4, help="L2 penalty, on every trained parameter", low=0)
    schedule: Use[Schedule] = option("cosine", help="how the rate changes")


@dataclass(frozen=True)
class AdamWOptions:
    lr: float = _rate(1e-3)
    betas: tuple[float, float] = option(
        (0.9, 0.999), help="decay of the two moments", low=0, below=1
    )
    weight_decay: float = option(1e-2, help="decoupled weight decay", low=0)
    schedule: Use[Schedule] = option("cosine", help="how the rate changes")


def _declare(name: str, summary: str, options: type, function: str = "") -> Component:
    build = f"prunekit_optimizers.optimizers:{function or name}"
    return Component(name=name, summary=summary, build=build, options=options)


@hookimpl
def prunekit_optimizers() -> Iterable[Component]:
    yield _declare("sgd", "Stochastic gradient descent with momentum", SgdOptions)
    yield _declare("adam", "Adam (Kingma 2015)", AdamOptions)
    yield _declare("adamw", "Adam with decoupled weight decay", AdamWOptions)


@hookimpl
def prunekit_schedules() -> Iterable[Component]:
    yield _declare("constant", "The same rate throughout", ConstantOptions)
    yield _declare("cosine", "Half a cosine from the rate to its end", CosineOptions)
    yield _declare("step", "Drops at milestones", StepOptions, "step_decay")
