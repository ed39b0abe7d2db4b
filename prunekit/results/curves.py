"""Certified accuracy as a function of the radius, from the records of finished runs."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.errors import UserError, relative
from prunekit.results.comparison import Row, compare
from prunekit.results.metrics import format_setting
from prunekit.store.files import write_bytes
from prunekit.store.layout import RECORDS
from prunekit.store.records import find_runs


@dataclass(frozen=True)
class Curve:
    """The part of `images` images that is right and certified, for every radius.

    It is `accuracy[0]` at radius 0 and falls right behind `radii[i]`, ascending, to
    `accuracy[i + 1]`, at last to 0.
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


def find_curves(folders: Sequence[Path]) -> list[Curve]:
    """A curve for each row of the comparison that has radii, over the images of all its seeds.

    Raises `UserError` where no evaluator left the records `radius` and `correct`.
    """
    runs = {run.folder.resolve(): run for folder in folders for run in find_runs(folder)}
    rows = [row for row in compare(list(runs.values())) if row.stage]
    curves = [curve for row in rows for curve in _read_row(row)]
    if not curves:
        raise UserError(
            f"no run in {', '.join(map(relative, folders))} has certified radii; judge one with: "
            "prunekit eval RUN --with certify"
        )
    return curves


def _read_row(row: Row) -> Iterator[Curve]:
    """The curves of a result, one for each evaluator that recorded radii."""
    settings = {a.rpartition(".")[2]: v for a, v in row.settings.items() if v is not None}
    words = [row.stage, *(f"{name} {format_setting(value)}" for name, value in settings.items())]
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for folder in row.runs:
        for owner, pair in _read_radii(folder / RECORDS, row.stage):
            # Runs that share a result hold copies of it, which count once.
            if not any(np.array_equal(pair, known) for known in found.setdefault(owner, [])):
                found[owner].append(pair)
    for owner, pairs in found.items():
        radius, correct = (np.concatenate(part) for part in zip(*pairs, strict=True))
        yield trace(", ".join([*words, *[owner] * (len(found) > 1)]), radius, correct)


def _read_radii(file: Path, stage: str) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """(evaluator, (radius, correct)) of a stage's evaluators that recorded both."""
    if not file.is_file():
        return
    with np.load(file, allow_pickle=False) as records:
        for key in records.files:
            owner, _, what = key.rpartition(".")
            if what == "radius" and owner.startswith(f"{stage}/") and f"{owner}.correct" in records:
                yield (
                    owner.removeprefix(f"{stage}/"),
                    (records[key], records[f"{owner}.correct"]),
                )


def draw(curves: Sequence[Curve], file: Path) -> None:
    """Write a picture of the curves, in the format that the file's name ends with.

    Raises `UserError` for a name that is of no picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    kind, kinds = file.suffix[1:].lower(), figure.canvas.get_supported_filetypes()
    if kind not in kinds:
        raise UserError(f"{relative(file)} is no picture's name; end it in .png, .svg or .pdf")
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
        {
            "label": curve.label,
            "images": curve.images,
            "radii": curve.radii.tolist(),
            "accuracy": curve.accuracy.tolist(),
        }
        for curve in curves
    ]
