"""Distillation: training objectives that learn from a robust teacher."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit_adversarial import VALIDATION, TrainingOptions, tell_attacked

from prunekit import ObjectiveComponent, hookimpl, option


@dataclass(frozen=True)
class DistillationOptions(TrainingOptions):
    """What the objectives with a teacher share."""

    teacher: Path | None = option(
        None,
        help="model file of the teacher; default: what the first pretrain stage ended with",
        exists=True,
    )


@dataclass(frozen=True)
class RsladOptions(DistillationOptions):
    """Options of `rslad`."""

    natural: float = option(
        1 / 6, help="weight of the clean term; the attacked one has the rest", low=0, high=1
    )
    igdm: float = option(
        0.0, help="weight that the matching of differences (IGDM) grows to over the epochs", low=0
    )


@dataclass(frozen=True)
class SaadOptions(DistillationOptions):
    """Options of `saad`."""

    natural: float = option(0.0, help="weight of the clean term (beta)", low=0)
    igdm: float = option(
        1.0, help="weight that the matching of differences (IGDM) grows to over the epochs", low=0
    )
    scale: float = option(5.0, help="factor of the weights of images", above=0)


DISTILLATION = """\
The teacher is in evaluation mode. It is the network that the run's first pretrain stage ended with
(of sparsity 0), or a model file, which may have another architecture. Every KL is a sum over
classes and a mean over images. IGDM compares the differences f(x') - f(2 x - x') of both networks,
with the weight igdm * epoch / epochs, the epoch counted from 1; 2 x - x' is not clamped, and does
not move running statistics. For more than ten classes its authors give it a weight of 10."""

RSLAD_DETAILS = f"""\
The attack maximizes KL(teacher(x) || student(x')), from x + 0.001 * N(0, 1) as for TRADES.

{DISTILLATION}

The authors' code also averages each KL over the classes, which only scales the loss: K times
smaller."""

SAAD_DETAILS = f"""\
Images weigh the more the less certain the teacher is about them under attack: w_i = scale *
(H_i - min H), with the entropy H_i of teacher(x'_i) and the minimum over the batch. The clean term
weighs 1 - w_i / max w. The attack is that of `rslad`; the authors' also lets the teacher see x'.
They average the network over the last epochs, as the wrapper `swa` does.

{DISTILLATION}"""


_COMMON: dict[str, Any] = {
    "sources": ("prunekit_adversarial",),
    "accuracy_of": tell_attacked,
    "teacher": "teacher",
    **VALIDATION,
}


@hookimpl
def prunekit_objectives() -> Iterable[ObjectiveComponent]:
    """Declare the objectives that learn from a teacher."""
    yield ObjectiveComponent(
        name="rslad",
        summary="Distillation: KL to a teacher's clean predictions, on attacked and clean images",
        build="prunekit_distillation.objectives:build_rslad",
        options=RsladOptions,
        paper="Zi et al., ICCV 2021, arXiv 2108.07969; igdm: Lee et al., ICLR 2025",
        details=RSLAD_DETAILS,
        forward_passes=lambda o: o.steps + 2 + bool(o.natural) + 3 * bool(o.igdm),
        attack_passes=lambda o: o.steps + 1 + 2 * bool(o.igdm),
        **_COMMON,
    )
    yield ObjectiveComponent(
        name="saad",
        summary="Distillation that weighs images by how uncertain the teacher is under attack",
        build="prunekit_distillation.objectives:build_saad",
        options=SaadOptions,
        paper="Lee et al., TMLR 2026, arXiv 2512.10275",
        details=SAAD_DETAILS,
        forward_passes=lambda o: o.steps + 3 + bool(o.natural) + 2 * bool(o.igdm),
        attack_passes=lambda o: o.steps + 2 + bool(o.igdm),
        **_COMMON,
    )
