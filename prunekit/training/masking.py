"""What a training changes, and how masks follow it: weights, or scores of frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from prunekit.contracts import Clock, Masks, Scores
from prunekit.pruning.learning import (
    ScoredChannels,
    ScoredWeight,
    attach,
    attach_gates,
    detach,
    effective_weights,
)
from prunekit.pruning.masks import assert_masked
from prunekit.pruning.selection import Selection, check_layers, select_masks
from prunekit.steps import ParamGroup, SparsitySchedule


class Weights:
    """Trains the parameters that take a gradient; weights that `masks` remove stay exactly zero."""

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        self.model, self._masks = model, masks
        self._named = dict(model.named_parameters())

    @property
    def masks(self) -> Masks:
        """The masks of the present step."""
        return self._masks

    def parameters(self) -> list[ParamGroup]:
        return [ParamGroup([p for p in self.model.parameters() if p.requires_grad])]

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._named.items() if p.dim() > 1}

    def effective(self, clock: Clock, *, lend: bool = False) -> AbstractContextManager[object]:
        return nullcontext()

    def gradients(self) -> dict[str, Tensor]:
        named = self._named.items()
        return {name: p.grad for name, p in named if p.dim() > 1 and p.grad is not None}

    def kept_only(self, clock: Clock) -> Masks:
        return self.masks

    def penalty(self, clock: Clock) -> dict[str, Tensor]:
        return {}

    def after_backward(self) -> None:
        for name, mask in self.masks.items():
            gradient = self._named[name].grad
            if gradient is not None:
                # Filled, not multiplied: inf * 0 is NaN, and w * 0 may be -0.
                gradient.masked_fill_(~mask, 0)

    @torch.no_grad()
    def after_step(self) -> None:
        # A gradient of zero does not stop momentum, or an average.
        for name, mask in self.masks.items():
            self._named[name].masked_fill_(~mask, 0)

    def judged(self, clock: Clock) -> AbstractContextManager[object]:
        self.after_step()
        return nullcontext()

    def scores(self) -> Scores:
        """The magnitudes of the weights that can have a mask."""
        return Scores({name: weight.abs() for name, weight in self.weights().items()})

    def settled(self, clock: Clock) -> bool:
        return True

    def check(self) -> None:
        assert_masked(self.model, self.masks)

    def detach(self) -> None:
        pass


# _NormBase: batch and instance normalization.
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def freeze_norms(model: nn.Module) -> None:
    """Keep what normalization layers have learned, and their statistics."""
    for module in model.modules():
        if isinstance(module, NORMS):
            module.eval().requires_grad_(False)


class LearnedScores:
    """Trains scores of frozen weights; masks follow the scores, once an optimizer step.

    Biases are frozen too. Normalization layers train, affine parameters and running statistics,
    unless `bn` is "freeze". Channels are closed by the gates of the selection's
    groups, single weights where they are. The fraction that is removed follows the `schedule` while
    scores train, and is all of it wherever the network is judged.

    Fields: `model`; `start`, the scores at first; `selection`, with the `sparsity` and `structure`
    of the stage; `alive`, what earlier stages left; `rates`, scalar modules by the name of a
    weight, learned with its scores, `rates[name]()` is the value; `parts`, a module for each
    weight, with its parameter `score` and its buffer `mask`. A subclass overrides `moving` and
    `scores`, and with rates `parameters` (the rates are the second group) and `penalty`. What state
    it needs it registers in its `__init__` as buffers of `parts`, which leave with them.
    """

    def __init__(
        self,
        model: nn.Module,
        start: Scores,
        selection: Selection,
        alive: Masks,
        bn: str = "train",
        schedule: SparsitySchedule | None = None,
        rates: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.model, self.start, self.alive = model, start, alive
        self.selection, self.schedule = selection, schedule
        named = dict(model.named_parameters())
        self._frozen = {name: named[name] for name in start.values}
        self._lent: list[tuple[Tensor, Tensor]] = []
        self._moving: dict[str, Tensor] = {}
        norms = [module for module in model.modules() if isinstance(module, NORMS)]
        trains = [p for norm in norms for p in norm.parameters() if p.requires_grad]
        model.requires_grad_(False)
        for parameter in trains:
            parameter.requires_grad_(True)
        if bn == "freeze":
            freeze_norms(model)
        self.rates = dict(rates or {})
        known = {name: self.rates.get(name) for name in start.values}
        self.parts: dict[str, ScoredWeight] | dict[str, ScoredChannels]
        self._undo: list[Callable[[], None]]
        if selection.structure == "channel":
            channels = {n: ScoredChannels(v, known[n]) for n, v in start.values.items()}
            self._undo = attach_gates(model, channels, selection.groups)
            self.parts = channels
        else:
            scored = {n: ScoredWeight(v, known[n]) for n, v in start.values.items()}
            attach(model, scored)
            self._undo = [partial(detach, model)]
            self.parts = scored

    def scores(self) -> Scores:
        """Importance: |score|. What the stage ends with, its sparsity met."""
        values = {name: part.score.detach().abs() for name, part in self.parts.items()}
        return Scores(values, self.start.layerwise)

    def moving(self) -> Scores:
        """What masks follow while scores train; good until the next call."""
        for name, part in self.parts.items():
            # The same memory each time: fresh memory costs more than the magnitudes.
            if name not in self._moving:
                self._moving[name] = torch.empty_like(part.mask, dtype=part.score.dtype)
            torch.abs(part.score.detach(), out=self._moving[name])
        return Scores(self._moving, self.start.layerwise)

    @torch.no_grad()
    def _refresh(self, scores: Scores, sparsity: float) -> None:
        """Write the masks that the scores select."""
        masks = select_masks(scores, replace(self.selection, sparsity=sparsity), self.alive)
        for name, part in self.parts.items():
            part.mask.copy_(masks[name])

    def parameters(self) -> list[ParamGroup]:
        """One group; those of the rates are a second one."""
        rates = {id(p): p for rate in self.rates.values() for p in rate.parameters()}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [ParamGroup([p for p in trained if id(p) not in rates])]
        return [*groups, ParamGroup(list(rates.values()))] if rates else groups

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self._frozen.items()}

    @property
    def masks(self) -> Masks:
        """The masks of the present step."""
        return {name: part.mask for name, part in self.parts.items()}

    @contextmanager
    def effective(self, clock: Clock, *, lend: bool = False) -> Iterator[None]:
        factor = 1.0 if self.schedule is None else self.schedule(clock)
        self._refresh(self.moving(), self.selection.sparsity * factor)
        gated = lend and self.selection.structure == "channel"
        for weight in self._frozen.values() if gated else ():
            # Gates act on outputs, so that their weights enter the graph as they are.
            weight.requires_grad_(True).grad = None
        try:
            with effective_weights(self.model) as made:
                if lend:
                    self._lent = made if not gated else [(w, w) for w in self._frozen.values()]
                    for _, masked in self._lent:
                        masked.retain_grad()
                yield
        finally:
            for weight in self._frozen.values() if gated else ():
                weight.requires_grad_(False)

    def gradients(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        names = {id(weight): name for name, weight in self._frozen.items()}
        for weight, masked in self._lent:
            if masked.grad is not None:
                name = names[id(weight)]
                kept = masked.grad.masked_fill(~self.parts[name].mask, 0)
                # A tied weight has a gradient in each of its layers.
                found[name] = found[name] + kept if name in found else kept
        return found

    def kept_only(self, clock: Clock) -> Masks:
        return {}

    def penalty(self, clock: Clock) -> dict[str, Tensor]:
        return {}

    def after_backward(self) -> None:
        pass

    def after_step(self) -> None:
        pass

    @contextmanager
    def judged(self, clock: Clock) -> Iterator[None]:
        self._refresh(self.scores(), self.selection.sparsity)
        with effective_weights(self.model):
            yield

    def settled(self, clock: Clock) -> bool:
        return True

    def check(self) -> None:
        self._refresh(self.scores(), self.selection.sparsity)
        check_layers(self.masks, self.selection.sparsity)

    def detach(self) -> None:
        """Give the model its plain weights back."""
        for undo in self._undo:
            undo()
        for weight in self._frozen.values():
            weight.grad = None
