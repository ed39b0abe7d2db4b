"""Commands on results: results, curve, clean."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prunekit.cli.group import (
    as_json,
    count,
    print_json,
)
from prunekit.errors import UserError, relative
from prunekit.store.layout import STORE

if TYPE_CHECKING:
    pass
if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from prunekit.results.comparison import Row


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default="runs")
@as_json
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("--layers", is_flag=True, help="Count the kept weights of every layer instead.")
@click.option("--choose", multiple=True, metavar="ADDRESS",
              help="Keep the value of this setting that is best on validation.")  # fmt: skip
def results(
    folder: Path, as_json: bool, as_csv: bool, layers: bool, choose: tuple[str, ...]
) -> None:
    """Compare all runs below FOLDER (mean and spread over seeds).

    With --choose finetune.optimizer.lr, say, only the rate stays that was best on the validation
    images, for each of the other settings: nothing is chosen by test results.
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
    from prunekit.cli.components import print_table
    from prunekit.store.records import find_runs

    rows = []
    for found in find_runs(folder):
        counts = {name: (n["kept"], n["weights"]) for name, n in found.layers.items()}
        counts["all"] = (sum(k for k, _ in counts.values()), sum(n for _, n in counts.values()))
        rows += [
            (relative(found.folder), name, f"{kept:,}", f"{n:,}", f"{1 - kept / n:.4%}")
            for name, (kept, n) in counts.items()
            if n
        ]
    print_table(("run", "layer", "kept", "weights", "sparsity"), rows)


def print_results(
    folder: Path, as_json: bool, as_csv: bool = False, addresses: tuple[str, ...] = ()
) -> None:
    from rich.console import Console

    from prunekit.results import tables
    from prunekit.results.choosing import choose, tell
    from prunekit.results.comparison import compare
    from prunekit.store.records import find_runs

    runs, choices = choose(find_runs(folder), addresses) if addresses else (find_runs(folder), [])
    rows = compare(runs)
    if as_json:
        told = tables.to_json(rows)
        if addresses:
            told["choices"] = [asdict(choice) for choice in choices]
        click.echo(json.dumps(told, indent=2, allow_nan=False))
        return
    if as_csv:
        click.echo(tables.to_csv(rows), nl=False)
    else:
        render(rows, Console())
    for choice in choices:
        click.echo(f"chosen for {tell(choice)}", err=as_csv)


def render(rows: Sequence[Row], console: Console) -> None:
    """Print the table and its notes; off a terminal the console becomes as wide as the table."""
    from rich import box
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    from prunekit.results import tables

    titles, *lines = tables.tabulate(rows, "+-" if console.options.ascii_only else "±")
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
    for note in tables.write_notes(rows):
        console.print(Text(note), soft_wrap=True)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("curve.png"),
              help="Picture to write: .png, .svg, .pdf.", show_default=True)  # fmt: skip
@as_json
def curve(runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Draw certified accuracy against the radius, of all runs in the folders RUNS."""
    from prunekit.results import curves

    found = curves.find_curves(runs)
    curves.draw(found, out)
    if as_json:
        print_json({"file": str(out), "curves": curves.to_json(found)})
    click.echo(f"in {relative(out)}", err=True)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default="runs")
@click.option("--store", type=click.Path(path_type=Path), envvar="PRUNEKIT_STORE",
              help="Folder of stage results; .stages in FOLDER by default.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be freed, and keep it.")
def clean(folder: Path, store: Path | None, dry_run: bool) -> None:
    """Free the stored stages that no run below FOLDER refers to."""
    from prunekit.store.records import find_runs
    from prunekit.store.stages import Store

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    root = store or folder / STORE
    used = {key for found in find_runs(folder) for key in found.keys}
    freed = Store(root).remove_unused(used, keep=dry_run)
    for key, size in freed:
        click.echo(f"{key}  {size / 1e6:.1f} MB")
    verb = "would be freed" if dry_run else "freed"
    click.echo(f"{sum(s for _, s in freed) / 1e6:.1f} MB {verb} ({count(len(freed), 'stage')})")
