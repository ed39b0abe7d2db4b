"""The command check, and recipes of the command line made plans."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prunekit.cli import group
from prunekit.errors import RecipeError, UserError

if TYPE_CHECKING:
    from prunekit.recipe.plan import Plan

MOST_NAMED = 10
"""Most runs that a message names."""


def plan_recipe(
    path: Path, settings: tuple[str, ...], *, smoke: bool = False, trust: bool = False
) -> Plan:
    """Read and resolve a recipe. Raises `UserError`, or `RecipeError` with all its mistakes."""
    from prunekit.catalog.registry import load_registry
    from prunekit.cli.init import SHIPPED
    from prunekit.recipe.plan import make_plan
    from prunekit.recipe.reduction import reduce_plan
    from prunekit.store.records import open_recipe

    name = path.as_posix().removeprefix("recipes/").removesuffix(".toml")
    if not os.path.lexists(path) and (SHIPPED / f"{name}.toml").is_file():
        way = f"prunekit init {path.stem} --like {name}"
        raise UserError(f"there is no recipe {path}; one of that name comes with prunekit: {way}")
    plan = make_plan(open_recipe(path, settings, trust=trust), load_registry())
    return reduce_plan(plan) if smoke else plan


@click.command()
@click.argument("recipes", nargs=-1, required=True, type=group.PATH)
@group.settings_option
@click.option("--deep", is_flag=True, help="Build the networks too, and count their weights.")
@group.trust_option
@group.as_json
def check(
    recipes: tuple[Path, ...], settings: tuple[str, ...], deep: bool, trust: bool, as_json: bool
) -> None:
    """Check recipes and report all mistakes at once. Trains nothing."""
    results: list[dict[str, Any]] = []
    noted: dict[str, list[str]] = {}
    for path in recipes:
        networks: list[dict[str, Any]] = []
        plan = None
        notes: list[str] = []
        try:
            plan = plan_recipe(path, settings, trust=trust)
            if lacking := _find_missing(plan, notes) or _find_empty(plan):
                raise UserError(lacking)
            if deep:
                from prunekit.models.building import inspect_networks

                networks = inspect_networks(plan)
        except UserError as error:
            # Errors of building a network do not name the recipe.
            text = f"{path}: {error}" if plan else str(error)
            problems = str(error).splitlines() if isinstance(error, RecipeError) else [text]
            results.append({"recipe": str(path), "problems": problems})
            continue
        results.append({"recipe": str(path), "problems": [], "runs": len(plan.runs)})
        if deep:
            results[-1]["networks"] = networks
        if not as_json:
            for text in (*plan.notes, *notes):
                noted.setdefault(text, []).append(str(path))
            group.echo(f"{path}: good ({group.count(len(plan.runs), 'run')})")
            _print_networks(networks)
    problems = [problem for result in results for problem in result["problems"]]
    if as_json:
        group.print_json({"recipes": results})
    else:
        for text, paths in noted.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            group.note(f"{paths[0]}{more}: {text}")
        for problem in problems:
            group.warn(problem)
    if problems:
        click.get_current_context().exit(2)


def _find_missing(plan: Plan, notes: list[str]) -> str:
    """The first data set that a run cannot read; of those that it may still get, notes."""
    # Runs share what is equal in them.
    uses = {id(use): use for run in plan.runs for use in run.uses() if use.kind == "dataset"}
    for use in uses.values():
        options, text = use.options, use.component.missing(use.options)
        if text and getattr(options, "download", getattr(options, "root", "") is None):
            ends = "a run downloads it" if hasattr(options, "download") else "or set root"
            note = f"{text}; {ends}"
            notes += [note] if note not in notes else []
        elif text:
            return str(text)
    return ""


def _find_empty(plan: Plan) -> str:
    """What a run says that gets no image to train on, where the data set declares its size."""
    from prunekit.catalog.containment import ask

    for run in plan.runs:
        fraction, facts = run.data.fraction, run.dataset.component.facts
        if facts and not round(fraction * (n := ask(run.dataset, "facts").train)):
            return f"fraction = {fraction} leaves none of {n} training images; give a larger one"
    return ""


def _print_networks(networks: list[dict[str, Any]]) -> None:
    for found in networks:
        group.echo(
            f"  {found['architecture']}: {found['parameters']:,} parameters, "
            f"{found['prunable']:,} prunable in {group.count(found['layers'], 'layer')}"
        )
        for word, key in (
            ("left dense", "dense"),
            ("frozen by the network", "frozen"),
            ("never pruned", "unprunable"),
        ):
            if found[key]:
                group.echo(f"    {word}: {', '.join(found[key])}")
