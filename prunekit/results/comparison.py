"""The results of many runs in one table: rows, with seeds folded."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunekit.results.metrics import is_part, split_metric
from prunekit.store.records import RunRecord, StageRecord


@dataclass(frozen=True)
class Value:
    """A metric over seeds: mean and sample standard deviation (n - 1); none for a single seed.

    `low`, `high` (the 95 % interval) and `images` are those of the one measurement of one seed.
    """

    mean: float
    sd: float | None = None
    seeds: int = 1
    low: float | None = None
    high: float | None = None
    images: float | None = None


@dataclass(frozen=True)
class Row:
    """A result of the comparison, or a run without one (`stage` is then empty).

    `settings` holds what varies among the compared runs, None where the row's runs differ.
    """

    stage: str
    status: str
    smoke: bool
    settings: Mapping[str, Any]
    seeds: tuple[int, ...]
    metrics: Mapping[str, Value]
    runs: tuple[Path, ...]
    error: str = ""


def compare(runs: Sequence[RunRecord]) -> list[Row]:
    """Make the rows of the comparison, dense networks first, then by settings as they appear.

    One row for each distinct result of an evaluate stage, which several runs may share, with seeds
    folded; and one for every run that is not done or that evaluated nothing.
    """
    columns = _find_varying(runs)
    shared: dict[tuple[str, str], list[tuple[RunRecord, StageRecord]]] = {}
    lone = []
    for run in runs:
        evaluations = [stage for stage in run.stages if stage.kind == "evaluate"]
        for stage in evaluations:
            shared.setdefault((stage.name, stage.key), []).append((run, stage))
        if run.status != "done" or not evaluations:
            own = _find_common([run], columns)
            where = (run.folder,)
            lone.append(Row("", run.status, run.smoke, own, (run.seed,), {}, where, run.error))
    results = [_make_row(pairs, columns) for pairs in shared.values()]
    stages = [*dict.fromkeys(row.stage for row in results), ""]

    def order(row: Row) -> tuple[Any, ...]:
        rank = {
            address: -1
            if row.settings[address] is None
            else values.index(_freeze(row.settings[address]))
            for address, values in columns.items()
        }
        dense = "sparsity" in row.metrics and row.metrics["sparsity"].mean == 0
        recipe = rank.pop("name", 0)
        return recipe, not dense, *rank.values(), stages.index(row.stage), row.seeds

    return sorted(_fold_seeds(results) + lone, key=order)


def _describe(run: RunRecord) -> dict[str, Any]:
    """The settings that tell a run from others, its recipe's name among them, seeds apart."""
    settings = {"name": run.name, **run.settings}
    settings.pop("seed", None)
    return settings


def _freeze(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _find_varying(runs: Iterable[RunRecord]) -> dict[str, list[str]]:
    """address -> its frozen values in order of first appearance, where there are several."""
    described = [_describe(run) for run in runs]
    addresses = dict.fromkeys(address for settings in described for address in settings)
    values = {a: list(dict.fromkeys(_freeze(s.get(a)) for s in described)) for a in addresses}
    return {address: several for address, several in values.items() if len(several) > 1}


def _find_common(runs: Sequence[RunRecord], columns: Iterable[str]) -> dict[str, Any]:
    first, *others = map(_describe, runs)
    return {
        address: first.get(address)
        if all(other.get(address) == first.get(address) for other in others)
        else None
        for address in columns
    }


def _make_row(pairs: Sequence[tuple[RunRecord, StageRecord]], columns: Iterable[str]) -> Row:
    """The row of one stored result, from all runs that share it."""
    runs = [run for run, _ in pairs]
    stage = pairs[0][1]
    seeds = {run.seed for run in runs}
    return Row(
        stage=stage.name,
        status="done",
        smoke=any(run.smoke for run in runs),
        settings=_find_common(runs, columns),
        # A result that runs of different seeds share belongs to none of them.
        seeds=tuple(seeds) if len(seeds) == 1 else (),
        metrics=_read_metrics(stage.metrics),
        runs=tuple(run.folder for run in runs),
    )


def _read_metrics(metrics: Mapping[str, Any]) -> dict[str, Value]:
    """The numbers of a stage, each with its interval and number of images where it has them."""
    numbers = {
        name: value
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    values = {}
    for name, number in numbers.items():
        if not is_part(name):
            owner, _ = split_metric(name)
            images = numbers.get(f"{owner}.n" if owner else "n")
            low, high = numbers.get(f"{name}_low"), numbers.get(f"{name}_high")
            values[name] = Value(number, low=low, high=high, images=images)
    return values


def _fold_seeds(rows: Iterable[Row]) -> list[Row]:
    """Make one row of those that differ in nothing but the seed."""
    groups: dict[tuple[str, bool, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.stage, row.smoke, _freeze(row.settings)), []).append(row)
    folded: list[Row] = []
    for group in groups.values():
        seeds = [seed for row in group for seed in row.seeds]
        # The same seed twice: something else differs that is no setting. A mean would hide it.
        if len(set(seeds)) == len(group) > 1:
            group.sort(key=lambda row: row.seeds)
            names = dict.fromkeys(name for row in group for name in row.metrics)
            folded.append(
                replace(
                    group[0],
                    seeds=tuple(sorted(seeds)),
                    metrics={name: _average(name, group) for name in names},
                    runs=tuple(folder for row in group for folder in row.runs),
                )
            )
        else:
            folded += group
    return folded


def _average(metric: str, rows: Sequence[Row]) -> Value:
    values = [row.metrics[metric] for row in rows if metric in row.metrics]
    if len(values) == 1:
        return values[0]
    means = [value.mean for value in values]
    return Value(statistics.fmean(means), statistics.stdev(means), len(means))
