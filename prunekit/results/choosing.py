"""Choosing a setting of a sweep on validation images, before anybody looks at test results."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunekit.errors import UserError
from prunekit.store.records import RunRecord


@dataclass(frozen=True)
class Choice:
    """The values of the chosen settings for the runs that share `others`, and what they scored.

    `scores` are the means over seeds of `metric` for every combination that was compared.
    """

    others: Mapping[str, Any]
    chosen: Mapping[str, Any]
    metric: str
    scores: tuple[tuple[Mapping[str, Any], float], ...]


def choose(
    runs: Sequence[RunRecord], addresses: Sequence[str]
) -> tuple[list[RunRecord], list[Choice]]:
    """Of runs that differ in `addresses` and the seed alone, keep the best on validation.

    What is compared is the metric by which the last training stage chose its epoch, averaged over
    seeds; the first of equals wins. Runs whose settings lack an address are kept as they are.

    Raises `UserError` where no run has an address, where a run is not done, and where the values
    were not all tried with the same seeds: a mean over other seeds would not compare.
    """
    for address in addresses:
        if not any(address in run.settings for run in runs):
            known = sorted({name for run in runs for name in run.settings} - {"seed"})
            there = ", ".join(known) or "none"
            raise UserError(f"--choose {address}: no run of a sweep has it; there are: {there}")
    groups: dict[str, dict[str, list[RunRecord]]] = {}
    for run in runs:
        if all(address in run.settings for address in addresses):
            tried = {address: run.settings[address] for address in addresses}
            rest = {k: v for k, v in run.settings.items() if k not in (*addresses, "seed")}
            group = groups.setdefault(_freeze({"name": run.name, **rest}), {})
            group.setdefault(_freeze(tried), []).append(run)
    dropped: set[int] = set()
    choices = []
    for others, tried in groups.items():
        metric = _check_group(tried)
        scores = {value: statistics.fmean(_score(run)[1] for run in own)
                  for value, own in tried.items()}  # fmt: skip
        best = max(scores, key=lambda value: scores[value])
        dropped |= {id(run) for value, own in tried.items() if value != best for run in own}
        compared = tuple((json.loads(value), score) for value, score in scores.items())
        choices.append(Choice(json.loads(others), json.loads(best), metric, compared))
    return [run for run in runs if id(run) not in dropped], choices


def _freeze(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _score(run: RunRecord) -> tuple[str, float]:
    """(name, value) of the validation metric of the last training stage of a run."""
    for stage in reversed(run.stages):
        name = f"validation.{stage.metrics.get('select', '')}"
        if name in stage.metrics and math.isfinite(stage.metrics[name]):
            return name, float(stage.metrics[name])
    raise UserError(
        f"{run.folder.name}: no training stage chose its epoch on validation; nothing to choose by"
    )


def _check_group(tried: Mapping[str, Sequence[RunRecord]]) -> str:
    """The one metric of all runs. Raises `UserError` where they do not compare."""
    undone = [run.folder.name for own in tried.values() for run in own if run.status != "done"]
    if undone:
        raise UserError(f"{undone[0]} is not done; run the recipe again before choosing")
    seeds = {value: sorted(run.seed for run in own) for value, own in tried.items()}
    first, *others = seeds
    for value in others:
        if seeds[value] != seeds[first]:
            raise UserError(
                f"{first} was run with seeds {seeds[first]}, {value} with {seeds[value]}; run all "
                "values with the same seeds before choosing"
            )
    names = {_score(run)[0] for own in tried.values() for run in own}
    if len(names) > 1:
        raise UserError(f"runs chose their epochs by different metrics: {', '.join(sorted(names))}")
    return names.pop()


def tell(choice: Choice) -> str:
    """One line: what was chosen, and what it beat.

    >>> scores = (({"lr": 0.1}, 0.5), ({"lr": 0.01}, 0.25))
    >>> tell(Choice({"name": "r", "pruner": "lwm"}, {"lr": 0.1}, "validation.accuracy", scores))
    'pruner lwm: lr 0.1 by validation.accuracy (lr 0.1: 50.0%, lr 0.01: 25.0%)'
    """
    from prunekit.results.metrics import format_metric, format_setting

    def words(settings: Mapping[str, Any]) -> str:
        pairs = (f"{k} {format_setting(v)}" for k, v in settings.items() if k != "name")
        return ", ".join(pairs)

    compared = ", ".join(
        f"{words(values)}: {format_metric(choice.metric, score)}" for values, score in choice.scores
    )
    where = words(choice.others) or choice.others["name"]
    return f"{where}: {words(choice.chosen)} by {choice.metric} ({compared})"
