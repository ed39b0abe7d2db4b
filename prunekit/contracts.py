"""The contracts between prunekit and its plugins: Protocols, and the values they exchange.

Shapes, everywhere: B images of a batch, N of a set, C channels, H height, W width, K classes.
Images `x` are (B, C, H, W) float32 in [0, 1]; labels `y` are (B,) int64; logits are (B, K).
Radii and noise are in the same pixel units of [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

Masks: TypeAlias = "dict[str, Tensor]"
"""Bool, True = kept; keyed and shaped like the prunable weights (and what goes with them)."""

STRUCTURE = re.compile(r"element|channel|[1-9]\d*:[1-9]\d*")


def read_ratio(structure: str) -> tuple[int, int] | None:
    """(n, m) of an "n:m" structure; None for the other structures.

    >>> read_ratio("2:4"), read_ratio("channel")
    ((2, 4), None)
    """
    n, _, m = structure.partition(":")
    return (int(n), int(m)) if m else None


Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class Threat:
    """The threat model: an attacker may move an image by up to `eps` in `norm`, inside [0, 1]."""

    norm: Norm
    eps: float


@dataclass(frozen=True)
class Clock:
    """Where training is. `step` counts optimizer steps of the stage from 0, `epoch` from 0."""

    step: int
    steps: int
    epoch: int
    epochs: int

    @property
    def fraction(self) -> float:
        """How much of the stage is done, in [0, 1)."""
        return self.step / self.steps


@dataclass(frozen=True)
class Loss:
    """The loss of a batch: `value` is a scalar with gradients, the mean over the batch.

    `terms` are its named parts (scalars, for the log; not called "loss", "accuracy", "epoch",
    "best" or "ended"); `logits` (B, K) serve the live accuracy.
    """

    value: Tensor
    logits: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A training loss: `objective(x, y, clock) -> Loss`, called in train mode.

    It may also be any of the next ones, by having their methods.
    """

    def __call__(self, x: Tensor, y: Tensor, clock: Clock) -> Loss: ...


@runtime_checkable
class Attacking(Protocol):
    """An objective whose loss is at attacked images: calling it does `prepare`, then `loss`."""

    def prepare(self, x: Tensor, y: Tensor, clock: Clock) -> Any:
        """The attack on images x (B, C, H, W) with labels y (B,): what `loss` needs."""

    def loss(self, prepared: Any, clock: Clock) -> Loss:
        """The loss at what was prepared; it may be called several times."""


@runtime_checkable
class Validating(Protocol):
    """An objective with validation metrics of its own; without, there is `accuracy`."""

    def validate(self, x: Tensor, y: Tensor) -> Mapping[str, Tensor]:
        """(B,) values of each image, in eval mode, for each name that the component `validates`."""


@runtime_checkable
class Settling(Protocol):
    """An objective that is not what it will be from the start, such as one with a ramp of eps."""

    def settled(self, clock: Clock) -> bool:
        """False while an epoch cannot be the best one."""


@runtime_checkable
class Halting(Protocol):
    """An objective that sees that its training fails; the stage ends with an earlier epoch."""

    def halts(self, history: Sequence[Mapping[str, Any]]) -> str:
        """What went wrong in the last of these epochs, "" if nothing.

        The best epoch is kept then; before one could be, as it had not settled, the last before.
        Each has its metrics, such as `accuracy` and `validation.accuracy`; nothing else decides.
        """


@runtime_checkable
class Stepping(Protocol):
    """An objective that follows the optimizer."""

    def after_step(self) -> None:
        """Runs after each optimizer step; the component's `replays` says how many a batch."""


@runtime_checkable
class Stateful(Protocol):
    """An objective or a wrapper with a state that a resumed run must restore."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """The state, empty if there is none yet."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> object:
        """Restore what `state_dict` returned; what it gives back is not used."""


@dataclass(frozen=True)
class Scores:
    """Importance of every weight in `PrunerContext.weights`, keyed and shaped alike; larger = keep.

    `layerwise`: values compare within a layer only, so that a budget that compares layers gets each
    layer divided by its root mean square. `keep` says how many weights (or output channels, where
    the structure is of channels: where those of several layers go together, the first one's count
    holds) each layer keeps, in place of the budget; when a stage ends, they add up to what the
    sparsity leaves of all.
    """

    values: Mapping[str, Tensor]
    layerwise: bool = False
    keep: Mapping[str, int] | None = None


class Split(Protocol):
    """One part of a data set, labels (N,) int64 in memory, images fetched by index.

    One that decodes files may also be `Augmenting`.
    """

    @property
    def labels(self) -> Tensor: ...

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """For each index tensor (B,), the uint8 images (B, C, H, W), in order, on any device."""
        ...


@runtime_checkable
class Augmenting(Protocol):
    """A part of a data set that augments images where it decodes them."""

    def augmented_batches(
        self, indices: Sequence[Tensor], names: Sequence[str], batch_seeds: Sequence[int]
    ) -> Iterator[Tensor]:
        """The same as `batches`, augmented as `names` say, each batch decided by its seed alone."""
        ...


@dataclass(frozen=True)
class Data:
    """A built data set. The core splits validation images off `train`; `test` is only judged on.

    `fingerprint` identifies the content; left empty, the core hashes the images of in-memory parts.
    """

    train: Split
    test: Split
    shape: tuple[int, int, int]
    classes: int
    augment: tuple[str, ...] = ()
    fingerprint: str = ""


MetricKind = Literal["result", "diagnosis", "setting"]


class Metric(float):
    """A number that was measured, with what it means; it computes and compares as a float.

    `n` is the number of images behind it, `low` and `high` are the ends of its 95 % interval.
    `unit` is "fraction" or "sparsity" (shown in percent), "pixels", or nothing. A "diagnosis"
    counts images, of `n`, that limit how far results can be trusted, and `note` says why; a result
    with over 1 % of them is flagged and not ranked. A "setting" says how results were measured, and
    `note` what to say of rows where it is 0.

    >>> Metric(0.5, n=2, low=0.1, high=0.9, unit="fraction") + 0.25
    0.75
    """

    n: int | None
    low: float | None
    high: float | None
    unit: str
    kind: MetricKind
    note: str

    def __new__(
        cls,
        value: float,
        *,
        n: int | None = None,
        low: float | None = None,
        high: float | None = None,
        unit: str = "",
        kind: MetricKind = "result",
        note: str = "",
    ) -> Metric:
        self = super().__new__(cls, value)
        vars(self).update(n=n, low=low, high=high, unit=unit, kind=kind, note=note)
        return self

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Metric is not changed; make another one to set its {name}")

    def __getnewargs_ex__(self) -> tuple[tuple[float], dict[str, object]]:
        return (float(self),), dict(vars(self))

    @property
    def doubtful(self) -> bool:
        """Whether it counts over 1 % of its `n` images, so that results are not to be ranked."""
        return self.kind == "diagnosis" and self.n is not None and self > 0.01 * self.n

    def describe(self) -> dict[str, object]:
        """It as plain data: its value, and whatever else is said of it."""
        return {"value": float(self)} | {k: v for k, v in vars(self).items() if v not in (None, "")}


@dataclass(frozen=True)
class Result:
    """What an evaluator found: metrics, and for each image (first axis N) the records behind them.

    A metric that is a mean over images comes from `prunekit.evaluation.proportion`; a plain number
    is a result without further words.
    """

    metrics: Mapping[str, float]
    records: Mapping[str, np.ndarray] = field(default_factory=dict)


class Evaluator(Protocol):
    """`evaluator(model, batches) -> Result`; the model is in eval mode, batches are (x, y).

    All generators are seeded before each batch, so that what is drawn for it depends on the run's
    seed, the component and the batch alone.
    """

    def __call__(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Result: ...


class Architecture(Protocol):
    """A module from pixels (B, C, H, W) in [0, 1] to logits (B, K); normalizes inside.

    `prunekit.normalize_inputs` puts a normalization there. The module may also have
    an attribute `leave_dense`: names of weights, or patterns of such ("head.*"), that prune stages
    leave as they are, unless they say `exclude` themselves.
    """

    def __call__(self, x: Tensor) -> Tensor: ...


class Schedule(Protocol):
    """`schedule(clock)`: the factor of the learning rate at that moment of the stage."""

    def __call__(self, clock: Clock) -> float: ...


@dataclass(frozen=True)
class OptimizerChoice:
    """What an optimizer component builds: the optimizer, its learning rate, and its schedule."""

    make: Callable[[Iterable[Any]], torch.optim.Optimizer]
    """From parameters, or from groups {"params": ..., "weight_decay": ...}, as torch's take."""
    lr: float
    schedule: Schedule
