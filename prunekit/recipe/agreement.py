"""What the sections of a recipe ask of each other. No torch here."""

from __future__ import annotations

from collections.abc import Iterator

from prunekit.catalog.containment import ask
from prunekit.contracts import Threat
from prunekit.recipe.describing import uses_in
from prunekit.recipe.resolver import Resolver
from prunekit.recipe.stages import Stage
from prunekit.recipe.toml.sections import DataOptions


def check_images(images: DataOptions, stages: tuple[Stage, ...], resolver: Resolver) -> None:
    """Stages that train need images to validate on, and some objectives are not for extra ones."""
    for stage in stages if images.validation == 0 else ():
        if getattr(stage.options, "epochs", None) and stage.options.select != "last":
            resolver.problem(
                ("stage", stage.position),
                f"stage {stage.name!r} has no images to choose its best epoch with, because "
                'validation is 0; write select = "last" in it',
            )
    for stage in stages if images.extra is not None else ():
        use = getattr(stage.options, "objective", None)
        if use is not None and (reason := ask(use, "refuses_extra")):
            message = f"extra is not for objective {use.name!r} of stage {stage.name!r}: {reason}"
            resolver.problem(("dataset", "extra"), message)
            return  # it is the same in the others


def note_threats(threat: Threat | None, stages: tuple[Stage, ...]) -> Iterator[str]:
    """A component may have another threat model than the recipe; that is worth a note."""
    for stage in stages if threat else ():
        for use in uses_in(stage.options):
            if threat and use.threat and use.threat != threat:
                yield (
                    f"stage {stage.name!r}: {use.name!r} has norm {use.threat.norm}, eps "
                    f"{use.threat.eps:.6g}; the recipe's threat is {threat.norm}, {threat.eps:.6g}"
                )
