"""What the parts of prunekit hand to each other: Protocols and the values between them.

Shapes, everywhere: B images of a batch, N of a set, C channels, H height, W width, K classes.
Images `x` are (B, C, H, W) float32 in [0, 1]; labels `y` are (B,) int64; logits are (B, K).
Radii and noise are in the same pixel units of [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

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
    """The attacks a network should stand: all images within `eps` in `norm`, inside [0, 1]."""

    norm: Norm
    eps: float


@dataclass(frozen=True)
class Clock:
    """Where training is. `step` counts optimiser steps of the stage from 0, `epoch` from 0."""

    step: int
    steps: int
    epoch: int
    epochs: int

    @property
    def fraction(self) -> float:
        """The part of the stage that is done, in [0, 1)."""
        return self.step / self.steps


@dataclass(frozen=True)
class Loss:
    """The loss of a batch: `value` is a scalar with gradients, the mean over the batch.

    `terms` are its named parts (scalars, for the log; not called "loss", "accuracy", "epoch" or
    "best"); `logits` (B, K) serve the live accuracy.
    """

    value: Tensor
    logits: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A training loss: `objective(x, y, clock) -> Loss`, called in train mode.

    It may also have, each found by its name:

    - `validate(x, y) -> dict[str, Tensor]`: (B,) values of each image, averaged over validation
      images in eval mode; the component's `select` names one. Default: `accuracy`.
    - `settled(clock) -> bool`: False while an epoch cannot be the best one (an eps ramp).
    - `after_step()`: runs after each optimiser step (`Component.replays` says how many a batch).
    - `state_dict() -> dict[str, Tensor]`, `load_state_dict(state)`: what a resume must restore.
    """

    def __call__(self, x: Tensor, y: Tensor, clock: Clock) -> Loss: ...


@dataclass(frozen=True)
class Scores:
    """Importance of every prunable weight, larger = keep; keys and shapes as `Context.weights`.

    `layerwise`: values compare within a layer only, so that a global budget divides each layer by
    its root mean square.
    """

    values: Mapping[str, Tensor]
    layerwise: bool = False


class Pruner(Protocol):
    """`pruner(context) -> Scores`; turning scores into masks is the core's."""

    def __call__(self, context: Context) -> Scores: ...


class Split(Protocol):
    """One part of a data set, labels (N,) int64 in memory, images fetched by index.

    One that decodes files may also have `augmented_batches(indices, names, batch_seeds)`: the same
    batches, augmented as `names` say, each decided by its seed alone.
    """

    @property
    def labels(self) -> Tensor: ...

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """For each index tensor (B,), the uint8 images (B, C, H, W), in order, on any device."""
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


@dataclass(frozen=True)
class Result:
    """What an evaluator found: numbers, and for each image (first axis N) the records behind them.

    A metric that is a mean over images comes with its `n` and 95 % interval through
    `prunekit.evaluation.proportion`.
    """

    metrics: Mapping[str, float]
    records: Mapping[str, np.ndarray] = field(default_factory=dict)


class Evaluator(Protocol):
    """`evaluator(model, batches) -> Result`; the model is in eval mode, batches are (x, y)."""

    def __call__(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Result: ...


class Architecture(Protocol):
    """A module from pixels (B, C, H, W) in [0, 1] to logits (B, K); normalises inside.

    `prunekit.normalize_inputs` puts a normalisation there. The module may also have
    an attribute `leave_dense`: names of weights, or patterns of such ("head.*"), that prune stages
    leave as they are, unless they say `exclude` themselves.
    """

    def __call__(self, x: Tensor) -> Tensor: ...


class Schedule(Protocol):
    """`schedule(clock)`: the factor of the learning rate at that moment of the stage."""

    def __call__(self, clock: Clock) -> float: ...


@dataclass(frozen=True)
class OptimizerChoice:
    """What an optimiser of the core's list builds: how to make it, its rate and schedule."""

    make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    lr: float
    schedule: Schedule


def _go_on() -> None:
    """Nobody asks for a stop."""


def _absent(*_: Any) -> Any:
    raise RuntimeError("this part of the context exists only while a pruner scores")


@dataclass(frozen=True, kw_only=True)
class Context:
    """All that `build(options, context)` may use; what is there depends on the kind.

    | kind | has |
    |---|---|
    | dataset | `folder` |
    | architecture | and `seed`, `shape`, `classes`, `fresh` |
    | objective, evaluator | and `model`, `device`, `threat`, `stage` |
    | pruner | and `weights`, `generator`, `objective`, `batches`, `learn` |
    | reporter | `folder` (the run's), `live` |
    """

    seed: int = 0
    folder: Path = Path()
    """The folder of the recipe; for reporters that of the run."""
    shape: tuple[int, int, int] = (0, 0, 0)
    classes: int = 0
    device: torch.device | str = "cpu"
    threat: Threat | None = None
    """For components whose options have the fields `eps` and `norm` (None: the recipe's)."""
    value: Any = None
    """What a Python program hands over in place of the component "given"."""
    fresh: bool = True
    """Architectures: the weights count; False where others are loaded over them at once."""
    stage: str = ""
    """pretrain, prune, finetune or evaluate."""
    sparsity: float = 0.0
    """Of the network: what a prune stage aims at, else what it has."""
    model: Any = None
    """The live `nn.Module`."""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """The prunable weights, by parameter name; not to be changed."""
    generator: Any = None
    """A seeded `torch.Generator` of the CPU."""
    objective: Any = None
    """The stage's `Objective`."""
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]] = _absent
    """One epoch of training batches (x, y), augmented, on the device."""
    learn: Callable[[Scores], Scores] = _absent
    """Trains the scores on the stage's objective from the given start (HYDRA, section 3): the
    forward pass uses weight * mask(|score|) under the stage's sparsity, budget and structure, the
    gradient goes straight through; returns |score| of the best epoch."""
    scratch: Path | None = None
    """Evaluators: a folder of their own; what they leave there survives a kill, not the stage."""
    pause: Callable[[], None] = _go_on
    """Evaluators that take long over a batch: to be called where nothing would be lost; raises
    `Interrupted` where the user has asked for a stop."""
    live: bool = False
    """Reporters: a terminal is there, so progress may be animated."""
