"""Options of every type, and components that have some."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from prunekit.catalog.component import Radius, Threatened, Use, option
from prunekit.catalog.kinds import KINDS
from prunekit.catalog.registry import Entry, Registry
from prunekit.contracts import Evaluator, OptimizerChoice, Schedule
from prunekit.errors import Place
from prunekit.recipe.resolver import Resolver
from prunekit.steps import Pruner


@dataclass(frozen=True)
class ScheduleOptions:
    warmup: float = option(0.0, help="warm-up", low=0)


@dataclass(frozen=True)
class OptimizerOptions:
    lr: float = option(0.1, help="rate", above=0)
    schedule: Use[Schedule] = option("cosine", help="schedule")


@dataclass(frozen=True)
class BoxOptions(Threatened):
    norms = ("linf",)


@dataclass(frozen=True)
class Options:
    whole: int = option(1, help="a whole number", low=1, high=5)
    number: float = option(0.5, help="a number", above=0, below=1)
    truth: bool = option(False, help="true or false")
    text: str = option("x", help="a text")
    choice: Literal["layer", "global"] = option("layer", help="a choice")
    size: Literal[1, 2] = option(1, help="a size")
    eps: Radius = option(0.1, help="a radius")
    file: Path | None = option(None, help="a file", exists=True)
    pair: tuple[float, float] = option((0.1, 0.2), help="two numbers", low=0, below=1)
    words: tuple[str, ...] = option((), help="some texts")
    anything: Any = option(None, help="anything")
    kwargs: dict[str, Any] | None = option(None, help="a table")
    optimizer: Use[OptimizerChoice] = option({"use": "sgd", "lr": 0.7}, help="optimizer")
    pruner: Use[Pruner] = option("score", help="pruner")
    with_: tuple[Use[Evaluator], ...] = option((), help="evaluators")
    lambda_: float = option(1.0, help="a Python keyword")


def make_registry():
    def entry(kind, name, options=None):
        settings = {"options": options} if options else {}
        return Entry(KINDS[kind](name=name, summary=name, build="m:b", **settings), "p", "d 1")

    return Registry(
        (
            entry("optimizer", "sgd", OptimizerOptions),
            entry("optimizer", "adam", OptimizerOptions),
            entry("schedule", "cosine", ScheduleOptions),
            entry("schedule", "step", ScheduleOptions),
            entry("pruner", "score", ScheduleOptions),
            entry("evaluator", "clean"),
            entry("evaluator", "pgd", Threatened),
            entry("evaluator", "ibp", BoxOptions),
        )
    )


@pytest.fixture
def resolve():
    """(options or None, problems as "place: message"); a place is the path of keys by itself."""

    def resolve(table, cls=Options, threat=None, folder=Path("/base"), place=None):
        resolver = Resolver(
            make_registry(),
            folder,
            lambda path: place or Place(".".join(map(str, path))),
            threat,
        )
        return resolver.options(cls, table, (), "thing 'x'"), list(map(str, resolver.problems))

    return resolve
