"""The results of many runs as rows of one table, each a mean over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunekit.contracts import Metric
from prunekit.store.metrics import split_metric
from prunekit.store.records import RunRecord, StageRecord


@dataclass(frozen=True)
class Value:
    """A metric over seeds: mean and sample standard deviation (n - 1), None for a single seed.

    The interval and the number of images of `mean` are known only for a single seed.
    """

    mean: Metric
    sd: float | None = None
    seeds: int = 1


@dataclass(frozen=True)
class Row:
    """A result in the comparison, or a run without one (`stage` is empty then).

    `settings` are those that vary among the compared runs; None if the runs of this row differ.
    """

    stage: str
    status: str
    smoke: bool
    settings: Mapping[str, Any]
    seeds: tuple[int, ...]
    metrics: Mapping[str, Value]
    runs: tuple[Path, ...]
    error: str = ""
    doubtful: tuple[str, ...] = ()
    """Evaluators whose results are not to be ranked, of any seed (`Metric.doubtful`)."""


def find_doubtful(stages: Iterable[StageRecord]) -> tuple[str, ...]:
    """The evaluators whose results in these stages are not to be ranked."""
    metrics = [item for stage in stages for item in stage.metrics.items()]
    found = [k for k, v in metrics if isinstance(v, Metric) and v.doubtful]
    return tuple(dict.fromkeys(split_metric(name)[0] for name in found))


def compare(runs: Sequence[RunRecord]) -> list[Row]:
    """Make the rows of the comparison, dense networks first, then by settings as they appear.

    There is one row for each distinct result of an evaluate stage, which several runs may share,
    averaged over seeds; and one for every run that is not done or evaluated nothing.
    """
    columns = _find_varying(runs)
    shared: dict[tuple[str, str], list[tuple[RunRecord, StageRecord]]] = {}
    unfinished = []
    for run in runs:
        evaluations = [stage for stage in run.stages if stage.kind == "evaluate"]
        for stage in evaluations:
            shared.setdefault((stage.name, stage.key), []).append((run, stage))
        if run.status != "done" or not evaluations:
            own = _find_common([run], columns)
            where = (run.folder,)
            row = Row("", run.status, run.smoke, own, (run.seed,), {}, where, run.error)
            unfinished.append(row)
    results = [_make_row(pairs, columns) for pairs in shared.values()]
    stages = [*dict.fromkeys(row.stage for row in results), ""]

    def order(row: Row) -> tuple[Any, ...]:
        rank = {
            address: -1 if value is None else columns[address].index(freeze(value))
            for address, value in row.settings.items()
        }
        dense = "sparsity" in row.metrics and not row.metrics["sparsity"].mean
        recipe = rank.pop("name", 0)
        return recipe, not dense, *rank.values(), stages.index(row.stage), row.seeds

    return sorted(_average_seeds(results) + unfinished, key=order)


def freeze(value: Any) -> str:
    """The value as text that is the same for equal values; `json.loads` undoes it."""
    return json.dumps(value, sort_keys=True)


def _describe(run: RunRecord) -> dict[str, Any]:
    """The settings that distinguish a run, and the name of its recipe, but not its seed."""
    return {"name": run.name, **{k: v for k, v in run.settings.items() if k != "seed"}}


def _find_varying(runs: Iterable[RunRecord]) -> dict[str, list[str]]:
    """address -> its frozen values in order of first appearance, if there are several."""
    described = [_describe(run) for run in runs]
    addresses = dict.fromkeys(address for settings in described for address in settings)
    values = {a: list(dict.fromkeys(freeze(s.get(a)) for s in described)) for a in addresses}
    return {address: several for address, several in values.items() if len(several) > 1}


def _find_common(runs: Sequence[RunRecord], columns: Iterable[str]) -> dict[str, Any]:
    """address -> the value that all runs have, None if they differ."""
    first, *others = map(_describe, runs)
    same = {a for a in columns if all(other.get(a) == first.get(a) for other in others)}
    return {address: first.get(address) if address in same else None for address in columns}


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
        # A result that runs of different seeds share does not depend on the seed.
        seeds=tuple(seeds) if len(seeds) == 1 else (),
        metrics=_read_metrics(stage.metrics),
        runs=tuple(run.folder for run in runs),
        doubtful=find_doubtful([stage]),
    )


def _read_metrics(metrics: Mapping[str, Any]) -> dict[str, Value]:
    """The finite metrics of a stage."""
    found = {k: v for k, v in metrics.items() if isinstance(v, Metric) and math.isfinite(v)}
    return {name: Value(metric) for name, metric in found.items()}


def _average_seeds(rows: Iterable[Row]) -> list[Row]:
    """Make one row of those that differ only in the seed."""
    groups: dict[tuple[str, bool, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.stage, row.smoke, freeze(row.settings)), []).append(row)
    averaged: list[Row] = []
    for group in groups.values():
        group.sort(key=lambda row: row.seeds)
        seeds = tuple(seed for row in group for seed in row.seeds)
        # A seed that occurs twice: the rows differ in something else, which a mean would hide.
        if not len(set(seeds)) == len(group) > 1:
            averaged += group
            continue
        names = dict.fromkeys(name for row in group for name in row.metrics)
        metrics = {name: _average(name, group) for name in names}
        folders = tuple(folder for row in group for folder in row.runs)
        doubtful = tuple(dict.fromkeys(name for row in group for name in row.doubtful))
        one = replace(group[0], seeds=seeds, metrics=metrics, runs=folders, doubtful=doubtful)
        averaged.append(one)
    return averaged


def _average(metric: str, rows: Sequence[Row]) -> Value:
    values = [row.metrics[metric] for row in rows if metric in row.metrics]
    if len(values) == 1:
        return values[0]
    means = [value.mean for value in values]
    told = {key: getattr(means[0], key) for key in ("unit", "kind", "note")}
    mean = Metric(statistics.fmean(means), **told)
    return Value(mean, statistics.stdev(means), len(means))
