"""`prunekit init`: write a commented recipe to start from."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from string import Template

import click

from prunekit.catalog.kinds import DatasetComponent, ObjectiveComponent
from prunekit.catalog.registry import load_registry
from prunekit.cli.completion import component_option
from prunekit.cli.components import fragment
from prunekit.cli.group import echo, warn
from prunekit.errors import UserError, relative
from prunekit.store.files import make_folder, relative_link, write_text

HERE = Path(__file__).parent
SHIPPED = HERE.parent / "_recipes"
if not SHIPPED.is_dir():
    SHIPPED = HERE.parents[1] / "recipes"
"""The recipes that come with prunekit: in an installed package, or in a clone of the repository."""

CERTIFIED = ("ibp", "crown-ibp", "mixtrain")
PROOFS = {**dict.fromkeys(CERTIFIED, "verified"), "smoothing": "certify"}
"""Objective -> the evaluator that proves the robustness it trains for."""

THREAT = """
[threat]                        # objectives and evaluators attack within it
norm = "linf"
eps = {}
"""


PLACEHOLDERS = ("my-file", "...")
"""What stands in a recipe for values that only its user knows."""


@click.command()
@click.argument("name", default="recipe")
@component_option("--dataset", "dataset", default="digits", show_default=True, help="Data set.")
@component_option(
    "--model", "architecture", help="Architecture; by default one that suits the images."
)
@component_option(
    "--objective", "objective", default="trades", show_default=True, help="Training loss."
)
@click.option("--like", metavar="RECIPE", help="Copy a recipe that comes with prunekit instead.")
def init(name: str, dataset: str, model: str | None, objective: str, like: str | None) -> None:
    """Write a commented recipe, NAME.toml, to start from."""
    if not name.isprintable():
        raise UserError(f"NAME holds a control character: {name!r}; write another one")
    file = Path(name if name.endswith(".toml") else f"{name}.toml")
    if like and (dataset, model, objective) != ("digits", None, "trades"):
        raise click.UsageError("--like copies a recipe as it is; leave out the other options")
    if os.path.lexists(file):
        raise UserError(f"{relative_link(file)} exists already; choose another name")
    texts = copy_recipe(like, file) if like else {}
    texts = texts or {file: write_recipe(file, dataset, model, objective)}
    # What a copied recipe extends may be there from another one.
    texts = {p: t for p, t in texts.items() if not p.exists() or p.read_text("utf-8") != t}
    for path in texts:
        if os.path.lexists(path):
            raise UserError(
                f"{relative_link(path)} exists already; choose a NAME in another folder"
            )
    for path, text in texts.items():
        make_folder(path.parent, "choose a NAME in another folder")
        write_text(path, text)
        echo(relative(path))
    command = shlex.join(["prunekit", "run", relative(file)])
    if any(f'"{word}"' in texts[file] for word in PLACEHOLDERS):
        warn(f"replace {' and '.join(PLACEHOLDERS)} in {relative(file)}, then run it: {command}")
    else:
        warn(f"run it: {command}")


def write_recipe(file: Path, dataset: str, model: str | None, objective: str) -> str:
    """The text of a recipe of these components. Raises `UserError` if one does not exist."""
    for named in {dataset, model} & {"given", "extra-images"}:
        raise UserError(f"{named!r} cannot stand alone in a recipe; choose another component")
    registry = load_registry()
    data, loss = registry.find("dataset", dataset), registry.find("objective", objective)
    assert isinstance(data.component, DatasetComponent)
    assert isinstance(loss.component, ObjectiveComponent)
    facts = data.component.facts and data.component.facts(data.component.options())
    height = facts.shape[1] if facts else 0
    network = registry.find("architecture", model or _choose_model(height, dataset, objective))
    certified, small = objective in CERTIFIED, 0 < height <= 8
    attacks = [] if objective == "smoothing" else ['{ use = "pgd", steps = 50 }']
    proofs = [f'"{PROOFS[objective]}"'] if objective in PROOFS else []
    eps = "0.1" if 0 < height < 32 else '"2/255"' if certified else '"8/255"'
    if certified:
        rates, rate, comment = (1e-3, 1e-3, 5e-4), 'optimizer = {{ use = "adam", lr = {} }}', ""
    else:
        rates, rate = (0.1, 0.1, 0.05), "optimizer = {{ lr = {} }}"
        comment = "# the rest is the stage's default: sgd, cosine"
    words: dict[str, str] = {}
    epochs = (15, 8, 10) if small else (100, 20, 100)
    for stage, n, lr in zip(("pretrain", "prune", "finetune"), epochs, rates, strict=True):
        optimizer = f"{rate.format(lr):<32}{comment}".rstrip()
        words |= {f"{stage}_epochs": str(n), f"{stage}_rate": optimizer}
    if loss.component.teacher:
        words["pretrain_rate"] += '\nobjective = "trades"            # of the teacher'
    return Template((HERE / "templates/recipe.txt").read_text("utf-8")).substitute(
        words,
        file=shlex.quote(str(file)),
        name=json.dumps(file.stem, ensure_ascii=False)[1:-1],
        about="\n".join(f"# {e.kind}: {e.component.summary}" for e in (data, network, loss)),
        dataset=fragment(data, example=False),
        architecture=fragment(network, example=False),
        objective=fragment(loss, example=False),
        threat=THREAT.format(eps) if attacks else "",
        batch_size=64 if small else 128,
        evaluators=", ".join(['"clean"', *attacks, *proofs]),
    )


def _choose_model(height: int, dataset: str, objective: str) -> str:
    if not height:
        raise UserError(f"the image size of {dataset} is unknown; give --model")
    if height < 32:
        return "small-cnn" if height <= 8 else "mnist-small"
    if height > 32:
        return "imagenet-resnet50"
    # Bound propagation needs small networks without batch normalization.
    return "cifar-small" if objective in CERTIFIED else "cifar-resnet18"


def copy_recipe(name: str, file: Path) -> dict[Path, str]:
    """File -> text of a shipped recipe, copied to `file`, and of the recipes that it extends."""
    source, target = SHIPPED / f"{name.removesuffix('.toml')}.toml", file
    if not source.is_file():
        known = (p.relative_to(SHIPPED).with_suffix("").as_posix() for p in SHIPPED.rglob("*.toml"))
        names = ", ".join(sorted(known))
        raise UserError(f"no recipe {name!r} comes with prunekit; there are: {names}")
    texts = {}
    while True:
        text = source.read_text("utf-8")
        # Its first line is the command that runs it.
        _, end, rest = text.partition("\n")
        if target == file:
            own = f"name = {json.dumps(file.stem, ensure_ascii=False)}"
            rest = re.sub(r'^name = ".*"', own.replace("\\", r"\\"), rest, count=1, flags=re.M)
        texts[target] = f"# {shlex.join(['prunekit', 'run', str(target)])}{end}{rest}"
        extended = re.search(r'^extends = "(.+)"', text, re.MULTILINE)
        if not extended:
            return texts
        source, target = source.parent / extended[1], target.parent / extended[1]
