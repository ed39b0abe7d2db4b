"""The results of many runs as rows of one table, each a mean over seeds."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunekit.contracts import Metric
from prunekit.results.columns import find_columns, find_plan, freeze, gather_settings
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

    `settings` are those that vary among the compared runs; None where they do not bear on this row,
    or where its runs differ.
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

    There is one row for each distinct result of an evaluate stage, averaged over seeds. Runs share
    it where all settings that it depends on are the same; those of later stages it has not. There
    is one more for every run that is not done or evaluated nothing. Where no setting tells two
    rows apart, the folder does.
    """
    told = gather_settings(runs)
    columns = find_columns(runs, told)
    shared: dict[tuple[str, ...], list[_Found]] = {}
    unfinished: list[_Found] = []
    for run, settings in zip(runs, told, strict=True):
        evaluations = [stage for stage in run.stages if stage.kind == "evaluate"]
        for stage in evaluations:
            bears = {"name": run.name, **settings.of(stage.name)}
            # Without a recipe nobody knows which settings a result depends on.
            same = freeze(bears if settings.before else run.name)
            own = {address: bears.get(address) for address in columns}
            measured = ((k, v) for k, v in stage.metrics.items() if isinstance(v, Metric))
            metrics = {name: Value(metric) for name, metric in measured if math.isfinite(metric)}
            known = (run.smoke, own, (run.seed,), metrics, (run.folder,))
            row = Row(stage.name, "done", *known, doubtful=find_doubtful([stage]))
            shared.setdefault((stage.name, stage.key, same), []).append(_Found(row, same, run))
        if run.status != "done" or not evaluations:
            bears = {"name": run.name, **settings.of("")}
            own = {address: bears.get(address) for address in columns}
            row = Row("", run.status, run.smoke, own, (run.seed,), {}, (run.folder,), run.error)
            unfinished.append(_Found(row, freeze([str(run.folder)]), run))
    results = [_join(found) for found in shared.values()]
    rows = [*_average_seeds(results), *(found.row for found in unfinished)]
    return _sort(_name_folders(rows, runs))


def _sort(rows: Sequence[Row]) -> list[Row]:
    values: dict[str, list[str]] = {}
    for row in rows:
        for address, value in row.settings.items():
            values.setdefault(address, []).append(freeze(value))
    stages = [*dict.fromkeys(row.stage for row in rows if row.stage), ""]

    def order(row: Row) -> tuple[Any, ...]:
        rank = {
            address: -1 if value is None else values[address].index(freeze(value))
            for address, value in row.settings.items()
        }
        dense = "sparsity" in row.metrics and not row.metrics["sparsity"].mean
        recipe = rank.pop("name", 0)
        return recipe, not dense, *rank.values(), stages.index(row.stage), row.seeds

    return sorted(rows, key=order)


@dataclass(frozen=True)
class _Found:
    """A row; rows with the `same` settings, shown or not, may be averaged; a run it is of."""

    row: Row
    same: str
    run: RunRecord


def _join(found: Sequence[_Found]) -> _Found:
    """The row of one stored result, from all runs that share it."""
    rows = [one.row for one in found]
    first = rows[0].settings
    settings = {
        a: v if all(row.settings[a] == v for row in rows) else None for a, v in first.items()
    }
    seeds = {row.seeds for row in rows}
    row = replace(
        rows[0],
        smoke=any(row.smoke for row in rows),
        settings=settings,
        # A result that runs of different seeds share does not depend on the seed.
        seeds=rows[0].seeds if len(seeds) == 1 else (),
        runs=tuple(folder for row in rows for folder in row.runs),
    )
    return replace(found[0], row=row)


def _average_seeds(found: Sequence[_Found]) -> list[Row]:
    """Make one row of those that differ only in the seed."""
    groups: dict[tuple[str, ...], list[_Found]] = {}
    for one in found:
        shown = freeze(one.row.settings)
        groups.setdefault((one.row.stage, str(one.row.smoke), shown, one.same), []).append(one)
    averaged: list[Row] = []
    for group in groups.values():
        by_plan: dict[Path, list[Row]] = {}
        for one in group:
            # A seed that occurs twice: the rows differ in something that no recipe says, which a
            # mean would hide.
            twice = len({seed for f in group for seed in f.row.seeds}) < len(group)
            plan = find_plan(one.run) if twice else Path()
            by_plan.setdefault(plan, []).append(one.row)
        for rows in by_plan.values():
            averaged += _merge_seeds(sorted(rows, key=lambda row: row.seeds))
    return averaged


def _merge_seeds(group: list[Row]) -> list[Row]:
    """One row for these, or themselves if there are several of a seed."""
    seeds = tuple(seed for row in group for seed in row.seeds)
    if not len(set(seeds)) == len(group) > 1:
        return group
    names = dict.fromkeys(name for row in group for name in row.metrics)
    metrics = {name: _average(name, group) for name in names}
    folders = tuple(folder for row in group for folder in row.runs)
    doubtful = tuple(dict.fromkeys(name for row in group for name in row.doubtful))
    return [replace(group[0], seeds=seeds, metrics=metrics, runs=folders, doubtful=doubtful)]


def _name_folders(rows: list[Row], runs: Sequence[RunRecord]) -> list[Row]:
    """The rows, with their folders among the settings if nothing else tells two of them apart."""
    labels = [(row.stage, row.smoke, freeze(row.settings)) for row in rows]
    if len(set(labels)) == len(rows):
        return rows
    root = os.path.commonpath([run.folder.parent for run in runs])

    def tell(row: Row) -> str | None:
        folder = os.path.relpath(os.path.commonpath(row.runs), root)
        return None if folder == "." else folder

    return [replace(row, settings={**row.settings, "folder": tell(row)}) for row in rows]


def _average(metric: str, rows: Sequence[Row]) -> Value:
    values = [row.metrics[metric] for row in rows if metric in row.metrics]
    if len(values) == 1:
        return values[0]
    means = [value.mean for value in values]
    told = {key: getattr(means[0], key) for key in ("unit", "kind", "note")}
    mean = Metric(statistics.fmean(means), **told)
    return Value(mean, statistics.stdev(means), len(means))
