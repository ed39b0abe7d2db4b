"""Budgets, and schedules of the sparsity: declarations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prunekit import BudgetComponent, OptionError, SparsityScheduleComponent, hookimpl, option


@dataclass(frozen=True)
class RampOptions:
    """Options of `linear` and `cubic`."""

    start: float = option(0.0, help="fraction of the stage at which it begins", low=0, below=1)
    end: float = option(0.75, help="fraction of the stage at which it is reached", above=0, high=1)

    def __post_init__(self) -> None:
        if self.end <= self.start:
            raise OptionError("end", f"end must be above start = {self.start:g}, got {self.end:g}")


@hookimpl
def prunekit_budgets() -> Iterable[BudgetComponent]:
    """Declare the budgets."""
    yield BudgetComponent(
        name="layer",
        summary="Every layer loses the same fraction",
        build="prunekit_budgets.budgets:build_layer",
    )
    yield BudgetComponent(
        name="global",
        summary="The best weights of all layers are kept; layers compete",
        build="prunekit_budgets.budgets:build_global",
        compares=True,
        counts=False,
    )
    yield BudgetComponent(
        name="erk",
        summary="By shape: large layers lose more (Erdos-Renyi-Kernel)",
        build="prunekit_budgets.budgets:build_erk",
        paper="Evci et al., RigL, ICML 2020, arXiv 1911.11134",
    )
    yield BudgetComponent(
        name="igq",
        summary="Nearly the same number in every layer: small layers stay dense (IGQ)",
        build="prunekit_budgets.budgets:build_igq",
        paper="Chen et al., Sparsity Winning Twice, ICLR 2022, arXiv 2202.09844",
    )
    yield BudgetComponent(
        name="lamp",
        summary="By scores that compare across layers (LAMP)",
        build="prunekit_budgets.budgets:build_lamp",
        counts=False,
        unsigned=True,
        paper="Lee et al., LAMP, ICLR 2021, arXiv 2010.07611",
    )


@hookimpl
def prunekit_sparsity_schedules() -> Iterable[SparsityScheduleComponent]:
    """Declare the schedules of the sparsity."""
    yield SparsityScheduleComponent(
        name="constant",
        summary="All of the sparsity, from the first step on",
        build="prunekit_budgets.schedules:build_constant",
        constant=True,
    )
    yield SparsityScheduleComponent(
        name="linear",
        summary="Grows in proportion to the steps",
        build="prunekit_budgets.schedules:build_linear",
        options=RampOptions,
    )
    yield SparsityScheduleComponent(
        name="cubic",
        summary="Grows fast, then ever slower (Zhu and Gupta)",
        build="prunekit_budgets.schedules:build_cubic",
        options=RampOptions,
        paper="Zhu and Gupta, To prune or not to prune, 2017, arXiv 1710.01878",
    )
