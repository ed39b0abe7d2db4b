"""Commands on networks rather than recipes: import, export, eval. No torch before they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from prunekit.cli import group
from prunekit.cli.completion import complete_components, component_option
from prunekit.errors import UserError, relative


@click.command("import")
@click.argument("kind", type=click.Choice(["hydra", "harp", "torch-prune", "dense"]))
@click.argument("file", type=group.PATH)
@component_option(
    "--model", "architecture", required=True, help="Architecture: prunekit list architectures."
)
@component_option(
    "--dataset", "dataset", default="cifar10", show_default=True, help="What it was trained on."
)
@click.option(
    "--sparsity",
    type=click.FloatRange(0, 1, max_open=True),
    help="hydra, harp: the fraction of weights removed, which the file does not say.",
)
@click.option("--eps", help="Radius that it was trained for, such as 8/255.")
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="harp: every layer keeps at least alpha times the keep ratio.",
)
@click.option("--entry", help="Which state dict, if FILE has several: state_dict_ema.")
@click.option("--out", type=group.PATH, help="Folder to write; by default runs/FILE.")
@group.settings_option
@group.as_json
def import_file(
    kind: str,
    file: Path,
    model: str,
    dataset: str,
    sparsity: float | None,
    eps: str | None,
    alpha: float,
    entry: str | None,
    out: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make a run folder of a FILE that other code wrote, to evaluate, finetune or export it.

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
    source = Source(file, kind, sparsity, alpha, entry)
    folder = import_model(source, sections, settings, out.absolute(), group.note)
    found = folder.metrics["import"]
    if as_json:
        group.print_json({"run": str(out), **found})
        return
    group.echo(f"{relative(out)}: sparsity {100 * found['sparsity']:.2f} %")
    # The file of the run knows the radius, if anybody said it.
    radius = "" if eps else " --eps RADIUS"
    group.warn(f"evaluate it: prunekit eval {relative(out)} --with clean,pgd{radius}")


@click.command()
@click.argument("run", type=group.PATH)
@click.option("--format", required=True, help="hydra, or a format of the architecture (timm).")
@click.option("--out", type=group.PATH, required=True, help="File or folder to write.")
@group.trust_option
@group.as_json
def export(run: Path, format: str, out: Path, trust: bool, as_json: bool) -> None:
    """Write the network of a RUN folder (or model file) for other code."""
    from prunekit.models.exporting import export_hydra, export_own
    from prunekit.store.networks import find_model
    from prunekit.store.records import tell_changed

    for text in tell_changed(run):
        group.warn(text)
    told: dict[str, Any] = {"file": str(out), "format": format}
    if format == "hydra":
        told["sparsity"] = sparsity = export_hydra(find_model(run), out)
        detail = f"keep ratio {round(1 - sparsity, 10):g}, --sparsity {sparsity:g}"
    else:
        export_own(run, format, out, trust=trust)
        detail = format
    if as_json:
        group.print_json(told)
        return
    group.echo(f"{relative(out)}: {detail}")
    group.warn("removed weights are zero in it")


@click.command("eval")
@click.argument("run", metavar="RUN_OR_FILE", type=group.PATH)
@click.option(
    "--with",
    "evaluators",
    required=True,
    metavar="NAME,...",
    shell_complete=complete_components("evaluator"),
    help="Evaluators: prunekit list evaluators.",
)
@click.option("--images", type=click.IntRange(1), help="Use so many test images, evenly spaced.")
@click.option("--eps", help="Radius, such as 8/255; by default the one in the file or run.")
@component_option("--dataset", "dataset", help="Data set, if it is another or the file lacks it.")
@component_option("--model", "architecture", help="Architecture, if the file lacks it.")
@group.store_option
@group.device_option
@group.settings_option
@group.trust_option
@group.as_json
def evaluate(run: Path, evaluators: str, store: Path | None, as_json: bool, **request: Any) -> None:
    """Evaluate any network that prunekit trained or imported, with evaluators of your choice.

    Options of an evaluator: --set pgd.steps=100. The result is kept in the folder evaluations of
    the run.
    """
    from prunekit.engine.eval_plan import EvalRequest, evaluate_network
    from prunekit.store.metrics import write_metrics
    from prunekit.store.networks import read_network
    from prunekit.store.records import read_run

    network = read_network(run)
    if network.header.get("smoke"):
        group.warn("this network comes from a --smoke run: its numbers mean nothing")
    names = tuple(name.strip() for name in evaluators.split(","))
    if not all(len(name.split()) == 1 for name in names):
        raise UserError(f"--with {evaluators}: separate evaluators by commas, as in clean,pgd")
    folder = evaluate_network(
        network, EvalRequest(names, **request), store, group.command_line(), group.warn
    )
    metrics = read_run(folder).stages[0].metrics
    if as_json:
        group.print_json({"evaluation": str(folder), "metrics": write_metrics(metrics)})
    else:
        titles = ("evaluator", "metric", "value", "95 % interval", "n")
        group.print_table(titles, list(list_metrics(metrics)))
    group.warn(f"in {relative(folder)}")


def list_metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows (evaluator, metric, value, 95 % interval, n) of what evaluators found."""
    from prunekit.contracts import Metric
    from prunekit.results.metrics import format_metric
    from prunekit.store.metrics import split_metric

    for name, value in metrics.items():
        owner, metric = split_metric(name)
        if owner and isinstance(value, Metric):
            ends = [Metric(e, unit=value.unit) for e in (value.low, value.high) if e is not None]
            yield (
                owner,
                metric,
                format_metric(value),
                " to ".join(map(format_metric, ends)),
                str(value.n or ""),
            )
