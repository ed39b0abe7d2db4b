"""Weights that train in a prune stage, while it is open which of them will be kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prunekit.contracts import Clock, Masks, Scores
from prunekit.graph.groups import follow
from prunekit.pruning.learning import TrainedWeight, attach, detach, effective_weights
from prunekit.pruning.selection import Selection, check_layers, select_masks
from prunekit.steps import SparsitySchedule
from prunekit.training.masking import Weights, freeze_norms


class LearnedWeights(Weights):
    """Trains the weights themselves, and whatever else the network trains.

    Layers compute with weight * factor, zero where the mask of a step removes it. At first masks
    keep all that earlier stages left; a subclass changes them in `prepare`. The network is judged,
    and left by the stage, under the masks that `scores` select.

    Fields: `model`; `start`, the scores at first; `selection`, with the `sparsity` and `structure`
    of the stage; `alive`, what earlier stages left; `schedule` of the sparsity; `trained`, the
    parameters by name; `parts`, a module for each of them, with its buffer `mask` and its `factor`,
    the parameter of its shape that is given in `factors`, or None. A subclass overrides `prepare`
    and `scores`, with factors `parameters`, and `penalty`. What state it needs it registers in its
    `__init__` as buffers of `parts`, which leave with them.
    """

    def __init__(
        self,
        model: nn.Module,
        start: Scores,
        selection: Selection,
        alive: Masks,
        bn: str = "train",
        schedule: SparsitySchedule | None = None,
        factors: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        super().__init__(model, alive)
        self.start, self.selection, self.alive = start, selection, alive
        self.schedule = schedule
        self.trained = {name: self._named[name] for name in start.values}
        if bn == "freeze":
            freeze_norms(model)
        left = {n: torch.ones_like(w, dtype=torch.bool) for n, w in self.trained.items()} | alive
        factors = factors or {}
        self.parts = {n: TrainedWeight(left[n], factors.get(n)) for n in self.trained}
        attach(model, self.parts)

    def kept_only(self, clock: Clock) -> Masks:
        return {}  # its weights are made from parameters, under masks

    def prepare(self, clock: Clock) -> None:
        """Before every pass; a step may have several, so what is done once is noted in a buffer."""

    @torch.no_grad()
    def whole(self, name: str) -> Tensor:
        """What a layer would compute with if all of its weight was kept: weight * factor."""
        weight, factor = self.trained[name], self.parts[name].factor
        return weight.clone() if factor is None else weight * factor

    def scores(self) -> Scores:
        """Importance: the magnitudes of what layers compute with."""
        return Scores({name: self.whole(name).abs() for name in self.parts})

    @property
    def masks(self) -> Masks:
        """The masks of the present step, and of what goes with its channels."""
        live = {name: part.mask for name, part in self.parts.items()}
        return {**self.alive, **live, **follow(live, self.selection.groups)}

    @contextmanager
    def effective(self, clock: Clock, *, lend: bool = False) -> Iterator[None]:
        self.prepare(clock)
        with effective_weights(self.model):
            yield

    @contextmanager
    def judged(self, clock: Clock) -> Iterator[None]:
        self.after_step()
        before = {name: mask.clone() for name, mask in self.masks.items()}
        chosen = select_masks(self.scores(), self.selection, self.alive)
        for name, part in self.parts.items():
            part.mask.copy_(chosen[name])
        vectors = {name: self._named[name] for name in self.masks if name not in self.parts}
        values = {name: vector.detach().clone() for name, vector in vectors.items()}
        try:
            with torch.no_grad():
                for name, vector in vectors.items():
                    vector.masked_fill_(~self.masks[name], 0)
            with effective_weights(self.model):
                yield
        finally:
            with torch.no_grad():
                for name, vector in vectors.items():
                    vector.copy_(values[name])
            for name, part in self.parts.items():
                part.mask.copy_(before[name])

    def check(self) -> None:
        chosen = select_masks(self.scores(), self.selection, self.alive)
        check_layers(chosen, self.selection.sparsity)

    @torch.no_grad()
    def detach(self) -> None:
        """Give the model plain weights back: those that its layers computed with."""
        for name, part in self.parts.items():
            self.trained[name].copy_(part(self.trained[name]))
        detach(self.model)
        for weight in self.trained.values():
            weight.grad = None
