"""What the sections of a recipe, and the parts of a stage, ask of each other. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from prunekit.catalog.component import Use
from prunekit.catalog.containment import ask
from prunekit.contracts import Data, Threat, read_ratio
from prunekit.recipe.describing import key_of, uses_in
from prunekit.recipe.resolver import Resolver
from prunekit.recipe.stages import Stage
from prunekit.recipe.toml.sections import DataOptions


def check_stages(stages: tuple[Stage, ...], resolver: Resolver) -> None:
    """What the parts of each stage ask of each other."""
    for stage in stages:
        check_counts(stage, resolver)
        check_selection(stage, resolver)
        check_wrappers(stage, resolver)


def check_run(images: DataOptions, stages: tuple[Stage, ...], resolver: Resolver) -> None:
    """What the sections of a run ask of each other, if each is right by itself."""
    check_images(images, stages, resolver)
    check_teachers(stages, resolver)


def check_images(images: DataOptions, stages: tuple[Stage, ...], resolver: Resolver) -> None:
    """Stages that train need images to validate on, and a metric of them to be patient for; some
    objectives are not for extra images."""
    for stage in stages if images.validation == 0 else ():
        options = stage.options
        if getattr(options, "epochs", None) and (options.select != "last" or options.validate):
            resolver.problem(
                ("stage", stage.position),
                f"stage {stage.name!r} has no images to choose its best epoch with, because "
                'validation is 0; write select = "last" in it'
                + (", and remove validate" if options.validate else ""),
            )
    for stage in stages:
        if getattr(stage.options, "patience", None) and stage.select == "last":
            message = (
                f"stage {stage.name!r} keeps its last epoch; write select = ..., or no patience"
            )
            resolver.problem(("stage", stage.position, "patience"), message)
    for stage in stages if images.extra is not None else ():
        use = getattr(stage.options, "objective", None)
        if use is not None and (reason := ask(use, "refuses_extra")):
            message = f"extra is not for objective {use.name!r} of stage {stage.name!r}: {reason}"
            resolver.problem(("dataset", "extra"), message)
            return  # it is the same in the others


def check_teachers(stages: tuple[Stage, ...], resolver: Resolver) -> None:
    """An objective with a teacher names its file, or follows a stage that leaves one."""
    for stage in stages:
        use = getattr(stage.options, "objective", None)
        if use and (key := use.component.teacher) and getattr(use.options, key) is None:
            resolver.problem(
                ("stage", stage.position),
                f"objective {use.name!r} of stage {stage.name!r} has no teacher: no pretrain stage "
                "before it leaves a dense network; put one there, or name a model file: "
                f'{key_of(key)} = "dense.safetensors"',
            )
        if stage.kind == "pretrain" and not stage.sparsity:
            return


def note_extra(dataset: Use[Data], extra: Use[Data] | None) -> Iterator[str]:
    """What may be a mistake: the data set as its own extra one."""
    if extra and (extra.component, extra.options) == (dataset.component, dataset.options):
        yield (
            "[dataset]: extra is the data set itself, so its images for validation are trained on, "
            "too; name another one"
        )


def note_validation(
    dataset: Use[Data], images: DataOptions, stages: tuple[Stage, ...]
) -> Iterator[str]:
    """What may be a mistake: more validation images than a data set of known size holds out."""
    if facts := dataset.component.facts and ask(dataset, "facts"):
        held = round(images.validation * round(images.fraction * facts.train))
        yield from (note for stage in stages for note in tell_validation(stage, held))


def tell_validation(stage: Stage, held: int) -> Iterator[str]:
    """What there is to say of a stage's `validation_images` where so many are held out."""
    asked = getattr(stage.options, "validation_images", None) or 0
    if asked > held:
        told = f"validation_images = {asked}, but {held} are held out: all are used"
        yield f"stage {stage.name!r}: {told}"


def check_counts(stage: Stage, resolver: Resolver) -> None:
    """A ratio n:m decides what layers keep, and so does a component that allocates."""
    for use in stage.choosing:
        if use.component.allocates and read_ratio(stage.options.structure):
            resolver.problem(
                ("stage", stage.position, "structure"),
                f"{use.kind} {use.name!r} says itself what each layer keeps, and so does "
                f'{stage.options.structure}; write structure = "element"',
            )
        elif getattr(use.component, "elements", False) and stage.options.structure == "channel":
            message = f'{use.kind} {use.name!r} is for single weights; write structure = "element"'
            resolver.problem(("stage", stage.position, "structure"), message)


def check_selection(stage: Stage, resolver: Resolver) -> None:
    """Signed scores need a budget that takes them, and some rewirers a sparsity that grows."""
    path, options = ("stage", stage.position), stage.options
    for use in stage.choosing:
        component = use.component
        if getattr(component, "signed", False) and options.budget.component.unsigned:
            message = f"scores of {use.kind} {use.name!r} may be below 0, and budget "
            message += f"{options.budget.name!r} takes none that are; remove it, or write another"
            resolver.problem((*path, "budget"), message)
        if getattr(component, "grows", "") and options.sparsity_schedule.component.constant:
            message = f"{use.kind} {use.name!r} needs a sparsity that grows during the stage"
            if read_ratio(options.structure):
                message += f', and {options.structure} fixes it; write structure = "element"'
            else:
                message += f'; write sparsity_schedule = "{component.grows}"'
            resolver.problem((*path, "rewire"), message)


def check_wrappers(stage: Stage, resolver: Resolver) -> None:
    """Wrappers of scores are for prune stages; several passes do not go with several steps."""
    path = ("stage", stage.position, "wrap")
    for use in getattr(stage.options, "wrap", ()):
        if use.component.scores and stage.kind != "prune":
            message = f"{use.name!r} is for stages that learn scores; write it in a prune stage"
            resolver.problem(path, message)
        elif use.component.scores and stage.options.pruner.component.trains_weights:
            message = f"{use.name!r} needs learned scores, {stage.options.pruner.name!r} has none"
            resolver.problem(path, f"{message}; remove it")
        if ask(use, "passes") > 1 and stage.options.objective and stage.replays > 1:
            resolver.problem(
                path,
                f"{use.name!r} goes through a step's loss several times, and objective "
                f"{stage.options.objective.name!r} takes several steps on a batch; use another "
                "objective, or remove it",
            )


def note_delays(stages: tuple[Stage, ...]) -> Iterator[str]:
    """What may be a mistake: a stage that is over before what an option delays, see `option`."""
    for stage in stages:
        for use in stage.uses() if getattr(stage.options, "epochs", None) else ():
            for field in dataclasses.fields(use.options):
                value = getattr(use.options, field.name)
                if field.metadata.get("delays") and value is not None and value >= stage.epochs:
                    yield (
                        f"stage {stage.name!r} has {stage.epochs} epochs, so that "
                        f"{key_of(field.name)} = {value:g} of {use.name!r} is never over; write "
                        "less, or more epochs"
                    )


def note_threats(threat: Threat | None, stages: tuple[Stage, ...]) -> Iterator[str]:
    """What may be a mistake: another threat model than the recipe's, a step longer than eps, and
    what components doubt."""
    for stage in stages:
        for use in uses_in(stage.options):
            if threat and use.threat and use.threat != threat:
                yield (
                    f"stage {stage.name!r}: {use.name!r} has norm {use.threat.norm}, eps "
                    f"{use.threat.eps:.6g}; the recipe's threat is {threat.norm}, {threat.eps:.6g}"
                )
            if doubt := ask(use, "doubts"):
                yield f"stage {stage.name!r}: {use.name!r} {doubt}"
            step = getattr(use.options, "step_size", None)
            if use.threat and isinstance(step, float) and step > use.threat.eps:
                yield (
                    f"stage {stage.name!r}: {use.name!r} takes steps of {step:.6g}, longer than "
                    f"its eps of {use.threat.eps:.6g}; were the two swapped?"
                )
