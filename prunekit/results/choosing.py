"""Choosing a setting of a sweep by its results on validation images, never on test images."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.contracts import Metric
from prunekit.errors import UserError
from prunekit.results.columns import find_columns, freeze, gather_settings
from prunekit.results.comparison import find_doubtful
from prunekit.results.metrics import format_metric, format_setting
from prunekit.results.settings import Settings
from prunekit.store.records import RunRecord


@dataclass(frozen=True)
class Choice:
    """The values chosen for the runs that share the settings `others`.

    `scores` are the values that were compared, each with its mean of `metric` over seeds.
    """

    others: Mapping[str, Any]
    chosen: Mapping[str, Any]
    metric: str
    scores: tuple[tuple[Mapping[str, Any], float], ...]
    unranked: tuple[Mapping[str, Any], ...] = ()
    """Values that were not compared: some of their results are not to be ranked."""


def choose(
    runs: Sequence[RunRecord], addresses: Sequence[str]
) -> tuple[list[RunRecord], list[Choice]]:
    """Of runs that differ only in `addresses` and the seed, keep the best on validation.

    Compares the metric by which the last training stage selected its epoch, averaged over seeds;
    the first of equals wins. Runs whose settings lack an address are kept. A value whose results
    are in doubt (`Metric.doubtful`) is not ranked.

    Raises `UserError` if no run has an address, if no value can be ranked, if a run is not done, or
    if the values were tried with different seeds, over which means cannot be compared.
    """
    told = gather_settings(runs)
    columns = {*find_columns(runs, told), *(name for one in told for name in one.swept)}
    for address in addresses:
        if not any(_look_up(settings, address)[0] for settings in told):
            there = ", ".join(sorted(columns - {"name"})) or "none"
            raise UserError(f"--choose {address}: no run has this setting; there are: {there}")
    groups: dict[str, dict[str, list[RunRecord]]] = {}
    for run, settings in zip(runs, told, strict=True):
        # What `prunekit eval` found of a network follows the run that the network is of.
        judged = run.stages and all(stage.kind == "evaluate" for stage in run.stages)
        looked = {address: _look_up(settings, address) for address in addresses}
        if not judged and all(name for name, _ in looked.values()):
            tried = freeze({a: run.settings.get(a, value) for a, (_, value) in looked.items()})
            chosen = tuple(f"{name}." for name, _ in looked.values())
            has = {"name": run.name, **settings.of("")}
            rest = {a: has[a] for a in has if a in columns and not f"{a}.".startswith(chosen)}
            group = groups.setdefault(freeze({"name": run.name, **rest}), {})
            group.setdefault(tried, []).append(run)
    dropped: set[Path] = set()
    choices = []
    for others, by_value in groups.items():
        metric, scores = _score_values(by_value)
        left = {v for v, own in by_value.items() if any(find_doubtful(r.stages) for r in own)}
        scores = {value: score for value, score in scores.items() if value not in left}
        if not scores:
            raise UserError(
                f"--choose {' '.join(addresses)}: no value has results to rank; over 1 % of the "
                "images of each are in doubt, as `prunekit results` says"
            )
        best = max(scores, key=lambda value: scores[value])
        dropped |= {run.folder for value, own in by_value.items() if value != best for run in own}
        compared = tuple((json.loads(value), score) for value, score in scores.items())
        unranked = tuple(json.loads(value) for value in by_value if value in left)
        choices.append(Choice(json.loads(others), json.loads(best), metric, compared, unranked))
    kept = [run for run in runs if not dropped & {run.folder, *run.folder.parents}]
    return kept, choices


def _look_up(settings: Settings, address: str) -> tuple[str, Any]:
    """(its one name, the value) of a setting, ("", None) where a run has none."""
    has = settings.of("")
    name = settings.names.get(address, address)
    return (name, has[name]) if name in has else ("", None)


def _score_values(by_value: Mapping[str, Sequence[RunRecord]]) -> tuple[str, dict[str, float]]:
    """The metric that all runs share, and for each value its mean over seeds."""
    for run in (run for own in by_value.values() for run in own):
        if run.status != "done":
            raise UserError(f"{run.folder.name} is not done; run the recipe again before choosing")
    seeds = {value: sorted(run.seed for run in own) for value, own in by_value.items()}
    first, *others = seeds
    for value in others:
        if seeds[value] != seeds[first]:
            raise UserError(
                f"{first} was run with seeds {seeds[first]}, {value} with {seeds[value]}; run all "
                "values with the same seeds before choosing"
            )
    found = {value: [_score_run(run) for run in own] for value, own in by_value.items()}
    names = sorted({name for scores in found.values() for name, _ in scores})
    if len(names) > 1:
        raise UserError(f"runs selected their epochs by different metrics: {', '.join(names)}")
    means = {v: statistics.fmean(score for _, score in scores) for v, scores in found.items()}
    return names[0], means


def _score_run(run: RunRecord) -> tuple[str, float]:
    """(name, value) of the validation metric of the last training stage of a run."""
    for stage in reversed(run.stages):
        name = f"validation.{stage.metrics.get('select', '')}"
        if name in stage.metrics and math.isfinite(stage.metrics[name]):
            return name, float(stage.metrics[name])
    raise UserError(
        f"{run.folder.name}: no training stage used validation images; there is nothing to choose "
        "by"
    )


def tell(choice: Choice) -> str:
    """What was chosen and what it was compared with, in one line.

    >>> scores = (({"lr": 0.1}, 0.5), ({"lr": 0.01}, 0.25))
    >>> tell(Choice({"name": "r", "pruner": "lwm"}, {"lr": 0.1}, "validation.accuracy", scores))
    'pruner lwm: lr 0.1 by validation.accuracy (lr 0.1: 50.0%, lr 0.01: 25.0%)'
    """

    def words(settings: Mapping[str, Any]) -> str:
        pairs = (f"{k} {format_setting(v)}" for k, v in settings.items() if k != "name")
        return ", ".join(pairs)

    compared = ", ".join(
        f"{words(values)}: {format_metric(Metric(score, unit='fraction'))}"
        for values, score in choice.scores
    )
    where = words(choice.others) or choice.others["name"]
    left = "; ".join(map(words, choice.unranked))
    left = f"; not ranked, with over 1 % of the images in doubt: {left}" if left else ""
    return f"{where}: {words(choice.chosen)} by {choice.metric} ({compared}){left}"
