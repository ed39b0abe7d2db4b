"""What `build(options, context)` may use: a context for each kind.

Whatever a context has is always there. Shapes and units are those of `prunekit.contracts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from prunekit.contracts import Data, Masks, Objective, Scores, Threat


@dataclass(frozen=True, kw_only=True)
class Context:
    """What components of every kind may use; all there is for optimizers and schedules."""

    seed: int
    """The seed of the run; 0 for data sets and reporters, which serve runs of all seeds."""
    folder: Path
    """The folder of the recipe; for reporters that of the run."""
    value: Any = None
    """What a Python program hands over in place of the component "given"."""


@dataclass(frozen=True, kw_only=True)
class DatasetContext(Context):
    """What a data set may use."""

    extra_of: Data | None = None
    """The data set that these images extend, if they are the `extra` of one."""
    test_only: bool = False
    """Whether nothing is trained, so that images to judge on are enough."""
    outputs: Callable[[tuple[int, int, int]], int | None] | None = None
    """How many outputs the network from Python has for images of a shape (C, H, W), None where it
    does not take them; there only with such a network."""


@dataclass(frozen=True, kw_only=True)
class ArchitectureContext(Context):
    """What an architecture may use."""

    shape: tuple[int, int, int]
    """(C, H, W) of an image."""
    classes: int
    """The number of classes."""
    fresh: bool
    """False where other weights replace the initial ones immediately."""


@dataclass(frozen=True, kw_only=True)
class NetworkContext(Context):
    """What all components around a network may use; rewirers and wrappers have this one."""

    model: nn.Module
    """The live network."""
    device: torch.device
    """Where the network and the images are."""
    shape: tuple[int, int, int]
    """(C, H, W) of an image."""
    classes: int
    """The number of classes."""
    stage: str
    """pretrain, prune, finetune or evaluate."""
    sparsity: float
    """Fraction of weights removed: the target in a prune stage, else the network's."""
    threat: Threat | None = None
    """The threat model of a component whose options are `Threatened`; None for others."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveContext(NetworkContext):
    """What an objective may use."""

    network: Callable[[Path | None], nn.Module]
    """`network(file)`: another network to look at, such as a teacher. It is that of a model file,
    or for None the dense one that the run's first pretrain stage ended with. It is in evaluation
    mode, and its parameters take no gradient; raises `UserError` where there is none."""


@dataclass(frozen=True, kw_only=True)
class PrunerContext(NetworkContext):
    """What a pruner may use, when it is built and when it scores."""

    weights: Mapping[str, Tensor]
    """The prunable weights by parameter name; read-only."""
    masks: Masks
    """What earlier stages left of them; a weight that they did not prune is absent."""
    generator: torch.Generator
    """A seeded generator on the CPU."""
    objective: Objective | None
    """The stage's loss, if it has one; a stage whose pruner learns always has."""
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    """An epoch of training batches (x, y), augmented, on the device; another one each call."""
    attach: Callable[..., Any]
    """`attach(start, kind=LearnedScores, **more)`: trained scores beside the frozen weights, from
    the given start; `kind` is a class of your own for what learns more than scores, or weights
    (`LearnedWeights`)."""
    train: Callable[[Any], Scores]
    """Trains what a `prunekit.steps.Masking`, as `attach` makes one, says on the stage's objective,
    then detaches it; returns its scores in the best epoch. `learn(start)` is
    `train(attach(start))`."""

    def learn(self, start: Scores) -> Scores:
        """Train scores from the given start (HYDRA, section 3): the forward pass uses
        weight * mask(|score|) under the stage's sparsity, budget and structure, and the gradient
        goes straight through; returns |score| of the best epoch."""
        return self.train(self.attach(start))


@dataclass(frozen=True, kw_only=True)
class EvaluatorContext(NetworkContext):
    """What an evaluator may use."""

    scratch: Path
    """A folder for intermediate results. It survives a killed process and is deleted when the
    stage is done."""
    pause: Callable[[], None]
    """To be called, by what takes long over a batch, at points where nothing would be lost; raises
    `Interrupted` if the user asked for a stop."""
    examination: Any
    """Whether the network is a function of single images, a `prunekit.judging.Examination`."""
    watch: Any
    """A `prunekit.judging.Watch` of all outputs: near which images are they NaN or infinity?"""


@dataclass(frozen=True, kw_only=True)
class ReporterContext(Context):
    """What a reporter may use."""

    live: bool
    """Whether output goes to a terminal, so that progress may be animated."""


@dataclass(frozen=True, kw_only=True)
class BackendContext(Context):
    """What a backend may use."""

    device: torch.device
    """Where networks are."""
    everything: bool
    """Whether all layers that it can compute are to be, also where a dense one is faster."""
