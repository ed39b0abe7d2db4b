"""`prunekit init`: a commented recipe to start from."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from string import Template

import click

from prunekit.catalog.registry import load_registry
from prunekit.cli import completion
from prunekit.cli.components import fragment
from prunekit.errors import RecipeError, UserError, relative

HERE = Path(__file__).parent
TEMPLATES = HERE / "templates"
SHIPPED = next(p for p in (HERE.parent / "_recipes", HERE.parents[1] / "recipes") if p.is_dir())
"""The recipes that come with prunekit: in the package, or beside it in a clone."""

CERTIFIED = ("ibp", "crown-ibp", "mixtrain")
PROOFS = {**dict.fromkeys(CERTIFIED, "verified"), "smoothing": "certify"}
"""Objective -> the evaluator that proves what it trains for, where that is no attack."""

THREAT = """
[threat]                        # objectives and evaluators attack within it
norm = "linf"
eps = {}
"""


@click.command()
@click.argument("name", default="recipe")
@click.option(
    "--dataset",
    default="digits",
    show_default=True,
    help="Data set.",
    shell_complete=completion.complete_components("dataset"),
)
@click.option(
    "--model",
    help="Architecture; by default one that suits the images.",
    shell_complete=completion.complete_components("architecture"),
)
@click.option(
    "--objective",
    default="trades",
    show_default=True,
    help="Training loss.",
    shell_complete=completion.complete_components("objective"),
)
@click.option("--like", metavar="RECIPE", help="Copy a recipe that comes with prunekit instead.")
def init(name: str, dataset: str, model: str | None, objective: str, like: str | None) -> None:
    """Write a commented recipe, NAME.toml, to start from."""
    file = Path(name if name.endswith(".toml") else f"{name}.toml")
    written = copy_recipe(like, file) if like else write_recipe(file, dataset, model, objective)
    for path in written:
        click.echo(relative(path))
    click.echo(f"run it: prunekit run {relative(file)}", err=True)


def write_recipe(file: Path, dataset: str, model: str | None, objective: str) -> list[Path]:
    """Write a recipe of these components, checked; raises `UserError` where none can be."""
    from prunekit.recipe.document import load_recipe
    from prunekit.recipe.plan import make_plan

    registry = load_registry()
    data, loss = registry.find("dataset", dataset), registry.find("objective", objective)
    facts = data.component.facts and data.component.facts(data.component.options())
    height = facts.shape[1] if facts else 0
    network = registry.find("architecture", model or _choose_model(height, dataset, objective))
    small, proof = height <= 8, PROOFS.get(objective)
    attack = [] if objective == "smoothing" else ['{ use = "pgd", steps = 50 }']
    eps = "0.1" if height < 32 else '"2/255"' if objective in CERTIFIED else '"8/255"'
    rates = (0.1, 0.1, 0.05)
    rate = "optimizer = {{ lr = {} }}       # the rest is the stage's default: sgd, cosine"
    if objective in CERTIFIED:
        rates, rate = (1e-3, 1e-3, 5e-4), 'optimizer = {{ use = "adam", lr = {} }}'
    stages = ("pretrain", "prune", "finetune")
    epochs = (15, 8, 10) if small else (100, 20, 100)
    text = Template((TEMPLATES / "recipe.txt").read_text("utf-8")).substitute(
        file=file,
        name=file.stem,
        about="\n".join(f"# {e.kind}: {e.component.summary}" for e in (data, network, loss)),
        dataset=fragment(data, example=False),
        architecture=fragment(network, example=False),
        objective=fragment(loss, example=False),
        threat=THREAT.format(eps) if attack else "",
        batch_size=64 if small else 128,
        evaluators=", ".join(['"clean"', *attack, *([f'"{proof}"'] if proof else [])]),
        **{f"{stage}_epochs": number for stage, number in zip(stages, epochs, strict=True)},
        **{f"{stage}_rate": rate.format(r) for stage, r in zip(stages, rates, strict=True)},
    )
    refuse_existing([file])
    with tempfile.TemporaryDirectory() as scratch:
        draft = Path(scratch) / file.name
        draft.write_text(text, encoding="utf-8")
        try:
            make_plan(load_recipe(draft), registry)
        except RecipeError as error:
            # A file that components want is the user's to put there.
            problems = [p.message for p in error.problems if "there is no" not in p.message]
            if problems:
                raise UserError("; ".join(problems)) from None
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return [file]


def _choose_model(height: int, dataset: str, objective: str) -> str:
    if not height:
        raise UserError(f"the images of {dataset} are not known; give --model")
    if height < 32:
        return "small-cnn" if height <= 8 else "mnist-small"
    if height > 32:
        return "imagenet-resnet50"
    # Bounds want small networks without batch normalization.
    return "cifar-small" if objective in CERTIFIED else "cifar-resnet18"


def refuse_existing(files: Sequence[Path]) -> None:
    for file in files:
        if file.exists():
            raise UserError(f"{relative(file)} is there already; choose another name")


def copy_recipe(name: str, file: Path) -> list[Path]:
    """Copy a shipped recipe, and what it extends, beside it; the files that are written."""
    source = SHIPPED / f"{name.removesuffix('.toml')}.toml"
    if not source.is_file():
        names = sorted(
            p.relative_to(SHIPPED).with_suffix("").as_posix() for p in SHIPPED.rglob("*.toml")
        )
        raise UserError(f"no recipe {name!r} comes with prunekit; there are: {', '.join(names)}")
    copies = {file: source}
    target = file
    while extended := re.search(r'^extends = "(.+)"', source.read_text("utf-8"), re.MULTILINE):
        source, target = source.parent / extended[1], target.parent / extended[1]
        copies[target] = source
    refuse_existing(list(copies))
    for target, source in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = source.read_text("utf-8").splitlines(keepends=True)
        target.write_text(f"# prunekit run {target}\n{''.join(lines[1:])}", encoding="utf-8")
    return list(copies)
