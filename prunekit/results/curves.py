"""Certified accuracy as a function of the radius, from the records of finished runs."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.errors import UserError, relative
from prunekit.report import Tell
from prunekit.results.comparison import Row, compare
from prunekit.results.metrics import format_setting
from prunekit.store.files import read_npz, write_bytes
from prunekit.store.layout import RECORDS
from prunekit.store.records import find_runs


@dataclass(frozen=True)
class Curve:
    """The fraction of `images` images that are correct and certified, for every radius.

    `radii` (R,) are ascending, in pixel units of [0, 1]; `accuracy` (R + 1,) starts with the one at
    radius 0, and `accuracy[i + 1]` is the one beyond `radii[i]`.
    """

    label: str
    images: int
    radii: np.ndarray
    accuracy: np.ndarray


def trace(label: str, radius: np.ndarray, correct: np.ndarray) -> Curve:
    """The curve of images with certified radii (N,), of which only the `correct` (N,) count.

    >>> curve = trace("", np.array([0.5, 0.2, 0.5, 0.9]), np.array([True, True, True, False]))
    >>> curve.radii.tolist(), curve.accuracy.tolist()
    ([0.2, 0.5], [0.75, 0.5, 0.0])
    """
    radii, counts = np.unique(radius[correct], return_counts=True)
    left = counts.sum() - np.concatenate([[0], counts.cumsum()])
    return Curve(label, len(correct), radii, left / len(correct))


def find_curves(folders: Sequence[Path], tell: Tell | None = None) -> list[Curve]:
    """A curve for each row of the comparison that has radii, over the images of all its seeds.

    Runs that cannot be read are told (`find_runs`). Raises `UserError` if no evaluator recorded
    `radius` and `correct`, or if the records of one cannot be read.
    """
    runs = {run.folder.resolve(): run for folder in folders for run in find_runs(folder, tell)}
    rows = [row for row in compare(list(runs.values())) if row.stage]
    curves = [curve for row in rows for curve in _read_row(row)]
    if not curves:
        raise UserError(
            f"no run in {', '.join(map(relative, folders))} has certified radii; certify one with: "
            "prunekit eval RUN --with certify"
        )
    return curves


def _read_row(row: Row) -> Iterator[Curve]:
    """The curves of a result, one for each evaluator that recorded radii."""
    settings = {a.rpartition(".")[2]: v for a, v in row.settings.items() if v is not None}
    words = [row.stage, *(f"{name} {format_setting(value)}" for name, value in settings.items())]
    found: dict[str, list[np.ndarray]] = {}
    for folder in row.runs:
        for owner, pair in _read_radii(folder / RECORDS, row.stage):
            pairs = found.setdefault(owner, [])
            # Runs that share a result have copies of it, which count once.
            if not any(np.array_equal(pair, known) for known in pairs):
                pairs.append(pair)
    for owner, pairs in found.items():
        radius, correct = np.concatenate(pairs, axis=1)
        label = ", ".join([*words, owner] if len(found) > 1 else words)
        yield trace(label, radius, correct.astype(bool))


def _read_radii(file: Path, stage: str) -> Iterator[tuple[str, np.ndarray]]:
    """(evaluator, its radius and correct as (2, N)) of those in a stage that recorded both."""
    if not file.is_file():
        return
    records = read_npz(file)
    for key, radius in records.items():
        owner, _, what = key.rpartition(".")
        correct = records.get(f"{owner}.correct")
        if what == "radius" and owner.startswith(f"{stage}/") and correct is not None:
            listed = radius.ndim == 1 and radius.size and radius.shape == correct.shape
            numbers = all(values.dtype.kind in "buif" for values in (radius, correct))
            if not (listed and numbers and np.isfinite([radius, correct]).all()):
                raise UserError(f"{relative(file)} is damaged: {key} is no list of radii")
            yield owner.removeprefix(f"{stage}/"), np.stack([radius, correct.astype(bool)])


def draw(curves: Sequence[Curve], file: Path) -> None:
    """Write a figure of the curves, in the format of the file's suffix.

    Raises `UserError` for a suffix of no such format, and if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "figures need matplotlib, which is not installed; run: pip install matplotlib"
        ) from error

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    kind = file.suffix[1:].lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"{relative(file)} does not name a figure; end it in .png, .svg or .pdf")
    axes = figure.subplots()
    for curve in curves:
        radii = np.concatenate([[0.0], curve.radii])
        axes.step(radii, 100 * curve.accuracy, where="post", label=curve.label)
    axes.set(xlabel="radius (pixels in [0, 1])", ylabel="certified accuracy %", ylim=(0, 100))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=150)
    write_bytes(file, picture.getvalue())


def to_json(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """The curves as plain values for `json.dumps`."""
    return [
        {**vars(curve), "radii": curve.radii.tolist(), "accuracy": curve.accuracy.tolist()}
        for curve in curves
    ]
