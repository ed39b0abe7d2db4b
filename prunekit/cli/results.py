"""Commands on results: results, curve, clean."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prunekit.cli import group
from prunekit.errors import UserError, printable, relative
from prunekit.store.layout import STORE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from prunekit.results.comparison import Row
    from prunekit.store.records import RunRecord


@click.command()
@click.argument("folder", type=group.PATH, default="runs")
@group.as_json
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("--layers", is_flag=True, help="Count the kept weights of every layer instead.")
@click.option(
    "--choose", multiple=True, metavar="ADDRESS", help="Keep the value that is best on validation."
)
def results(
    folder: Path, as_json: bool, as_csv: bool, layers: bool, choose: tuple[str, ...]
) -> None:
    """Compare all runs below FOLDER (mean and spread over seeds).

    For example, --choose finetune.optimizer.lr keeps, for every combination of the other settings,
    only the learning rate that was best on the validation images. Test results play no part, but
    values with results marked ! are not ranked.
    """
    if as_json + as_csv + layers > 1:
        raise click.UsageError("--json, --csv and --layers exclude each other")
    if layers and choose:
        raise click.UsageError("--layers counts the weights of all runs; leave --choose out")
    if layers:
        _print_layers(folder)
    else:
        print_results(folder, as_json, as_csv, choose)


def _print_layers(folder: Path) -> None:
    from prunekit.store.records import find_runs

    rows = []
    for found in find_runs(folder, group.warn):
        counts = {name: (n["kept"], n["weights"]) for name, n in found.layers.items()}
        counts["all"] = (sum(k for k, _ in counts.values()), sum(n for _, n in counts.values()))
        rows += [
            (relative(found.folder), name, f"{kept:,}", f"{n:,}", f"{1 - kept / n:.4%}")
            for name, (kept, n) in counts.items()
            if n
        ]
    group.print_table(("run", "layer", "kept", "weights", "sparsity"), rows)


def print_results(
    folder: Path, as_json: bool, as_csv: bool = False, addresses: tuple[str, ...] = ()
) -> None:
    """Print the comparison of all runs below a folder as a table, JSON or CSV.

    `addresses` are settings of which only the value that is best on validation is kept.
    """
    from rich.console import Console

    from prunekit.results import tables
    from prunekit.results.choosing import choose, tell
    from prunekit.results.comparison import compare
    from prunekit.store.records import find_runs, tell_changed

    found = find_runs(folder, group.warn)
    runs, choices = choose(found, addresses) if addresses else (found, [])
    for text in (text for run in found for text in tell_changed(run.folder)):
        group.warn(text)
    rows = compare(runs)
    if as_json:
        chosen = {"choices": [asdict(choice) for choice in choices]} if addresses else {}
        group.print_json({**tables.to_json(rows), **chosen})
        return
    if as_csv:
        group.echo(tables.to_csv(rows), end="")
    else:
        print_comparison(rows, Console(file=group.stdout()))
        for text in _tell_ended(runs):
            group.echo(text)
    for choice in choices:
        group.echo(f"chosen for {tell(choice)}", err=as_csv)


def _tell_ended(runs: Sequence[RunRecord]) -> list[str]:
    """Which stages ended early and why, once for all runs of which that is true."""
    told: dict[str, list[str]] = {}
    for run in runs:
        for stage in run.stages:
            if reason := stage.metrics.get("ended"):
                text = f"stage {stage.name!r} ended early: {reason}"
                told.setdefault(text, []).append(relative(run.folder))
    more = {t: f" and {len(folders) - 1} more" * (len(folders) > 1) for t, folders in told.items()}
    return [f"{folders[0]}{more[text]}: {text}" for text, folders in told.items()]


def print_comparison(rows: Sequence[Row], console: Console) -> None:
    """Print the table of the comparison and the notes below it.

    Where the table is wider than the terminal, its columns go into several, one below the other.
    """
    from rich import box
    from rich.text import Text

    from prunekit.results import tables

    cells = tables.tabulate(rows, "+-" if console.options.ascii_only else "±")
    width = group.width_of(console)
    # The stage, the settings and the seeds say which row it is.
    labels = 1 + len({address for row in rows for address in row.settings}) + ("seed" in cells[0])
    blocks = tables.split(cells, labels, width) if width else [cells]
    for titles, *lines in blocks:
        group.print_table(titles, lines, console, box=box.SIMPLE_HEAD, whole=len(titles))
    for note in tables.write_notes(rows):
        console.print(Text(printable(note, keep="")), soft_wrap=True)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=group.PATH)
@click.option(
    "--out", type=group.PATH, default="curve.png", show_default=True, help=".png, .svg or .pdf."
)
@group.as_json
def curve(runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Plot certified accuracy against the radius, for all runs in the folders RUNS."""
    from prunekit.results import curves

    found = curves.find_curves(runs, group.warn)
    curves.draw(found, out)
    if as_json:
        group.print_json({"file": str(out), "curves": curves.to_json(found)})
    group.warn(f"in {relative(out)}")


@click.command()
@click.argument("folder", type=group.PATH, default="runs")
@group.store_option
@click.option("--dry-run", is_flag=True, help="Print what would be deleted, and keep it.")
def clean(folder: Path, store: Path | None, dry_run: bool) -> None:
    """Delete the stored stages that no run below FOLDER uses."""
    from prunekit.store.records import find_runs
    from prunekit.store.stages import Store

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    # Not without those that cannot be read: their stages would be deleted.
    used = {key for found in find_runs(folder) for key in found.keys}
    freed = Store(store or folder / STORE).remove_unused(used, keep=dry_run)
    for key, size in freed:
        group.echo(f"{key}  {size / 1e6:.1f} MB")
    verb = "would be freed" if dry_run else "freed"
    group.echo(
        f"{sum(s for _, s in freed) / 1e6:.1f} MB {verb} ({group.count(len(freed), 'stage')})"
    )
