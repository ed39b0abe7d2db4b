"""Rewirers: masks that change while weights train. Declarations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prunekit import OptionError, RewirerComponent, Use, hookimpl, option
from prunekit.steps import Budget

_EVERY = "steps from one rewiring to the next; each takes the place of an optimizer step"
_COST = "an optimizer step in `every`, whose place a rewiring takes; no pass of its own"
_ELEMENTS = (
    'The method is one of single weights, structure = "element". With whole channels, or n:m, the '
    "core selects those by what the rewirer says of their weights, so that fewer change."
)
_START = (
    "The first masks are the largest weights where an earlier stage or a file trained them, and "
    "random ones from scratch (of what an earlier stage kept, as far as that goes). `start` "
    "decides it where that is not known, as for weights that an architecture downloads."
)


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """What all have that begin at the full sparsity."""

    start: Literal["random", "magnitude"] | None = option(
        None, help="the first masks; default: magnitude if the weights are trained, else random"
    )


@dataclass(frozen=True, kw_only=True)
class SetOptions(StartOptions):
    """Options of `set`."""

    every: int | None = option(None, help=f"{_EVERY}; default: those of an epoch", low=2, smoke=2)
    fraction: float = option(0.3, help="of a layer's kept weights, exchanged", above=0, below=1)


@dataclass(frozen=True, kw_only=True)
class RiglOptions(StartOptions):
    """Options of `rigl`."""

    every: int = option(100, help=_EVERY, low=2, smoke=2)
    fraction: float = option(
        0.3, help="of a layer's kept weights, exchanged at first; falls to 0", above=0, below=1
    )
    until: float = option(0.75, help="part of the stage after which masks stay", above=0, high=1)


@dataclass(frozen=True, kw_only=True)
class FlyingBirdOptions(StartOptions):
    """Options of `flyingbird`."""

    every: int = option(900, help=_EVERY, low=2, smoke=2)
    fraction: float = option(
        0.5, help="of a layer's kept weights, exchanged at first", above=0, below=1
    )
    last: float = option(0.005, help="what `fraction` falls to at the end", low=0, below=1)
    growth: Literal["random", "gradient"] = option("random", help="where weights grow")

    def __post_init__(self) -> None:
        if self.last > self.fraction:
            raise OptionError("last", f"last must be at most fraction = {self.fraction:g}")


@dataclass(frozen=True, kw_only=True)
class FlyingBirdPlusOptions(FlyingBirdOptions):
    """Options of `flyingbird-plus`."""

    budget: Use[Budget] = option("igq", help="how layers share the sparsity at first")
    after: float = option(0.5, help="part of the stage after which densities move", low=0, below=1)
    until: float = option(
        0.9, help="part of the stage after which it is at the target again", above=0, high=1
    )
    epochs: int = option(4, help="differences of epochs that it looks at", low=1)
    less: float = option(
        0.4, help="of the exchanged weights, dropped on top where the gap widens", low=0
    )
    more: float = option(
        0.05, help="of the exchanged weights, grown on top where the error rises", low=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.until <= self.after:
            raise OptionError("until", f"until must be above after = {self.after:g}")
        if isinstance(self.budget, Use) and not self.budget.component.counts:
            told = f"{self.budget.name} compares scores and gives no counts"
            raise OptionError("budget", f'{told}; write budget = "igq"')


@dataclass(frozen=True, kw_only=True)
class GradualOptions:
    """Options of `gradual`."""

    every: int = option(100, help=_EVERY, low=2, smoke=2)
    regrow: bool = option(False, help="weights grow too, where gradients are large (GraNet)")
    fraction: float = option(
        0.5, help="with regrow: of a layer's kept weights, exchanged at first", above=0, below=1
    )


@hookimpl
def prunekit_rewirers() -> Iterable[RewirerComponent]:
    """Declare the rewirers."""
    yield RewirerComponent(
        name="gradual",
        summary="Removes the smallest weights, ever more of them",
        build="prunekit_rewirers.gradual:build",
        options=GradualOptions,
        gradients=lambda options: options.regrow,
        grows="cubic",
        cost=_COST,
        paper="Zhu and Gupta, To prune or not to prune, 2017, arXiv 1710.01878",
        details="How many are removed by when is the stage's: sparsity_schedule = "
        '{ use = "cubic", start = 0.1, end = 0.75 }. It begins with all weights, also where an '
        "earlier stage removed some. Before `start` and after `end`, rewirings take the place of "
        "optimizer steps all the same, without effect. Masks are nested: what is removed stays "
        "removed (with budgets of whole counts, erk and igq, rounding may ask a layer for one "
        "weight more than before). An n:m structure has no schedule, and does not go with it.\n\n"
        "regrow = true exchanges weights as well, as GraNet does (Liu et al., NeurIPS 2021): of "
        "what a step keeps, a part that falls with the cosine to 0 at the end.\n\n"
        "Not as in the paper: removed weights are zero, and do not wait with their old values.",
    )
    yield RewirerComponent(
        name="set",
        summary="Drops small weights, grows others at random (SET)",
        build="prunekit_rewirers.exchange:build_set",
        options=SetOptions,
        cost=_COST,
        paper="Mocanu et al., Nature Communications 2018, arXiv 1707.04780",
        details="Not as in the paper: it drops the smallest |w|, not the smallest positive and "
        f"largest negative ones apart, and new weights start at zero.\n\n{_START}\n\n{_ELEMENTS}",
    )
    yield RewirerComponent(
        name="rigl",
        summary="Drops small weights, grows others where gradients are large (RigL)",
        build="prunekit_rewirers.exchange:build_rigl",
        options=RiglOptions,
        gradients=lambda options: True,
        cost=_COST,
        paper="Evci et al., RigL, ICML 2020, arXiv 1911.11134",
        details="The gradients are those of the stage's loss on the batch of that step. The paper "
        'takes budget = "erk". Not as there: among equal weights the first one goes, without '
        f"noise.\n\n{_START}\n\n{_ELEMENTS}",
    )
    yield RewirerComponent(
        name="flyingbird",
        summary="Drops and grows to the end of training, ever less (Flying Bird)",
        build="prunekit_rewirers.exchange:build_flyingbird",
        options=FlyingBirdOptions,
        gradients=lambda options: options.growth == "gradient",
        cost=_COST,
        paper="Chen et al., Sparsity Winning Twice, ICLR 2022, arXiv 2202.09844",
        details='The paper takes budget = "igq". Not as in its code: weights grow by a random '
        "permutation, so that counts are exact and not only expected.\n\n"
        f"{_START}\n\n{_ELEMENTS}",
    )
    yield RewirerComponent(
        name="flyingbird-plus",
        summary="Flying Bird whose density follows overfitting, and ends at the target",
        build="prunekit_rewirers.adaptive:build",
        options=FlyingBirdPlusOptions,
        gradients=lambda options: options.growth == "gradient",
        allocates=True,
        elements=True,
        cost=f"{_COST}; more or fewer weights than at the target, for a time",
        paper="Chen et al., Sparsity Winning Twice, ICLR 2022, arXiv 2202.09844",
        details="From `after` on, each rewiring looks at the last epochs. It drops `less` more "
        "where at least half of the differences of training accuracy minus validation accuracy "
        "under attack went up, and grows `more` more where at least half of those of the "
        "validation error did. From `until` on it goes to the target exactly, in proportion, and "
        "is `flyingbird`. An epoch at another density is never the best one.\n\n"
        "Not as in the paper: it looks at the validation error under attack, not the loss; the "
        "training accuracy is that of the objective, under attack with pgd-at; and it comes back "
        "to the target, where the paper's density ends wherever it is. A rising sparsity_schedule "
        "has no say before `until`.\n\n"
        f'{_START}\n\nIt is for structure = "element".',
    )
