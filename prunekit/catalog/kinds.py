"""The kinds of components: what a plugin declares of each, beyond what all share.

A new kind is a class here, a hook in `hookspecs`, a context in `prunekit.contracts` for what it may
use, and a check in `checks/` of what it must do. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from prunekit import contracts, report, steps
from prunekit.catalog.component import Component, Use


@dataclass(frozen=True)
class Facts:
    """What is known of a data set before any file is read.

    `shape` is (C, H, W) of an image, `train` and `test` are numbers of images, and `augment` names
    the augmentations that suit the data: "crop" (zero padding of 1/8, random crop), "flip".
    """

    shape: tuple[int, int, int]
    classes: int
    train: int
    test: int
    augment: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ObjectiveComponent(Component):
    """The declaration of a training loss."""

    kind = "objective"
    builds = contracts.Objective
    abilities = (
        contracts.Attacking,
        contracts.Validating,
        contracts.Settling,
        contracts.Halting,
        contracts.Stepping,
        contracts.Stateful,
    )

    validates: tuple[str, ...] = ("accuracy",)
    """Names of its validation metrics, each a fraction of the images."""
    select: str = "accuracy"
    """The one of them that chooses the best epoch, or "last"."""
    accuracy_of: Callable[[Any], str] = lambda options: "training images"
    """options -> of what the logits of its loss are, such as "attacked training images"."""
    replays: Callable[[Any], int] = lambda options: 1
    """options -> optimizer steps on each batch. A recipe's epochs are divided by it."""
    forward_passes: Callable[[Any], int] = lambda options: 1
    """options -> forward passes per image in a training step."""
    attack_passes: Callable[[Any], int] = lambda options: 0
    """options -> those of them that `Attacking.prepare` makes."""
    validation_passes: Callable[[Any], int] = lambda options: 1
    """options -> forward passes per image in validation."""
    refuses_extra: Callable[[Any], str] = lambda options: ""
    """options -> why it is not for extra training images, and what allows them; a recipe that adds
    some to its data set is then refused. Empty if it takes them."""
    teacher: str = ""
    """The option that it gives to `context.network`: a model file, or None for the run's dense
    network. A recipe without either is refused."""


@dataclass(frozen=True, kw_only=True)
class PrunerComponent(Component):
    """The declaration of scores of weights.

    >>> PrunerComponent(name="lwm", summary="Least magnitude", build="my_package.lwm:build").kind
    'pruner'
    """

    kind = "pruner"
    builds = steps.Pruner

    learns: bool = False
    """Scores are trained, so the stage needs `epochs` and an `optimizer`."""
    allocates: bool = False
    """`Scores.keep` says what each layer keeps, so a recipe gives no budget."""
    paces: bool = False
    """It decides itself what it removes by when, so a recipe gives no `sparsity_schedule`."""
    trains_weights: bool = False
    """It trains the weights and has no scores to learn, so wrappers of scores refuse it."""
    signed: bool = False
    """Scores may be below 0, so a recipe cannot give a budget that is `unsigned`."""
    forward_passes: Callable[[Any, int, int], int] = lambda options, batches, loss: 0
    """options, training batches of an epoch, forward passes of the stage's loss on a batch ->
    forward passes of a batch that it makes beside training."""


@dataclass(frozen=True, kw_only=True)
class ArchitectureComponent(Component):
    """The declaration of a network."""

    kind = "architecture"
    builds = contracts.Architecture

    catalog: str = ""
    """"module:function" -> names that the option `model` takes, for `prunekit list --match`."""
    exports: Mapping[str, str] = field(default_factory=dict)
    """Format of `prunekit export` -> "module:function" that writes it, called as
    `function(model, options, header, out)` with the header of the model file."""
    identify: str = ""
    """"module:function" -> options that identify what a Python program hands over in its place."""


@dataclass(frozen=True, kw_only=True)
class DatasetComponent(Component):
    """The declaration of labeled images."""

    kind = "dataset"
    builds = contracts.Data

    facts: Callable[[Any], Facts] | None = None
    """options -> Facts; None if they are known only from the files."""
    missing: Callable[[Any], str] = lambda options: ""
    """options -> which files are not there, in a line; "" if none is known to be missing.

    `prunekit check` asks, so it only looks whether they exist. With an option `download` that is
    true, or a `root` that the recipe leaves open, this is a note, and otherwise a mistake."""


@dataclass(frozen=True, kw_only=True)
class EvaluatorComponent(Component):
    """The declaration of an evaluation."""

    kind = "evaluator"
    builds = contracts.Evaluator

    judges: Literal["", "attack", "proof"] = ""
    """What its record of an image says about robustness under the threat model.

    An "attack" records `correct`: it did not fool the network. A "proof" records `verified`: no
    attack can. The core warns if the two contradict each other.
    """
    guarantees: bool = False
    """Its numbers are guarantees, as those of a proof are: they hold for functions of single images
    only, and the core refuses other networks."""
    beats: tuple[str, ...] = ()
    """Names of weaker attacks, which should leave at least as many images correct."""
    forward_passes: Callable[[Any], int] = lambda options: 1
    """options -> forward passes per image."""

    @property
    def verdict(self) -> str:
        """The record that says whether an image withstands it; "" if it does not judge that."""
        return {"attack": "correct", "proof": "verified"}.get(self.judges, "")


@dataclass(frozen=True, kw_only=True)
class OptimizerComponent(Component):
    """The declaration of an optimizer of weights or scores."""

    kind = "optimizer"
    builds = contracts.OptimizerChoice


@dataclass(frozen=True, kw_only=True)
class ScheduleComponent(Component):
    """The declaration of a schedule of the learning rate."""

    kind = "schedule"
    builds = contracts.Schedule


@dataclass(frozen=True, kw_only=True)
class BudgetComponent(Component):
    """The declaration of how layers share the sparsity."""

    kind = "budget"
    builds = steps.Budget

    compares: bool = False
    """Scores of layers are compared: the core makes those comparable that are not."""
    counts: bool = True
    """It says how many weights layers keep; false where it gives scores of them instead."""
    unsigned: bool = False
    """It takes scores from 0 on only."""


@dataclass(frozen=True, kw_only=True)
class SparsityScheduleComponent(Component):
    """The declaration of how the sparsity grows during a stage."""

    kind = "sparsity_schedule"
    builds = steps.SparsitySchedule

    constant: bool = False
    """The whole sparsity holds from the first step on."""


@dataclass(frozen=True, kw_only=True)
class RewirerComponent(Component):
    """The declaration of masks that change while weights train."""

    kind = "rewirer"
    builds = steps.Rewirer

    gradients: Callable[[Any], bool] = lambda options: False
    """options -> whether it looks at gradients of removed weights in steps in which it is due."""
    allocates: bool = False
    """`Scores.keep` says what each layer keeps, so a recipe gives no budget."""
    elements: bool = False
    """It chooses single weights, so a recipe cannot ask for whole channels."""
    grows: str = ""
    """It needs a sparsity that grows: the `sparsity_schedule` to write in place of a `constant`
    one."""


@dataclass(frozen=True, kw_only=True)
class WrapperComponent(Component):
    """The declaration of what goes around training steps or follows them."""

    kind = "wrapper"
    builds = steps.Wrapper
    abilities = (
        steps.Around,
        steps.Following,
        steps.Averaging,
        steps.Recalibrating,
        contracts.Stateful,
    )

    passes: Callable[[Any], int] = lambda options: 1
    """options -> forward and backward passes in each step. More than one does not go with an
    objective that takes several steps on a batch."""
    scores: bool = False
    """It goes around steps that learn scores, `Now.scores`: prune stages alone take it."""
    averages: bool = False
    """Its network is judged and stored in place of the trained one: one such a stage, at most."""
    batches: Callable[[Any], int] = lambda options: 0
    """options -> the most training batches that `Recalibrating.batches` asks for in an epoch."""
    idle: Callable[[Any, int], int] = lambda options, epochs: 0
    """options, epochs of the stage -> how many of them pass before it begins; `passes` and
    `batches` are those from then on."""


@dataclass(frozen=True, kw_only=True)
class ReporterComponent(Component):
    """The declaration of a receiver of a run's events."""

    kind = "reporter"
    builds = report.Reporter
    abilities = (report.Closing,)

    gathers: bool = False
    """Whether runs that go side by side share one, which gets their events as `FromRun`."""


@dataclass(frozen=True, kw_only=True)
class BackendComponent(Component):
    """The declaration of what computes layers with few kept weights."""

    kind = "backend"
    builds = steps.Backend

    devices: tuple[str, ...] = ("cpu",)
    """The types of devices that it computes on."""
    calibrate: str = ""
    """"module:function" that measures this machine and returns the text of a file that an option
    takes, for `prunekit doctor --calibrate`."""


DEFAULT_BACKEND = "numba"
"""The backend of a recipe that names none."""

KINDS = {declaration.kind: declaration for declaration in Component.__subclasses__()}
"""Kind -> its declaration, for all kinds; each has a hook `prunekit_<kind>s`."""
KIND_OF: dict[Any, str] = {declaration.builds: kind for kind, declaration in KINDS.items()}
"""Contract -> the kind of component that an option of type `Use[contract]` names."""


def find_kind(hint: Any) -> str | None:
    """The kind of component that an option of this type names, or lists; None if it names none."""
    named = (part for part in (hint, *get_args(hint)) if get_origin(part) is Use)
    return next((KIND_OF.get(get_args(part)[0]) for part in named), None)
