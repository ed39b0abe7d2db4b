"""The command run: a recipe's runs one after another, side by side, or as jobs of a cluster."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prunekit.cli import group
from prunekit.cli.recipes import plan_recipe
from prunekit.cli.results import print_results
from prunekit.errors import UserError, printable, relative, suggest
from prunekit.report import Stop
from prunekit.store.layout import STORE

if TYPE_CHECKING:
    from prunekit.engine.jobs import Jobs
    from prunekit.recipe.plan import Plan, Run
    from prunekit.store.runs import RunFolder

MOST_NAMED = 10
"""Most runs that a message names."""


@click.command()
@click.argument("recipe", type=group.PATH)
@group.settings_option
@click.option("--out", type=group.PATH, help="Folder to write; by default runs/NAME.")
@group.store_option
@group.device_option
@click.option("--threads", type=click.IntRange(1), help="Threads on a CPU; by default [compute]'s.")
@click.option("--only", multiple=True, metavar="LABEL", help="Only these runs; * is any text.")
@click.option("--jobs", type=click.IntRange(1), help="Runs of a sweep side by side.")
@click.option("--devices", help="One for each job, in turn: cuda:0,cuda:1.")
@click.option(
    "--executor",
    type=click.Choice(("print", "slurm")),
    help="A job for each run: print writes scripts, slurm submits (through submitit).",
)
@click.option(
    "--slurm", multiple=True, metavar="KEY=VALUE", help="For submitit: slurm_partition=gpu."
)
@click.option(
    "--sparse",
    type=click.Choice(["auto", "off", "on"]),
    help="Kernels for layers with few kept weights; by default [compute]'s.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@click.option("--smoke", is_flag=True, help="Try the recipe: all stages, two tiny batches each.")
@click.option("--force", is_flag=True, help="Move files that are in the way aside.")
@group.trust_option
@group.as_json
def run(
    recipe: Path,
    settings: tuple[str, ...],
    out: Path | None,
    store: Path | None,
    device: str | None,
    threads: int | None,
    sparse: str | None,
    only: tuple[str, ...],
    jobs: int | None,
    devices: str | None,
    executor: str | None,
    slurm: tuple[str, ...],
    dry_run: bool,
    smoke: bool,
    force: bool,
    trust: bool,
    as_json: bool,
) -> None:
    """Run a recipe: pretrain, prune, finetune, evaluate, compare."""
    if device and devices:
        raise click.UsageError("--device and --devices exclude each other")
    if executor and (jobs or devices or force):
        raise click.UsageError(
            "--executor makes a job of each run; leave --jobs, --devices and --force out"
        )
    places = [place.strip() for place in devices.split(",")] if devices else []
    given = {"device": device or (places and places[0]), "threads": threads, "sparse": sparse}
    settings += tuple(f"compute.{key}={value}" for key, value in given.items() if value)
    folder = Path.cwd()  # before plugins run, which may change it
    plan = plan_recipe(recipe, settings, smoke=smoke, trust=trust)
    chosen = _choose_runs(plan, only)
    out = out or Path("runs") / (plan.name + ("-smoke" if smoke else ""))
    store = store or out.parent / STORE
    stop = Stop()
    # Includes the imports, which take seconds and would break if Ctrl-C interrupted them.
    with stop.listen():
        from prunekit.engine.preview import preview_plan
        from prunekit.engine.running import run_plan

        stop.check()
        part = dataclasses.replace(plan, runs=chosen)
        if dry_run:
            _print_preview(plan, preview_plan(part, out, store), as_json)
            return
        if executor:
            from prunekit.cli.executors import hand_over

            options = {"out": out, "store": store, "smoke": smoke, "trust": trust}
            hand_over(executor, part, options, settings, slurm, as_json)
            return
        folders = run_plan(
            plan,
            folder / out,
            folder / store,
            force=force,
            resume=group.command_line(),
            tell=group.warn,
            stop=stop,
            runs=chosen,
            jobs=_share_out(plan, chosen, jobs, places, settings, trust),
        )
    os.chdir(folder)
    if folders is None:
        group.warn(f"{relative(out)} is done already: these are its results")
    print_results(out, as_json)
    _tell_missing(plan, out)
    failed = [folder for folder in folders or [] if folder.status == "failed"]
    for error in dict.fromkeys(folder.error for folder in failed):
        _print_failures([folder for folder in failed if folder.error == error])
    if failed:
        click.get_current_context().exit(1)
    group.warn(f"in {relative(out)}")


def _choose_runs(plan: Plan, only: tuple[str, ...]) -> tuple[Run, ...]:
    """The runs that the patterns name, by default all. Raises `UserError` for one that names none.

    Labels have no character that a pattern takes for another one.
    """
    labels = [run.label for run in plan.runs]
    for pattern in only:
        if not fnmatch.filter(labels, pattern):
            raise UserError(f"there is no run {pattern!r}; {suggest(pattern, labels)}")
    named = (run for run in plan.runs if any(fnmatch.fnmatch(run.label, p) for p in only))
    return tuple(named) if only else plan.runs


def _share_out(
    plan: Plan,
    runs: tuple[Run, ...],
    jobs: int | None,
    devices: list[str],
    settings: tuple[str, ...],
    trust: bool,
) -> Jobs | None:
    """How the runs go side by side; None if one after another."""
    from prunekit.engine.jobs import Jobs
    from prunekit.training.compute import find_device

    kinds = sorted({find_device(device).type for device in devices})
    if len(kinds) > 1:
        raise UserError(
            f"--devices must be of one type, which is part of what results depend on, and are "
            f"{' and '.join(kinds)}"
        )
    number = min(jobs or len(devices), len(runs))
    names = devices or [plan.compute.device]
    places = tuple(names[i % len(names)] for i in range(number))
    return Jobs(places, settings, trust) if number > 1 else None


def _tell_missing(plan: Plan, out: Path) -> None:
    """Say which runs of a sweep the comparison lacks."""
    from prunekit.store.out_folder import OutFolder

    statuses = OutFolder(out, plan).find_statuses() if plan.swept else {}
    lacking = {label: s for label, s in statuses.items() if s not in ("done", "failed")}
    if lacking:
        named = [f"{label} ({status})" for label, status in list(lacking.items())[:MOST_NAMED]]
        named += [f"{len(lacking) - MOST_NAMED} more"] * (len(lacking) > MOST_NAMED)
        group.warn(f"not done, of {group.count(len(plan.runs), 'run')}: {', '.join(named)}")


def _print_preview(plan: Plan, preview: dict[str, Any], as_json: bool) -> None:
    """Print what a run would do, as comments around the recipe itself."""
    import tomli_w

    if as_json:
        group.print_json(preview)
        return
    for text in preview["notes"]:
        group.note(text)
    document = plan.document if plan.swept else plan.describe(plan.runs[0])
    group.echo(printable(f"# into {preview['out']}, stages in {preview['store']}", keep="") + "\n")
    group.echo(tomli_w.dumps(dict(document)))
    for run in preview["runs"]:
        weights = f"{run['parameters']:,} parameters, {run['prunable']:,} prunable"
        group.echo(f"# {run['run']}: {weights}")
        for stage in run["stages"]:
            group.echo(
                f"#   {stage['name']:<12} {stage['status']:<7} {stage['steps']:>9,} steps "
                f"{stage['forward_passes']:>11,} forward passes   {stage['key'][:12]}"
            )
    todo = [s for run in preview["runs"] for s in run["stages"] if s["status"] == "to do"]
    passes = sum(stage["forward_passes"] for stage in todo)
    group.echo(f"# to do: {group.count(len(todo), 'stage')}, {passes:,} forward passes of a batch")
    if todo and not preview["smoke"]:
        group.echo("# not counted: the rehearsal before, which sends one batch through every stage")


def _print_failures(folders: list[RunFolder]) -> None:
    """Print why these runs failed, all for the same reason."""
    first = folders[0]
    if click.get_current_context().find_root().params.get("debug") and first.cause is not None:
        traceback.print_exception(first.cause)
    name = f"run {first.run.label!r}" if first.plan.swept else "the run"
    more = f" and {len(folders) - 1} more" if len(folders) > 1 else ""
    group.warn(f"prunekit: {name}{more} failed: {first.error}")
