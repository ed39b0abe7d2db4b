"""The comparison as a table, as JSON, as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from prunekit.contracts import Metric
from prunekit.errors import relative
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
            *(format_setting(row.settings[address]) for address in addresses),
            *[",".join(map(str, row.seeds)) or "-"] * seeds,
            *(fill(metric, row) for metric in metrics),
            *[f"{row.status}, SMOKE" if row.smoke else row.status] * marks,
        ]
        for row in rows
    ]
    return [titles + ["status"] * marks, *cells]


def _list_metrics(rows: Sequence[Row], kind: str) -> list[str]:
    """Names of metrics of a kind in order of first appearance, the network's sparsity first."""
    names = dict.fromkeys(
        name for row in rows for name, v in row.metrics.items() if v.mean.kind == kind
    )
    return sorted(names, key=lambda name: name != "sparsity")


def write_notes(rows: Sequence[Row]) -> list[str]:
    """Lines for below the table: failed runs, and what limits the meaning of its numbers."""
    notes = [
        f"{relative(row.runs[0])}: {row.status}" + (f": {row.error}" if row.error else "")
        for row in rows
        if not row.stage
    ]
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
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
