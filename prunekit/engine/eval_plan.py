"""The plan of `prunekit eval`: a run of one evaluate stage on a finished network."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.catalog.registry import load_registry
from prunekit.contracts import Threat
from prunekit.engine.running import run_plan
from prunekit.errors import RecipeError, RunError, UserError, relative
from prunekit.recipe.plan import Plan, make_plan
from prunekit.recipe.toml.document import Recipe, locate_options, override, parse_value
from prunekit.recipe.toml.sections import DATA_KEYS
from prunekit.report import Tell
from prunekit.store.files import refuse_link
from prunekit.store.layout import RECIPE
from prunekit.store.networks import Network
from prunekit.store.out_folder import digest
from prunekit.store.records import read_run, tell_changed

UNUSED = ("extra", "extra_ratio", "extra_fraction")
"""Keys of [dataset] that only training uses."""


@dataclass(frozen=True)
class EvalRequest:
    """The arguments of `prunekit eval`; None means what the file or its run says."""

    evaluators: tuple[str, ...]
    dataset: str | None = None
    model: str | None = None
    eps: str | None = None
    images: int | None = None
    device: str | None = None
    settings: tuple[str, ...] = ()
    trust: bool = False
    """Whether what the file or its run names may run code."""


def plan_evaluation(network: Network, request: EvalRequest) -> Plan:
    """A plan whose only stage judges the network.

    The settings that the evaluation was given become settings of the run, beside those of the run
    that made the network: `prunekit results` then tells and groups evaluations as it does runs.
    """
    names = [name.rpartition(":")[2] for name in request.evaluators]
    uses = [{"use": use} for use in request.evaluators]
    stage: dict[str, Any] = {"kind": "evaluate", "name": "+".join(names), "with": uses}
    given: dict[str, Any] = {}
    sections = _choose_sections(network, request)
    if request.eps is not None:
        given["threat.eps"] = request.eps
    if request.dataset is not None:
        given["dataset"] = request.dataset
    if request.images is not None:
        stage["images"] = given["evaluate.images"] = request.images
    label, seed, settings = _identify(network)
    for text in request.settings:
        address, _, value = text.partition("=")
        # However it was addressed, one option is one setting of the results.
        short = address.strip().removeprefix("evaluate.").removeprefix("with.")
        known = short.partition(".")[0] in names
        given[short if known else address.strip()] = parse_value(value)
    data = {"name": label, "seed": seed, **sections, "stage": [stage], "report": ["console"]}
    place = {} if request.device is None else {"device": request.device}
    if network.run is not None:  # numbers that are added are computed as the others were
        place["sparse"] = read_run(network.run).sparse
    if place:
        data["compute"] = place
    options = {
        ("stage",): ("--with", ",".join(request.evaluators)),
        ("compute", "device"): ("--device", request.device),
        ("stage", 0, "images"): ("--images", request.images),
        ("dataset", "use"): ("--dataset", request.dataset),
        ("architecture", "use"): ("--model", request.model),
        ("threat", "eps"): ("--eps", request.eps),
    }
    origin = network.run / RECIPE if network.run else network.file
    recipe = Recipe(origin, data, locate_options(options))
    chosen = {"dataset": request.dataset, "architecture": request.model}
    source = "" if request.trust else network.source
    recipe.foreign = {key: source for key in sections if chosen.get(key) is None}
    override(recipe, request.settings)
    try:
        plan = make_plan(recipe, load_registry())
    except RecipeError as error:
        if "threat" not in data and any("[threat]" in p.message for p in error.problems):
            raise UserError(
                "the network does not say which threat model it was trained for; give --eps "
                "with its radius, such as --eps 4/255"
            ) from None
        raise
    if plan.swept:
        raise UserError("prunekit eval judges once: give one value to each --set")
    run = dataclasses.replace(plan.runs[0], settings={**settings, **given})
    notes = (*plan.notes, *_note_training(network, run.threat))
    return dataclasses.replace(plan, runs=(run,), notes=notes)


def _note_training(network: Network, threat: Threat | None) -> Iterator[str]:
    """A note where the threat model is not the one the network was trained for."""
    trained = network.header.get("threat")
    if trained and threat and trained != dataclasses.asdict(threat):
        yield (
            f"judged at norm {threat.norm}, eps {threat.eps:.6g}; the network was trained for "
            f"{trained['norm']}, {trained['eps']:.6g}"
        )


def _choose_sections(network: Network, request: EvalRequest) -> dict[str, Any]:
    sections = dict(network.sections)
    where = relative(network.file)
    asked = {"dataset": (request.dataset, "--dataset"), "architecture": (request.model, "--model")}
    for key, (chosen, flag) in asked.items():
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
    if request.eps is not None:
        sections["threat"] = {**sections.get("threat", {}), "eps": request.eps}
    return sections


def _identify(network: Network) -> tuple[str, int, dict[str, Any]]:
    """(name, seed, settings) of the run that made the network."""
    if network.run is not None:
        run = read_run(network.run)
        return run.name, run.seed, dict(run.settings)
    seed = network.header.get("seed", 0)
    name = re.sub(r"[^\w+-]", "-", network.file.stem)
    return name, seed if isinstance(seed, int) else 0, {}


def evaluate_network(
    network: Network, request: EvalRequest, store: Path | None, resume: str, tell: Tell
) -> Path:
    """Evaluate, or find the stored result; the folder of the evaluation.

    Raises `UserError` where the network's file does not fit, and `RunError` where judging failed.
    """
    plan = plan_evaluation(network, request)
    plan.permit()
    for text in tell_changed(network.run) if network.run else ():
        tell(text)
    folder = network.evaluations / f"{plan.runs[0].stages[0].name}-{digest(plan)[:8]}"
    refuse_link(network.evaluations)
    refuse_link(folder)
    folders = run_plan(
        plan,
        folder,
        store or network.store,
        force=False,
        resume=resume,
        elsewhere="results stand beside the network: copy it to a folder of yours, and judge that",
        anew=f"delete {relative(folder)}",
        tell=tell,
    )
    if folders is None:
        for note in plan.notes:
            tell(note)
    for done in folders or []:
        if done.status == "failed":
            unfit = isinstance(done.cause, UserError) and not isinstance(done.cause, RunError)
            raise (UserError if unfit else RunError)(done.error)
    return folder
