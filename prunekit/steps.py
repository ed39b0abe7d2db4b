"""The contracts of masks and training steps: who scores, shares, rewires, wraps, and what trains.

Shapes and units as in `prunekit.contracts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from prunekit.contracts import Clock, Loss, Masks, Scores

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from prunekit.contexts import PrunerContext


class Pruner(Protocol):
    """`pruner(context) -> Scores`; turning scores into masks is the core's."""

    def __call__(self, context: PrunerContext) -> Scores: ...


@dataclass(frozen=True)
class Layers:
    """What a budget shares out: the units of all layers that are pruned.

    Units are weights, or output channels (O,): those of layers that go together count once, under
    the name and with the shape of the first one. `scores` has their importance in the layer's
    shape, -inf for those that are gone; `alive` says which are left where a stage before pruned
    (layers that it did not prune are absent); `shapes` are those of the weights. `sparsity` is the
    fraction of units to remove, and `total` how many are kept in all.
    """

    scores: Mapping[str, Tensor]
    alive: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    sparsity: float
    total: int


class Budget(Protocol):
    """How layers share the sparsity: `budget(layers)`.

    Gives the number of units that each layer keeps (its best), or scores of the layers' shapes that
    compare across layers: then the `total` best of all are kept, whichever layer they are in.
    """

    def __call__(self, layers: Layers) -> Mapping[str, int] | Mapping[str, Tensor]: ...


class SparsitySchedule(Protocol):
    """`schedule(clock)`: the fraction of the stage's sparsity that holds at that moment, in [0, 1].

    It is 1 at the end, that is at `Clock(steps, steps, epochs, epochs)`.
    """

    def __call__(self, clock: Clock) -> float: ...


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that are trained alike: at `rate` times the learning rate of the step, with a
    weight decay of their own if `decay` is not None."""

    parameters: Sequence[nn.Parameter]
    rate: float = 1.0
    decay: float | None = None


class Masking(Protocol):
    """What a stage trains, and how masks follow it: weights, scores of frozen weights.

    All its state is in the parameters and buffers of `model`, hence in its state dict: a resume
    needs no more. Weights are named as in the plain network.
    """

    model: nn.Module

    @property
    def masks(self) -> Masks:
        """The masks of this step."""
        ...

    def parameters(self) -> Sequence[ParamGroup]:
        """What is trained, in an order that stays the same."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """The matrices and kernels that the network computes with, trained or frozen, unmasked and
        live: a wrapper may change them in place for a pass."""
        ...

    def effective(self, clock: Clock, *, lend: bool = False) -> AbstractContextManager[object]:
        """Around one forward and one backward; with `lend`, `gradients` are asked for after it."""
        ...

    def gradients(self) -> Mapping[str, Tensor]:
        """Of the last backward: the gradient at each effective weight, zero where it is removed."""
        ...

    def kept_only(self, clock: Clock) -> Masks:
        """Masks of plain parameters whose removed weights need no gradient in this step."""
        ...

    def penalty(self, clock: Clock) -> Mapping[str, Tensor]:
        """Scalars by name that are added to the loss and logged; {} if there are none."""
        ...

    def after_backward(self) -> None:
        """Before gradients are clipped."""
        ...

    def after_step(self) -> None:
        """After each step of the optimizer."""
        ...

    def judged(self, clock: Clock) -> AbstractContextManager[object]:
        """Around a validation: the network as it would be if the stage ended now."""
        ...

    def scores(self) -> Scores:
        """What would be selected if the stage ended now, its sparsity met."""
        ...

    def settled(self, clock: Clock) -> bool:
        """False while an epoch cannot be the best one."""
        ...

    def check(self) -> None:
        """Once an epoch, and before the first: raise `RunError` where a promise is broken."""
        ...

    def detach(self) -> None:
        """Give the model its plain weights back."""
        ...


@dataclass(frozen=True)
class Moment:
    """What a rewirer decides by. Tensors are those of the weights that it rewires, by name.

    `sparsity` is the fraction to remove now, as the stage's schedule says. `masks` are those until
    now, in the `first` call (before step 0, to choose what to start with) those of the stages
    before, or all True. `gradients` are those of the step's loss at all weights, removed ones
    included; empty in the first call, and unless `RewirerComponent.gradients` asks for them.
    `select(scores)` gives the masks that the core would choose by these scores now. `history` has
    the metrics of each epoch so far. `final` says that this is the last step, and `trained` that
    the weights were trained before the stage, so that magnitudes mean something.
    """

    clock: Clock
    sparsity: float
    weights: Mapping[str, Tensor]
    masks: Masks
    gradients: Mapping[str, Tensor]
    history: Sequence[Mapping[str, Any]]
    generator: torch.Generator
    select: Callable[[Scores], Masks]
    first: bool = False
    final: bool = False
    trained: bool = False


class Rewirer(Protocol):
    """Masks that change while weights train: `rewirer(moment) -> Scores`, without state of its own.

    The scores select the masks from now on, in place of this step of the optimizer. Newly kept
    weights, and their momentum, start at zero. It is not bound by what earlier stages removed.
    """

    def due(self, clock: Clock) -> bool:
        """Whether to rewire in this step; asked before its forward pass."""
        ...

    def __call__(self, moment: Moment) -> Scores: ...


@dataclass(frozen=True)
class Now:
    """An optimizer step as wrappers see it; `weights`, `masks` and `gradients` as in `Masking`.

    `scores` are the learned scores by the name of their weight, live: masks follow them in each
    pass. {} where none are learned.
    """

    clock: Clock
    model: nn.Module
    weights: Mapping[str, Tensor]
    masks: Masks
    gradients: Callable[[], Mapping[str, Tensor]]
    scores: Mapping[str, nn.Parameter] = field(default_factory=dict)


class Wrapper(Protocol):
    """What goes around training steps or follows them: `Around`, `Following`, or both.

    It may also have `state_dict()` and `load_state_dict(state)`: tensors that a resume restores.
    """


@runtime_checkable
class Around(Protocol):
    """A wrapper that goes through a training step's loss several times (AWP, SAM)."""

    def around(self, go: Callable[[], Loss], now: Now) -> Loss:
        """Do the step's passes, and return the loss of the last one.

        `go()` does one forward and one backward: it leaves the parameters' gradients, in place of
        those of the pass before. The attack of an `Attacking` objective is made once, every pass
        draws the same random numbers, and only the last one moves running statistics. Weights that
        are changed between passes have to be restored, by copy.
        """
        ...


@runtime_checkable
class Following(Protocol):
    """A wrapper that looks at the network after each optimizer step (averages)."""

    def after_step(self, now: Now) -> None: ...


@runtime_checkable
class Averaging(Following, Protocol):
    """A wrapper whose network is judged, selected and stored in place of the trained one."""

    def judged(self, model: nn.Module) -> AbstractContextManager[object]:
        """Inside, the model's trained parameters and buffers have the values to judge."""
        ...


@runtime_checkable
class Recalibrating(Averaging, Protocol):
    """An average whose statistics of batch normalization are measured before it is judged."""

    def batches(self, clock: Clock) -> int:
        """The training batches that go through the objective for it at the end of this epoch,
        without gradients and without its `after_step`."""
        ...


class Backend(Protocol):
    """Computes the layers of a network whose weights are mostly removed."""

    def around(
        self, model: nn.Module, masks: Masks, *, still: bool
    ) -> AbstractContextManager[object]:
        """Around forward passes of the network and what follows from them, losses and attacks.

        `masks` names plain parameters of which removed weights need no gradient. Of all others,
        what is zero is removed in this pass, and the whole gradient is wanted. `still`: no
        parameter takes a gradient. It is entered again inside itself, for the attack of a training
        step, and leaves alone what is called while `prunekit.evaluation.is_plain()`.
        """
        ...

    def chosen(self) -> Mapping[str, str]:
        """Weight -> "sparse", or why it is dense, of layers that ran since this was last asked."""
        ...
