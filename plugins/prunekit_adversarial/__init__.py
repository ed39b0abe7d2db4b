"""Adversarial training and attacks: declarations. What they name is imported on first use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prunekit import Component, Radius, hookimpl, option
from prunekit.contracts import Norm


@dataclass(frozen=True)
class Attacked:
    """The options of everything that attacks; the core makes `context.threat` of eps and norm."""

    eps: Radius | None = option(None, help="radius of the attack; default that of [threat]")
    norm: Norm | None = option(None, help="norm of the attack; default that of [threat]")
    step_size: Radius | None = option(
        None, help="size of an attack step; default eps / 4 (trades in l2: 2 eps / steps)", above=0
    )


@dataclass(frozen=True)
class PgdAtOptions(Attacked):
    steps: int = option(10, help="steps of the attack", low=1, smoke=2)
    validation_steps: int = option(10, help="PGD steps in validation", low=1, smoke=2)


@dataclass(frozen=True)
class TradesOptions(PgdAtOptions):
    beta: float = option(6.0, help="weight of the robust term", low=0)


@dataclass(frozen=True)
class PgdOptions(Attacked):
    steps: int = option(50, help="steps of each restart", low=1, smoke=2)
    restarts: int = option(
        10, help="random starts, of which the worst counts", low=1, high=1000, smoke=1
    )
    iterate: Literal["last", "any"] = option(
        "last", help="what has to fool the network: the last iterate, or any (stronger, faster)"
    )


@hookimpl
def prunekit_objectives() -> Iterable[Component]:
    yield Component(
        name="benign",
        summary="Cross-entropy on clean images",
        build="prunekit_adversarial.objectives:build_benign",
    )
    yield Component(
        name="pgd-at",
        summary="Adversarial training: cross-entropy on PGD images",
        build="prunekit_adversarial.objectives:build_pgd_at",
        options=PgdAtOptions,
        paper="Madry et al., ICLR 2018, arXiv 1706.06083",
        passes=lambda options: options.steps + 1,
        select="robust_accuracy",
    )
    yield Component(
        name="trades",
        summary="Clean cross-entropy + beta * KL between clean and attacked predictions",
        build="prunekit_adversarial.objectives:build_trades",
        options=TradesOptions,
        paper="Zhang et al., ICML 2019, arXiv 1901.08573",
        passes=lambda options: options.steps + 3,
        select="robust_accuracy",
    )


@hookimpl
def prunekit_evaluators() -> Iterable[Component]:
    yield Component(
        name="clean",
        summary="Accuracy on clean images",
        build="prunekit_adversarial.evaluators:build_clean",
    )
    yield Component(
        name="pgd",
        summary="Accuracy under PGD on the cross-entropy, worst case over restarts",
        build="prunekit_adversarial.evaluators:build_pgd",
        options=PgdOptions,
        paper="Madry et al., ICLR 2018, arXiv 1706.06083",
        passes=lambda options: 1 + options.restarts * (options.steps + 1),
    )
