"""The core's own sections and stages of a recipe, as options dataclasses."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prunekit.catalog.component import Radius, Use, option
from prunekit.contracts import (
    STRUCTURE,
    Data,
    Evaluator,
    Norm,
    Objective,
    OptimizerChoice,
    read_ratio,
)
from prunekit.errors import OptionError, relative, translate
from prunekit.steps import Backend, Budget, Pruner, Rewirer, SparsitySchedule, Wrapper


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """The [compute] section: where a recipe runs. It is no part of what is compared."""

    device: str = option("auto", help="auto (the fastest there is), cpu, cuda, cuda:1 or mps")
    threads: int | None = option(None, help="threads on a CPU; default: as torch chooses", low=1)
    sparse: Literal["auto", "off", "on"] = option(
        "auto",
        help="layers with few kept weights run on kernels: where these are installed and faster, "
        "never, or wherever they can",
    )
    backend: Use[Backend] | None = option(None, help='what these kernels are; default: "numba"')


@dataclass(frozen=True, kw_only=True)
class ThreatOptions:
    """The [threat] section."""

    eps: Radius = option(help="radius of the attacks", unit="pixels in [0, 1]")
    norm: Norm = option("linf", help="norm of the attacks")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Keys of [dataset] that are the core's."""

    batch_size: int = option(128, help="images in a batch", low=1)
    validation: float = option(0.1, help="fraction of the training images held out", low=0, below=1)
    validation_seed: int = option(0, help="seed that chooses the images held out")
    fraction: float = option(1.0, help="fraction of the training images used", above=0, high=1)
    augment: tuple[Literal["crop", "flip", "resized-crop"], ...] | None = option(
        None, help="augmentations in training; default: those that suit the data set"
    )
    extra: Use[Data] | None = option(None, help="data set whose training images are added")
    extra_ratio: float = option(1.0, help="extra images for each labeled one in a batch", above=0)
    extra_fraction: float | None = option(
        None, help="fraction of each batch that is extra, in place of extra_ratio", above=0, below=1
    )

    def __post_init__(self) -> None:
        if self.extra_fraction is not None and self.extra_ratio != 1:
            message = "extra_ratio and extra_fraction both say how much is extra; remove one"
            raise OptionError("extra_fraction", message)
        if self.extra is None and self.extra_fraction is not None:
            message = "extra_fraction needs extra, the data set whose images are added"
            raise OptionError("extra_fraction", message)
        if self.extra is None and self.extra_ratio != 1:
            message = "extra_ratio needs extra, the data set whose images are added"
            raise OptionError("extra_ratio", message)


@dataclass(frozen=True, kw_only=True)
class ArchitectureOptions:
    """Keys of [architecture] that are the core's."""

    init: Path | None = option(
        None, help="start from the weights in this file, and its masks", exists=True
    )

    def __post_init__(self) -> None:
        if self.init is not None and self.init.is_dir():
            raise OptionError("init", f"{relative(self.init)} is a folder; write a file in it")


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What pretrain, prune and finetune stages share."""

    optimizer: Use[OptimizerChoice] = option({"use": "sgd", "lr": 0.1}, help="optimizer")
    objective: Use[Objective] | None = option(None, help="training loss; default: the recipe's")
    select: str | None = option(
        None,
        help='validation metric whose best epoch is kept, or "last"; default: that of `validate`, '
        "or the objective's",
    )
    validate: Use[Evaluator] | None = option(
        None, help="attack or proof at the validation images, beside what the objective measures"
    )
    validation_images: int | None = option(
        None, help="number of validation images, evenly spaced; default: all", low=1
    )
    patience: int | None = option(
        None, help="the stage ends after so many epochs without a better one", low=1
    )
    clip_norm: float | None = option(None, help="largest norm of the gradients in a step", above=0)
    wrap: tuple[Use[Wrapper], ...] = option((), help="what goes around or follows training steps")

    def __post_init__(self) -> None:
        if sum(use.component.averages for use in self.wrap) > 1:
            raise OptionError("wrap", "only one average can be judged and stored; keep one")
        names = [use.component.name for use in self.wrap]
        if twice := {name for name in names if names.count(name) > 1}:
            raise OptionError("wrap", f"{min(twice)!r} is listed twice; keep one")
        if self.validate is not None and not self.validate.component.verdict:
            name = self.validate.component.name
            raise OptionError("validate", f'{name!r} is no attack and no proof; write use = "pgd"')


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(FitOptions):
    """What prune stages share with those that rewire."""

    sparsity: float | None = option(
        None, help='fraction of the weights removed; an "n:m" structure fixes it', above=0, below=1
    )
    sparsity_schedule: Use[SparsitySchedule] = option(
        "constant", help="how the sparsity grows while scores or weights train"
    )
    budget: Use[Budget] = option("layer", help="how layers share the sparsity")
    structure: str = option(
        "element",
        help='what is removed together: "element", "channel" (outputs), or "n:m" such as "2:4"',
    )
    exclude: tuple[str, ...] | None = option(
        None,
        help='names of weights left dense, such as "fc.*"; default: as the architecture says',
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not STRUCTURE.fullmatch(self.structure):
            advice = 'write "element", "channel" or a ratio such as "2:4"'
            if meant := translate(self.structure, ("element", "channel")):
                advice = f'write "{meant}"'
            elif found := re.fullmatch(r"(\d+)\D{1,4}(\d+)", self.structure):
                advice = f'write "{found[1]}:{found[2]}"'
            raise OptionError("structure", f"structure cannot be {self.structure!r}; {advice}")
        ratio = read_ratio(self.structure)
        if ratio is None:
            return
        n, m = ratio
        if n >= m:
            raise OptionError("structure", f"{n} of every {m} removes nothing; write a smaller n")
        if self.budget.component.name != _default(self, "budget"):
            raise OptionError("budget", f"{n}:{m} fixes what every layer keeps; remove budget")
        if self.sparsity_schedule.component.name != _default(self, "sparsity_schedule"):
            raise OptionError(
                "sparsity_schedule", f"{n}:{m} fixes the sparsity; remove sparsity_schedule"
            )
        if self.sparsity not in (None, 1 - n / m):
            raise OptionError(
                "sparsity", f"{n}:{m} removes {1 - n / m:g}, not {self.sparsity:g}; remove sparsity"
            )
        object.__setattr__(self, "sparsity", 1 - n / m)


SELECTION_KEYS = ("sparsity", "sparsity_schedule", "budget", "structure", "exclude")
"""Keys of a pretrain or finetune stage that only those that rewire have."""


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(SelectionOptions):
    """A pretrain stage."""

    epochs: int = option(help="passes over the training images", low=1, high=10**6)
    rewire: Use[Rewirer] | None = option(
        None, help="masks that change while weights train; the stage then prunes, to `sparsity`"
    )

    def __post_init__(self) -> None:
        if self.rewire is None:
            FitOptions.__post_init__(self)
        else:
            super().__post_init__()
            _need_sparsity(self.sparsity)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(PretrainOptions):
    """A finetune stage."""

    optimizer: Use[OptimizerChoice] = option({"use": "sgd", "lr": 0.01}, help="optimizer")


@dataclass(frozen=True, kw_only=True)
class PruneOptions(SelectionOptions):
    """A prune stage."""

    epochs: int | None = option(None, help="passes over the training images", low=1, high=10**6)
    pruner: Use[Pruner] = option("score", help="how much each weight matters")
    bn: Literal["train", "freeze", "recalibrate"] = option(
        "train",
        help="batch normalization while scores are learned; recalibrate: measured again afterwards",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _need_sparsity(self.sparsity)


def _default(options: SelectionOptions, name: str) -> Any:
    return next(f.default for f in dataclasses.fields(options) if f.name == name)


def _need_sparsity(sparsity: float | None) -> None:
    if sparsity is None:
        raise OptionError("sparsity", "needs sparsity: fraction of the weights removed")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """An evaluate stage."""

    with_: tuple[Use[Evaluator], ...] = option(help="evaluators")
    images: int | None = option(
        None, help="number of test images, evenly spaced; default: all", low=1
    )

    def __post_init__(self) -> None:
        names = [use.name for use in self.with_]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise OptionError("with_", f'{min(twice)!r} is listed twice; give each a name = "..."')
        if not names:
            raise OptionError("with_", 'name at least one evaluator, such as with = ["clean"]')


STAGE_OPTIONS: dict[str, type] = {
    "pretrain": PretrainOptions,
    "prune": PruneOptions,
    "finetune": FinetuneOptions,
    "evaluate": EvaluateOptions,
}

DATA_KEYS = tuple(f.name for f in dataclasses.fields(DataOptions))
