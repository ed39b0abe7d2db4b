"""The command line. Results go to stdout, everything else to stderr; torch only where it runs.

Commands on recipes and results are here, those on networks and of help in the modules beside.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prunekit import cli_models, cli_support, completion
from prunekit.cli_group import (
    as_json,
    command_line,
    device_option,
    main,
    print_json,
    settings_option,
)
from prunekit.errors import RecipeError, UserError, relative
from prunekit.stop import Stop

if TYPE_CHECKING:
    from prunekit.plan import Plan
    from prunekit.runfolder import RunFolder

__all__ = ["cli_models", "cli_support", "main"]  # their commands are in `main` once imported


# What there is


@main.command("list")
@click.argument("kind", required=False, shell_complete=completion.complete_kinds)
@click.option("--match", metavar="PATTERN",
              help="Names like 'convnext*' alone, those of timm and torchvision too.")  # fmt: skip
@as_json
def list_components(kind: str | None, match: str | None, as_json: bool) -> None:
    """List all components, or those of one KIND (objectives, pruners, ...)."""
    from prunekit.registry import load_registry
    from prunekit.showing import find_matches, print_table, summarize
    from prunekit.values import suggest

    registry = load_registry()
    kinds = list(dict.fromkeys(entry.kind for entry in registry.entries))
    wanted = kind and kind.removesuffix("s")
    if wanted and wanted not in kinds:
        raise UserError(f"unknown kind {kind!r}; {suggest(f'{wanted}s', [f'{k}s' for k in kinds])}")
    entries = [e for k in kinds for e in registry.entries if e.kind == k and wanted in (None, k)]
    found = find_matches(entries, match) if match else [summarize(entry) for entry in entries]
    if as_json:
        broken = [vars(plugin) for plugin in registry.broken]
        print_json({"components": found, "broken": broken})
        return
    rows = [tuple(c[k] for k in ("kind", "name", "summary", "distribution", "status"))
            for c in found]  # fmt: skip
    rows += [("plugin", b.plugin, "", b.distribution, f"broken: {b.reason}")
             for b in registry.broken]  # fmt: skip
    print_table(("kind", "name", "what it is", "from", "status"), rows)


@main.command()
@click.argument("name", shell_complete=completion.complete_components())
@as_json
def show(name: str, as_json: bool) -> None:
    """Show a component: its options, its paper, a recipe fragment that works."""
    from prunekit.registry import load_registry
    from prunekit.showing import describe_component, find_anywhere, render_component

    entries = find_anywhere(load_registry(), name)
    if as_json:
        print_json({"components": [describe_component(entry) for entry in entries]})
        return
    click.echo("\n\n".join(render_component(entry) for entry in entries))


# Recipes


def plan_recipe(path: Path, settings: tuple[str, ...], *, smoke: bool = False) -> Plan:
    """Read and resolve a recipe."""
    from prunekit.plan import make_plan
    from prunekit.recipe import load_recipe
    from prunekit.registry import load_registry
    from prunekit.smoke import reduce_plan

    plan = make_plan(load_recipe(path, settings), load_registry())
    return reduce_plan(plan) if smoke else plan


@main.command()
@click.argument("recipes", nargs=-1, required=True, type=click.Path(path_type=Path),
                shell_complete=completion.complete_recipes)  # fmt: skip
@settings_option
@click.option("--deep", is_flag=True, help="Build the networks too, and count their weights.")
@as_json
def check(recipes: tuple[Path, ...], settings: tuple[str, ...], deep: bool, as_json: bool) -> None:
    """Check recipes: everything that is wrong, at once. Trains nothing."""
    results: list[dict[str, Any]] = []
    problems: list[str] = []
    for path in recipes:
        networks: list[dict[str, Any]] = []
        plan = None
        try:
            plan = plan_recipe(path, settings)
            if deep:
                from prunekit.inspecting import inspect_networks

                networks = inspect_networks(plan)
        except UserError as error:
            # What building finds names no recipe.
            found = [f"{path}: {error}" if plan else str(error)]
            if isinstance(error, RecipeError):
                found = [str(problem) for problem in error.problems]
            problems += found
            results.append({"recipe": str(path), "problems": found})
            continue
        results.append(
            {"recipe": str(path), "problems": [], "runs": len(plan.runs)}
            | ({"networks": networks} if deep else {})
        )
        if not as_json:
            for note in plan.notes:
                click.echo(f"note: {path}: {note}", err=True)
            click.echo(f"{path}: good ({count(len(plan.runs), 'run')})")
            _print_networks(networks)
    if as_json:
        print_json({"recipes": results})
    else:
        for problem in problems:
            click.echo(problem, err=True)
    if problems:
        sys.exit(2)


def _print_networks(networks: list[dict[str, Any]]) -> None:
    for found in networks:
        click.echo(
            f"  {found['architecture']}: {found['parameters']:,} parameters, "
            f"{found['prunable']:,} prunable in {count(found['layers'], 'layer')}"
        )
        for word, key in (("left dense", "dense"), ("not to be pruned", "unprunable")):
            if found[key]:
                click.echo(f"    {word}: {', '.join(found[key])}")


def count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path),
                shell_complete=completion.complete_recipes)  # fmt: skip
@settings_option
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to write; runs/NAME by default."
)
@click.option("--store", type=click.Path(path_type=Path), envvar="PRUNEKIT_STORE",
              help="Folder of stage results; .stages beside --out by default.")  # fmt: skip
@device_option
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@click.option(
    "--smoke", is_flag=True, help="Prove the recipe: the same stages, two tiny batches each."
)
@click.option("--force", is_flag=True, help="Move what is in the way aside.")
@as_json
def run(
    recipe: Path,
    settings: tuple[str, ...],
    out: Path | None,
    store: Path | None,
    device: str,
    dry_run: bool,
    smoke: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Run a recipe: pretrain, prune, finetune, judge, compare."""
    plan = plan_recipe(recipe, settings, smoke=smoke)
    out = out or Path("runs") / (plan.name + ("-smoke" if smoke else ""))
    store = store or out.parent / ".stages"
    stop = Stop()
    # From here on, so that a Ctrl-C does not break the long imports in the middle.
    with stop.listen():
        from prunekit.running import preview_plan, run_plan

        stop.check()
        if dry_run:
            _print_preview(plan, preview_plan(plan, out, store, device), as_json)
            return
        folders = run_plan(plan, out, store, device, force=force, resume=command_line(), stop=stop)
    if folders is None:
        click.echo(f"{relative(out)} is done already: these are its results", err=True)
    _print_results(out, as_json)
    failed = [folder for folder in folders or [] if folder.status == "failed"]
    for folder in failed:
        _show_failure(folder)
    if failed:
        sys.exit(1)
    click.echo(f"in {relative(out)}", err=True)


def _print_preview(plan: Plan, preview: dict[str, Any], as_json: bool) -> None:
    import tomli_w

    from prunekit.showing import render_preview

    if as_json:
        print_json(preview)
        return
    for note in plan.notes:
        click.echo(f"note: {note}", err=True)
    document = plan.document if plan.swept else plan.describe(plan.runs[0])
    click.echo(render_preview(preview, tomli_w.dumps(dict(document))))


def _show_failure(folder: RunFolder) -> None:
    context = click.get_current_context().find_root()
    if context.params.get("debug") and folder.cause is not None:
        import traceback

        traceback.print_exception(folder.cause)
    name = f"run {folder.run.label!r}" if folder.plan.swept else "the run"
    click.echo(f"prunekit: {name} failed: {folder.error}", err=True)


# Results


@main.command()
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
        _print_results(folder, as_json, as_csv, choose)


def _print_layers(folder: Path) -> None:
    from prunekit.results import find_runs
    from prunekit.showing import print_table

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


def _print_results(
    folder: Path, as_json: bool, as_csv: bool = False, addresses: tuple[str, ...] = ()
) -> None:
    from rich.console import Console

    from prunekit import tables
    from prunekit.choosing import choose, tell
    from prunekit.results import compare, find_runs

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
        tables.render(rows, Console())
    for choice in choices:
        click.echo(f"chosen for {tell(choice)}", err=as_csv)


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("curve.png"),
              help="Picture to write: .png, .svg, .pdf.", show_default=True)  # fmt: skip
@as_json
def curve(runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Draw certified accuracy against the radius, of all runs in the folders RUNS."""
    from prunekit import curves

    found = curves.find_curves(runs)
    curves.draw(found, out)
    if as_json:
        print_json({"file": str(out), "curves": curves.to_json(found)})
    click.echo(f"in {relative(out)}", err=True)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), default="runs")
@click.option("--store", type=click.Path(path_type=Path), envvar="PRUNEKIT_STORE",
              help="Folder of stage results; .stages in FOLDER by default.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be freed, and keep it.")
def clean(folder: Path, store: Path | None, dry_run: bool) -> None:
    """Free the stored stages that no run below FOLDER refers to."""
    from prunekit.results import find_runs
    from prunekit.store import Store

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    root = store or folder / ".stages"
    used = {key for found in find_runs(folder) for key in found.keys}
    freed = Store(root).remove_unused(used, keep=dry_run)
    for key, size in freed:
        click.echo(f"{key}  {size / 1e6:.1f} MB")
    verb = "would be freed" if dry_run else "freed"
    click.echo(f"{sum(s for _, s in freed) / 1e6:.1f} MB {verb} ({count(len(freed), 'stage')})")
