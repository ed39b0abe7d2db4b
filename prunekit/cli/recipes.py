"""Commands on recipes: check, run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prunekit.cli.group import (
    as_json,
    command_line,
    count,
    device_option,
    note,
    print_json,
    settings_option,
    warn,
)
from prunekit.cli.results import print_results
from prunekit.errors import RecipeError, UserError, relative
from prunekit.report import Stop
from prunekit.store.layout import STORE

if TYPE_CHECKING:
    from prunekit.recipe.plan import Plan
    from prunekit.store.runs import RunFolder


def plan_recipe(path: Path, settings: tuple[str, ...], *, smoke: bool = False) -> Plan:
    """Read and resolve a recipe."""
    from prunekit.catalog.registry import load_registry
    from prunekit.recipe.document import load_recipe
    from prunekit.recipe.plan import make_plan
    from prunekit.recipe.reduction import reduce_plan

    plan = make_plan(load_recipe(path, settings), load_registry())
    return reduce_plan(plan) if smoke else plan


@click.command()
@click.argument("recipes", nargs=-1, required=True, type=click.Path(path_type=Path))
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
                from prunekit.models.building import inspect_networks

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
            for text in plan.notes:
                note(f"{path}: {text}")
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


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
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
    store = store or out.parent / STORE
    stop = Stop()
    # From here on, so that a Ctrl-C does not break the long imports in the middle.
    with stop.listen():
        from prunekit.engine.preview import preview_plan
        from prunekit.engine.running import run_plan

        stop.check()
        if dry_run:
            _print_preview(plan, preview_plan(plan, out, store, device), as_json)
            return
        folders = run_plan(
            plan, out, store, device, force=force, resume=command_line(), tell=warn, stop=stop
        )
    if folders is None:
        click.echo(f"{relative(out)} is done already: these are its results", err=True)
    print_results(out, as_json)
    failed = [folder for folder in folders or [] if folder.status == "failed"]
    for folder in failed:
        _show_failure(folder)
    if failed:
        sys.exit(1)
    click.echo(f"in {relative(out)}", err=True)


def _print_preview(plan: Plan, preview: dict[str, Any], as_json: bool) -> None:
    import tomli_w

    from prunekit.cli.components import render_preview

    if as_json:
        print_json(preview)
        return
    for text in preview["notes"]:
        note(text)
    document = plan.document if plan.swept else plan.describe(plan.runs[0])
    click.echo(render_preview(preview, tomli_w.dumps(dict(document))))


def _show_failure(folder: RunFolder) -> None:
    context = click.get_current_context().find_root()
    if context.params.get("debug") and folder.cause is not None:
        import traceback

        traceback.print_exception(folder.cause)
    name = f"run {folder.run.label!r}" if folder.plan.swept else "the run"
    click.echo(f"prunekit: {name} failed: {folder.error}", err=True)
