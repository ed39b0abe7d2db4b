"""Commands on networks rather than recipes: import, export, eval. No torch before they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from prunekit.cli import completion
from prunekit.cli.group import (
    as_json,
    command_line,
    device_option,
    note,
    print_json,
    settings_option,
    warn,
)
from prunekit.errors import UserError, relative

model_names = completion.complete_components("architecture")
dataset_names = completion.complete_components("dataset")


@click.command("import")
@click.argument("kind", type=click.Choice(["hydra", "harp", "torch-prune", "dense"]))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="Architecture: prunekit list architectures.",
              shell_complete=model_names)  # fmt: skip
@click.option("--dataset", default="cifar10", show_default=True, help="What it was trained on.",
              shell_complete=dataset_names)  # fmt: skip
@click.option("--sparsity", type=click.FloatRange(0, 1, max_open=True),
              help="Part of the weights removed (hydra, harp): the file does not say.")  # fmt: skip
@click.option("--eps", help="Radius that it was trained for, such as 8/255.")
@click.option("--alpha", default=0.1, type=click.FloatRange(0, 1), show_default=True,
              help="harp: no layer keeps less than alpha times the keep ratio.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write; runs/FILE.")
@settings_option
@as_json
def import_file(
    kind: str,
    file: Path,
    model: str,
    dataset: str,
    sparsity: float | None,
    eps: str | None,
    alpha: float,
    out: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make a run folder of a FILE that other code wrote; evaluate, finetune, export it.

    KIND: hydra and harp (popup_scores), torch-prune (weight_orig, weight_mask), or dense (a plain
    state dict, pruned where it is zero).
    """
    from prunekit.models.importing import Source, import_model

    out = out or Path("runs") / file.name.partition(".")[0]
    sections: dict[str, Any] = {
        "name": out.absolute().name,
        "dataset": {"use": dataset},
        "architecture": {"use": model},
        "stage": [{"kind": "evaluate", "with": ["clean", *(["pgd"] if eps else [])]}],
        **({"threat": {"eps": eps}} if eps else {}),
    }
    source = Source(file, kind, sparsity, alpha)
    folder = import_model(source, sections, settings, out.absolute(), note)
    found = folder.metrics["import"]
    if as_json:
        print_json({"run": str(out), **found})
        return
    click.echo(f"{relative(out)}: sparsity {100 * found['sparsity']:.2f} %")
    click.echo(f"judge it: prunekit eval {relative(out)} --with clean,pgd --eps 8/255", err=True)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--format", "kind", required=True,
              help="hydra, or a format of the architecture's own, such as timm.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, help="What to write it to.")
@as_json
def export(run: Path, kind: str, out: Path, as_json: bool) -> None:
    """Write the network of a RUN folder (or model file) for other code."""
    from prunekit.models.exporting import export_hydra, export_own
    from prunekit.store.networks import find_model

    if kind == "hydra":
        sparsity = export_hydra(find_model(run), out)
        keep = round(1 - sparsity, 10)
        told = {"file": str(out), "format": kind, "sparsity": sparsity}
        line = f"{relative(out)}: keep ratio {keep:g}, --sparsity {sparsity:g}"
    else:
        export_own(run, kind, out)
        told = {"file": str(out), "format": kind}
        line = f"{relative(out)}: {kind}"
    if as_json:
        print_json(told)
        return
    click.echo(line)
    click.echo("removed weights are zero in it", err=True)


@click.command("eval")
@click.argument("run", metavar="RUN_OR_FILE", type=click.Path(path_type=Path))
@click.option("--with", "evaluators", required=True, metavar="NAME,...",
              help="Evaluators: prunekit list evaluators.",
              shell_complete=completion.complete_components("evaluator"))  # fmt: skip
@click.option("--images", type=click.IntRange(1), help="Judge so many test images, evenly spaced.")
@click.option("--eps", help="Radius, such as 8/255; by default the network's own.")
@click.option("--dataset", help="Other data, or those of a file that does not say.",
              shell_complete=dataset_names)  # fmt: skip
@click.option("--model", help="Architecture of a file that does not say.",
              shell_complete=model_names)  # fmt: skip
@click.option("--store", type=click.Path(path_type=Path), envvar="PRUNEKIT_STORE",
              help="Folder of stage results; the run's by default.")  # fmt: skip
@device_option
@settings_option
@as_json
def evaluate(
    run: Path,
    evaluators: str,
    images: int | None,
    eps: str | None,
    dataset: str | None,
    model: str | None,
    store: Path | None,
    device: str,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Judge any network that prunekit made or imported, by evaluators of your choice.

    Options of an evaluator: --set pgd.steps=100. The result is kept in the run's folder
    evaluations.
    """
    from prunekit.cli.components import print_table
    from prunekit.engine.eval_plan import EvalRequest, evaluate_network
    from prunekit.store.networks import read_network

    network = read_network(run)
    if network.header.get("smoke"):
        click.echo("this network comes from a --smoke run: its numbers mean nothing", err=True)
    names = list_evaluators(evaluators)
    request = EvalRequest(names, dataset, model, eps, images, settings)
    folder = evaluate_network(network, request, store, device, command_line(), warn)
    metrics = read_metrics(folder)
    if as_json:
        print_json({"evaluation": str(folder), "metrics": metrics})
    else:
        header = ("evaluator", "metric", "value", "95 % interval", "n")
        print_table(header, tabulate(metrics))
    click.echo(f"in {relative(folder)}", err=True)


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics of an evaluation: evaluator.metric -> value."""
    from prunekit.store.records import read_run

    return dict(read_run(folder).stages[0].metrics)


def tabulate(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows (evaluator, metric, value, 95 % interval, n): results, and what to know about them."""
    from prunekit.results.metrics import format_metric, is_part, split_metric

    rows: list[tuple[str, ...]] = []
    for name, value in metrics.items():
        owner, metric = split_metric(name)
        if not owner or isinstance(value, str) or is_part(name):
            continue
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        interval = ""
        if low is not None and high is not None:
            interval = f"{format_metric(name, low)} to {format_metric(name, high)}"
        n = metrics.get(f"{owner}.n")
        rows.append((owner, metric, format_metric(name, value), interval, str(n or "")))
    return rows


def list_evaluators(text: str) -> tuple[str, ...]:
    """Names separated by commas.

    >>> list_evaluators("pgd, autoattack")
    ('pgd', 'autoattack')
    """
    names: Sequence[str] = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UserError(f"--with {text}: write evaluators separated by commas, such as clean,pgd")
    return tuple(names)
