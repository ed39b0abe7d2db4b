"""The results of many runs in one table: reads run folders, folds seeds, renders."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.errors import UserError, relative

if TYPE_CHECKING:
    from rich.console import Console

FILE = "run.json"
FORMAT = 1
"""The version of `run.json` that is read."""
SCHEMA_VERSION = 1
"""The version of what `to_json` returns."""
FRACTIONS = {"abstained", "accuracy", "certified", "fraction", "rate", "sparsity", "verified"}
"""A metric with one of these words in its name, the evaluator's apart, is shown in percent."""
DIAGNOSTICS = {"zero_gradient"}
"""Numbers that say how far to trust a metric; not columns of the table."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run; `key` is the hash under which its result is stored."""

    name: str
    kind: str
    key: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What `run.json` says of a run; `settings` maps addresses ("prune.sparsity") to values."""

    folder: Path
    name: str
    status: str
    smoke: bool
    seed: int
    settings: Mapping[str, Any]
    stages: tuple[Stage, ...]
    error: str = ""


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


def find_runs(folder: Path) -> list[Run]:
    """Read all runs in the folder and below, hidden folders apart; numbers in names sort as such.

    Raises `UserError` for a folder that is not there and for a `run.json` that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{relative(folder)}: there is no such folder")
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if FILE in files:
            found.append(Path(parent))
    return [read_run(path) for path in sorted(found, key=_sort_naturally)]


def _sort_naturally(path: Path) -> list[list[str | float]]:
    def split(part: str) -> list[str | float]:
        pieces = re.split(r"(\d+(?:\.\d+)?)", part)
        return [float(p) if i % 2 else p for i, p in enumerate(pieces)]

    return [split(part) for part in path.parts]


def read_run(folder: Path) -> Run:
    """Read the `run.json` of a run's folder; `UserError` names a file that is not one."""
    path = folder / FILE
    where = relative(path)
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read ({error}); run the recipe again") from error
    if not isinstance(told, dict) or "format" not in told:
        raise UserError(f"{where}: not the record of a run; prunekit's have a 'format'")
    if told["format"] != FORMAT:
        raise UserError(
            f"{where}: has format {told['format']!r}, this prunekit reads {FORMAT}; use the "
            "version that wrote it"
        )
    try:
        return Run(
            folder=folder,
            name=told["name"],
            status=told["status"],
            smoke=bool(told["smoke"]),
            seed=int(told["seed"]),
            settings=dict(told["settings"]),
            stages=tuple(
                Stage(s["name"], s["kind"], s["key"], dict(s.get("metrics") or {}))
                for s in told["stages"]
            ),
            error=told.get("error") or "",
        )
    except KeyError as error:
        raise UserError(f"{where}: lacks {error}; run the recipe again") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: is damaged ({error}); run the recipe again") from error


def compare(runs: Sequence[Run]) -> list[Row]:
    """Make the rows of the comparison, dense networks first, then by settings as they appear.

    One row for each distinct result of an evaluate stage, which several runs may share, with seeds
    folded; and one for every run that is not done or that evaluated nothing.
    """
    columns = _find_varying(runs)
    shared: dict[tuple[str, str], list[tuple[Run, Stage]]] = {}
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


def _describe(run: Run) -> dict[str, Any]:
    """The settings that tell a run from others, its recipe's name among them, seeds apart."""
    settings = {"name": run.name, **run.settings}
    settings.pop("seed", None)
    return settings


def _freeze(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _find_varying(runs: Iterable[Run]) -> dict[str, list[str]]:
    """address -> its frozen values in order of first appearance, where there are several."""
    described = [_describe(run) for run in runs]
    addresses = dict.fromkeys(address for settings in described for address in settings)
    values = {a: list(dict.fromkeys(_freeze(s.get(a)) for s in described)) for a in addresses}
    return {address: several for address, several in values.items() if len(several) > 1}


def _find_common(runs: Sequence[Run], columns: Iterable[str]) -> dict[str, Any]:
    first, *others = map(_describe, runs)
    return {
        address: first.get(address)
        if all(other.get(address) == first.get(address) for other in others)
        else None
        for address in columns
    }


def _make_row(pairs: Sequence[tuple[Run, Stage]], columns: Iterable[str]) -> Row:
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
        if not _is_part(name):
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


def split_metric(metric: str) -> tuple[str, str]:
    """(evaluator, what it measured); the evaluator is empty for what is of the network itself.

    >>> split_metric("certify.certified@0.25")
    ('certify', 'certified@0.25')
    """
    # A dot before a digit is a decimal point.
    *owner, measure = re.split(r"\.(?!\d)", metric)
    return ".".join(owner), measure


def _is_part(metric: str) -> bool:
    return metric.endswith(("_low", "_high")) or split_metric(metric)[1] == "n"


def _is_diagnosis(metric: str) -> bool:
    return split_metric(metric)[1] in DIAGNOSTICS


def is_main(metric: str) -> bool:
    """Whether a metric is a result by itself, not the interval, n or diagnosis of another.

    >>> [is_main(name) for name in ("pgd.accuracy", "pgd.accuracy_low", "pgd.n")]
    [True, False, False]
    """
    return not _is_part(metric) and not _is_diagnosis(metric)


def is_fraction(metric: str) -> bool:
    """Whether the name says that the metric is a fraction, to be shown in percent.

    >>> [is_fraction(name) for name in ("certify.certified@0.25", "certify.acr")]
    [True, False]
    """
    return not FRACTIONS.isdisjoint(re.split(r"[^a-z]+", split_metric(metric)[1]))


def format_metric(metric: str, value: float, unit: str = "%") -> str:
    """The value as people read it: percent for fractions, four digits for others.

    >>> format_metric("pgd.accuracy", 0.714), format_metric("loss", 0.123456)
    ('71.4%', '0.1235')
    """
    if is_fraction(metric):
        # Sparsities are close to 1, where a tenth of a percent is much.
        return f"{100 * value:.{2 if metric.endswith('sparsity') else 1}f}{unit}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def format_setting(value: Any) -> str:
    """A recipe's value in short; a component with its options in brackets.

    >>> format_setting(0.9), format_setting({"use": "snip", "batches": 2})
    ('0.9', 'snip(batches=2)')
    """
    if isinstance(value, Mapping):
        options = [f"{k}={format_setting(v)}" for k, v in value.items() if k != "use"]
        return str(value.get("use", "")) + (f"({', '.join(options)})" if options else "")
    if isinstance(value, list):
        return ", ".join(map(format_setting, value))
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)


def tabulate(rows: Sequence[Row], plus_minus: str = "±") -> list[list[str]]:
    """The cells of the table as text, titles first; "-" where there is nothing to say."""
    addresses = dict.fromkeys(address for row in rows for address in row.settings)
    metrics = _list_metrics(rows, is_main)
    seeds = len({row.seeds for row in rows if row.seeds}) > 1 or any(len(r.seeds) > 1 for r in rows)
    marks = any(row.smoke or row.status != "done" for row in rows)
    taken = [a.rpartition(".")[2] for a in addresses] + [*metrics, "stage", "seed", "status"]

    def shorten(address: str) -> str:
        last = address.rpartition(".")[2]
        return last if taken.count(last) == 1 else address.replace(".", "\n")

    def entitle(metric: str) -> str:
        return "\n".join(split_metric(metric)).lstrip() + (" %" if is_fraction(metric) else "")

    def fill(metric: str, row: Row) -> str:
        value = row.metrics.get(metric)
        if value is None:
            return "-"
        text = format_metric(metric, value.mean, unit="")
        # The same sparsity in every seed is how it should be, and needs no room.
        if value.sd is not None and (value.sd or metric != "sparsity"):
            fraction = is_fraction(metric)
            sd = format_metric(metric, value.sd, unit="") if fraction else f"{value.sd:.2g}"
            text += f" {plus_minus} {sd}"
        return text + (f" ({value.seeds})" if value.seeds < len(row.seeds) else "")

    titles = ["stage", *map(shorten, addresses), *["seed"] * seeds, *map(entitle, metrics)]
    cells = [
        [
            row.stage or "-",
            *(format_setting(row.settings[address]) for address in addresses),
            *[",".join(map(str, row.seeds)) or "-"] * seeds,
            *(fill(metric, row) for metric in metrics),
            *[f"{row.status}, SMOKE" if row.smoke else row.status] * marks,
        ]
        for row in rows
    ]
    return [titles + ["status"] * marks, *cells]


def _list_metrics(rows: Sequence[Row], wanted: Callable[[str], bool]) -> list[str]:
    """Names of metrics in order of first appearance, the network's sparsity first."""
    names = dict.fromkeys(name for row in rows for name in row.metrics if wanted(name))
    return sorted(names, key=lambda name: name != "sparsity")


def write_notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the table has to know besides its numbers."""
    notes = [
        f"{relative(row.runs[0])}: {row.status}" + (f": {row.error}" if row.error else "")
        for row in rows
        if not row.stage
    ]
    for name in _list_metrics(rows, _is_diagnosis):
        most = max(row.metrics[name].mean for row in rows if name in row.metrics)
        if most > 0:
            notes.append(f"{name} is up to {most:.4g}: without gradients attacks find too little")
    if any(row.smoke for row in rows):
        notes.append("SMOKE: runs cut short to try them out; their numbers mean nothing")
    return notes


def render(rows: Sequence[Row], console: Console) -> None:
    """Print the table and its notes; off a terminal the console becomes as wide as the table."""
    from rich import box
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    titles, *lines = tabulate(rows, "+-" if console.options.ascii_only else "±")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for place, title in enumerate(titles):
        number = any(line[place][0].isdigit() for line in lines)
        table.add_column(Text(title), justify="right" if number else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    if not console.is_terminal:
        endless = console.options.update(max_width=100_000)
        console.width = max(console.width, Measurement.get(console, endless, table).maximum)
    console.print(table)
    for note in write_notes(rows):
        console.print(Text(note), soft_wrap=True)


def to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows as plain values for `json.dumps`; `schema_version` changes when their shape does."""
    plain = [{**asdict(row), "runs": [str(folder) for folder in row.runs]} for row in rows]
    return {"schema_version": SCHEMA_VERSION, "rows": plain}


def to_csv(rows: Sequence[Row]) -> str:
    """The rows with full precision: of each metric the mean, `_sd` and `_seeds`, their number."""
    records = []
    for row in rows:
        record: dict[str, Any] = {
            "stage": row.stage,
            "status": row.status,
            "smoke": json.dumps(row.smoke),
            "seeds": " ".join(map(str, row.seeds)),
            "runs": ";".join(map(str, row.runs)),
            "error": row.error,
        }
        for address, setting in row.settings.items():
            record[address] = None if setting is None else format_setting(setting)
        for name, value in row.metrics.items():
            record |= {name: value.mean, f"{name}_sd": value.sd, f"{name}_seeds": value.seeds}
        records.append(record)
    text = io.StringIO()
    names = dict.fromkeys(name for record in records for name in record)
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
