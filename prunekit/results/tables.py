"""The comparison as a table, as JSON, as CSV."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunekit.contracts import Metric
from prunekit.errors import printable, relative
from prunekit.results.comparison import Row
from prunekit.results.metrics import format_metric, format_setting, is_fraction
from prunekit.store.metrics import split_metric

DOUBT = " !"
"""Marks results that are not to be ranked."""


def tabulate(rows: Sequence[Row], plus_minus: str = "±") -> list[list[str]]:
    """The cells of the table as text, titles first; "-" if there is no value."""
    addresses = dict.fromkeys(address for row in rows for address in row.settings)
    metrics = _list_metrics(rows, "result")
    seeds = len({row.seeds for row in rows if row.seeds}) > 1 or any(len(r.seeds) > 1 for r in rows)
    marks = any(row.smoke or row.status != "done" for row in rows)
    taken = [a.rpartition(".")[2] for a in addresses] + [*metrics, "stage", "seed", "status"]

    def shorten(address: str) -> str:
        last = address.rpartition(".")[2]
        return last if taken.count(last) == 1 else address.replace(".", "\n")

    def entitle(metric: str) -> str:
        values = (row.metrics[metric].mean for row in rows if metric in row.metrics)
        percent = " %" if any(map(is_fraction, values)) else ""
        return "\n".join(split_metric(metric)).lstrip() + percent

    def fill(metric: str, row: Row) -> str:
        value = row.metrics.get(metric)
        if value is None:
            return "-"
        text = format_metric(value.mean, unit="")
        # The sparsity is normally the same for every seed, so a deviation of 0 is left out.
        if value.sd is not None and (value.sd or metric != "sparsity"):
            spread = Metric(value.sd, unit=value.mean.unit)
            sd = format_metric(spread, unit="") if is_fraction(spread) else f"{value.sd:.2g}"
            text += f" {plus_minus} {sd}"
        text += DOUBT if split_metric(metric)[0] in row.doubtful else ""
        return text + (f" ({value.seeds})" if value.seeds < len(row.seeds) else "")

    titles = ["stage", *map(shorten, addresses), *["seed"] * seeds, *map(entitle, metrics)]
    cells = [
        [
            row.stage or "-",
            *(_show(row.settings[address]) for address in addresses),
            *[",".join(map(str, row.seeds)) or "-"] * seeds,
            *(fill(metric, row) for metric in metrics),
            *[f"{row.status}, SMOKE" if row.smoke else row.status] * marks,
        ]
        for row in rows
    ]
    return [titles + ["status"] * marks, *cells]


def _show(setting: Any) -> str:
    """A setting as short as a person would write it."""
    if isinstance(setting, float) and len(str(setting)) > 8 and not 255 * setting % 1:
        return f"{255 * setting:.0f}/255"
    if isinstance(setting, str) and setting.startswith(os.sep):
        return relative(Path(setting))
    return format_setting(setting)


GAP = 2
"""Spaces between two columns; half as many at each edge."""


def split(cells: Sequence[Sequence[str]], labels: int, width: int) -> list[list[list[str]]]:
    """The columns of a table in blocks of at most `width` characters, all rows in each.

    Every block starts with the first `labels` columns, or with the number of the row where these
    take more than half the width. Nothing is left out or cut: a wider column has its own block.
    """
    from rich.cells import cell_len

    columns = [list(column) for column in zip(*cells, strict=True)]

    def measure(column: Sequence[str]) -> int:
        return GAP + max(cell_len(line) for cell in column for line in cell.split("\n"))

    if sum(map(measure, columns)) <= width:
        return [[list(row) for row in cells]]
    first = columns[:labels]
    if 2 * sum(map(measure, first)) > width:
        first, labels = [["row", *(str(n) for n in range(1, len(cells)))]], 0
    blocks, left = [list(first)], width - sum(map(measure, first))
    for column in columns[labels:]:
        if measure(column) > left and len(blocks[-1]) > len(first):
            blocks.append(list(first))
            left = width - sum(map(measure, first))
        blocks[-1].append(column)
        left -= measure(column)
    return [[list(row) for row in zip(*block, strict=True)] for block in blocks]


def _list_metrics(rows: Sequence[Row], kind: str) -> list[str]:
    """Names of metrics of a kind in order of first appearance, the network's sparsity first."""
    names = dict.fromkeys(
        name for row in rows for name, v in row.metrics.items() if v.mean.kind == kind
    )
    return sorted(names, key=lambda name: name != "sparsity")


def write_notes(rows: Sequence[Row]) -> list[str]:
    """Lines for below the table: failed runs, and what limits the meaning of its numbers."""
    unfinished: dict[str, list[str]] = {}
    for row in rows:
        if not row.stage:
            told = f"{row.status}: {row.error}" if row.error else row.status
            unfinished.setdefault(told, []).append(relative(row.runs[0]))
    notes = []
    for told, folders in unfinished.items():
        more = f" and {len(folders) - 1} more" if len(folders) > 1 else ""
        notes.append(f"{folders[0]}{more}: {told}")
    for name in _list_metrics(rows, "diagnosis"):
        most = max(row.metrics[name].mean for row in rows if name in row.metrics)
        if most > 0:
            images = f"up to {float(most):.4g} images of a network"
            notes.append(f"{split_metric(name)[0]}: {images} {most.note}")
    if any(row.doubtful for row in rows):
        notes.append(f"{DOUBT.strip()}: so for over 1 % of the images, which is not to be ranked")
    for name in _list_metrics(rows, "setting"):
        for mean in (row.metrics[name].mean for row in rows if name in row.metrics):
            if mean.note and mean < 1:
                notes.append(f"{split_metric(name)[0]}: {mean.note}")
                break
    if any(row.smoke for row in rows):
        notes.append("SMOKE: runs shortened to try a recipe; their numbers mean nothing")
    return notes


def to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows as plain values for `json.dumps`."""

    def plain(row: Row) -> dict[str, Any]:
        metrics = {}
        for name, value in row.metrics.items():
            told = vars(value.mean) | {"images": value.mean.n}
            del told["n"], told["note"]
            metrics[name] = {**vars(value), "mean": float(value.mean), **told}
        return {**vars(row), "metrics": metrics, "runs": list(map(str, row.runs))}

    return {"rows": [plain(row) for row in rows]}


def to_csv(rows: Sequence[Row]) -> str:
    """The rows with full precision; of each metric the mean, `_sd` and `_seeds` (their number)."""
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
        if row.doubtful:
            record["doubtful"] = " ".join(row.doubtful)
        records.append(record)
    text = io.StringIO()
    names = dict.fromkeys(name for record in records for name in record)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_to_cell, names))
    writer.writerows([_to_cell(record.get(name)) for name in names] for record in records)
    return text.getvalue()


FORMULA = (*"=+-@", *"\uff1d\uff0b\uff0d\uff20")
"""How text begins that a spreadsheet computes; full-width characters too."""


def _to_cell(value: Any) -> Any:
    """A cell in one line; text that a spreadsheet would compute as a formula gets a quote."""
    if not isinstance(value, str):
        return value
    text = printable(value, keep="")
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.lstrip().startswith(FORMULA) else text
    return text
