"""Evaluations of finished networks, kept beside them: a run of one evaluate stage from `init`."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from prunekit.checkpoint import read_checkpoint
from prunekit.contracts import Threat
from prunekit.errors import Place, RecipeError, RunError, UserError, relative
from prunekit.files import read_json
from prunekit.plan import Plan, make_plan
from prunekit.recipe import DATA_KEYS, Recipe, override, parse_value
from prunekit.registry import load_registry
from prunekit.results import read_run
from prunekit.runfolder import digest
from prunekit.running import run_plan
from prunekit.store import STORE

MODEL = "model.safetensors"
UNUSED = ("extra", "extra_ratio")
"""Keys of [dataset] that serve training alone."""


@dataclass(frozen=True)
class Asked:
    """What `prunekit eval` was told; None is what the file or its run says."""

    evaluators: tuple[str, ...]
    dataset: str | None = None
    model: str | None = None
    eps: str | None = None
    images: int | None = None
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Network:
    """A model file, and what is known of it."""

    file: Path
    run: Path | None
    """The run folder it belongs to."""
    header: Mapping[str, Any]
    sections: dict[str, Any]
    """[dataset], [architecture] and [threat] of a recipe for it."""

    @property
    def evaluations(self) -> Path:
        return (self.run or self.file.parent) / "evaluations"

    @property
    def store(self) -> Path:
        """Of the run, or for a lone file one of its own."""
        if self.run is None:
            return self.evaluations / STORE
        above = [self.run.parent / STORE, self.run.parent.parent / STORE]
        return next((folder for folder in above if folder.is_dir()), above[0])


def find_model(path: Path) -> Path:
    """The model file of a run folder, or the file itself. Raises `UserError` without one."""
    if path.is_dir():
        file = path / MODEL
        if not file.is_file():
            runs = sorted(p.parent for p in path.glob(f"*/{MODEL}"))
            way = f"; choose one of its runs, such as {relative(runs[0])}" if runs else ""
            raise UserError(f"there is no {MODEL} in {relative(path)}{way}")
        return file
    if not path.exists():
        raise UserError(f"there is no run folder or file {relative(path)}")
    return path


def read_network(path: Path) -> Network:
    """Read what is known of a run folder's network, or of a file's; raises `UserError`."""
    file = find_model(path).absolute()
    if file.suffix != ".safetensors":
        raise UserError(
            f"{relative(file)} is no model file of prunekit; make a run of it: prunekit import"
        )
    header = read_checkpoint(file)[1]
    run = file.parent if file.name == MODEL and (file.parent / "run.json").is_file() else None
    sections: dict[str, Any] = {key: header[key] for key in ("dataset", "architecture", "threat")
                                if header.get(key)}  # fmt: skip
    if run is not None:
        recipe = tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))
        sections |= {key: recipe[key] for key in ("dataset", "architecture", "threat")
                     if key in recipe}  # fmt: skip
    return Network(file, run, header, sections)


def plan_evaluation(network: Network, asked: Asked) -> Plan:
    """A plan whose only stage judges the network.

    The settings that the evaluation was given become settings of the run, beside those of the run
    that made the network: `prunekit results` then tells and groups evaluations as it does runs.
    """
    names = [name.rpartition(":")[2] for name in asked.evaluators]
    stage: dict[str, Any] = {
        "kind": "evaluate", "name": "+".join(names),
        "with": [{"use": use} for use in asked.evaluators],
    }  # fmt: skip
    given: dict[str, Any] = {}
    sections = _choose_sections(network, asked)
    if asked.eps is not None:
        given["threat.eps"] = asked.eps
    if asked.dataset is not None:
        given["dataset"] = asked.dataset
    if asked.images is not None:
        stage["images"] = given["evaluate.images"] = asked.images
    label, seed, settings = _identify(network)
    others = []
    for text in asked.settings:
        address, _, value = text.partition("=")
        first, _, option = address.strip().partition(".")
        given[address.strip()] = parse_value(value)
        if first in names and option:
            stage["with"][names.index(first)][option] = parse_value(value)
        else:
            others.append(text)
    data = {
        "name": label, "seed": seed, **sections, "stage": [stage], "report": ["console"],
    }  # fmt: skip
    recipe = Recipe((network.run or network.file.parent) / "recipe.toml", data, _places(asked))
    override(recipe, others)
    try:
        plan = make_plan(recipe, load_registry())
    except RecipeError as error:
        if "threat" not in data and any("[threat]" in p.message for p in error.problems):
            raise UserError(
                "the network does not say for which threat it was made; give --eps 8/255"
            ) from None
        raise
    run = dataclasses.replace(plan.runs[0], settings={**settings, **given})
    notes = (*plan.notes, *_note_training(network, run.threat))
    return dataclasses.replace(plan, runs=(run,), notes=notes)


def _note_training(network: Network, threat: Threat | None) -> Iterator[str]:
    """A threat that is not the one the network was trained for is allowed, and flagged."""
    trained = network.header.get("threat")
    if trained and threat and trained != dataclasses.asdict(threat):
        yield (
            f"judged at norm {threat.norm}, eps {threat.eps:.6g}; the network was trained for "
            f"{trained['norm']}, {trained['eps']:.6g}"
        )


def _choose_sections(network: Network, asked: Asked) -> dict[str, Any]:
    sections = dict(network.sections)
    where = relative(network.file)
    for key, chosen, flag in (
        ("dataset", asked.dataset, "--dataset"), ("architecture", asked.model, "--model"),
    ):  # fmt: skip
        if chosen is None and key not in sections:
            raise UserError(f"{where} does not say its {key}; give {flag} NAME")
        old: Any = sections.get(key)
        old = {"use": old} if isinstance(old, str) else old or {}
        if chosen is not None:
            sections[key] = {"use": chosen}
            if key == "dataset":
                sections[key] |= {k: v for k, v in old.items() if k in DATA_KEYS}
        else:
            sections[key] = old
    sections["dataset"] = {k: v for k, v in sections["dataset"].items() if k not in UNUSED}
    sections["architecture"] = {**sections["architecture"], "init": str(network.file)}
    if asked.eps is not None:
        sections["threat"] = {**sections.get("threat", {}), "eps": asked.eps}
    return sections


def _identify(network: Network) -> tuple[str, int, dict[str, Any]]:
    """(name, seed, settings) of the run that made the network."""
    if network.run is not None:
        run = read_run(network.run)
        return run.name, run.seed, dict(run.settings)
    seed = network.header.get("seed", 0)
    name = re.sub(r"[^\w+-]", "-", network.file.stem)
    return name, seed if isinstance(seed, int) else 0, {}


def _places(asked: Asked) -> dict[Any, Place]:
    """Where mistakes are: in the options of the command line."""
    told = {
        ("stage",): ("--with", ",".join(asked.evaluators)),
        ("stage", 0, "images"): ("--images", asked.images),
        ("dataset", "use"): ("--dataset", asked.dataset),
        ("architecture", "use"): ("--model", asked.model),
        ("threat", "eps"): ("--eps", asked.eps),
    }
    return {
        path: Place(f"{flag} {value}") for path, (flag, value) in told.items() if value is not None
    }


def judge(network: Network, asked: Asked, store: Path | None, device: str, resume: str) -> Path:
    """Evaluate, or find the stored result; the folder of the evaluation.

    Raises `RunError` where it failed.
    """
    plan = plan_evaluation(network, asked)
    folder = network.evaluations / f"{plan.runs[0].stages[0].name}-{digest(plan)[:8]}"
    folders = run_plan(plan, folder, store or network.store, device, force=False, resume=resume)
    if folders is None:
        for note in plan.notes:
            click.echo(f"note: {note}", err=True)
    for done in folders or []:
        if done.status == "failed":
            raise RunError(done.error)
    return folder


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics of an evaluation: evaluator.metric -> value."""
    metrics: dict[str, Any] = read_json(folder / "run.json")["stages"][0]["metrics"]
    return metrics


def tabulate(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows (evaluator, metric, value, 95 % interval, n): results, and what to know about them."""
    from prunekit.metric_names import format_metric, is_part, split_metric

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
