"""Weights whose masks change while they train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.contracts import Clock, Masks
from prunekit.data import seeds
from prunekit.errors import RunError
from prunekit.graph.groups import Group, follow
from prunekit.graph.leaking import LEAK
from prunekit.pruning.selection import (
    Selection,
    check_layers,
    check_scores,
    meets,
    select_masks,
)
from prunekit.steps import Moment, Rewirer, SparsitySchedule
from prunekit.training.masking import Weights


@dataclass(frozen=True)
class Rewiring:
    """What rewires a stage: the rewirer, how much it removes, of which weights.

    `groups` have the vectors that lose an entry with a channel; `seed` is (run seed, stage
    position).
    """

    rewirer: Rewirer
    name: str
    selection: Selection
    schedule: SparsitySchedule
    weights: Sequence[str]
    seed: tuple[int, int]
    gradients: bool = False
    allocates: bool = False
    groups: Sequence[Group] = ()
    trained: bool = False
    rehearsed: bool = False
    """The stage is tried on a few batches: its last step rewires in any case."""


class Rewired(Weights):
    """Trains weights whose masks a rewirer changes.

    The masks are buffers of the layers (`weight_kept`) while the stage lasts, so that progress, the
    best epoch and the result hold them; `rewired` of the model says whether they are at the target.
    """

    def __init__(self, model: nn.Module, masks: Masks, rewiring: Rewiring) -> None:
        self.rewiring = rewiring
        self._scales = {name for group in rewiring.groups for name in group.scales}
        named = dict(model.named_parameters())
        vectors = [name for group in rewiring.groups for name in group.vectors]
        moving = dict.fromkeys([*rewiring.weights, *vectors])
        live: Masks = {}
        for name in moving:
            mask = masks.get(name, torch.ones_like(named[name], dtype=torch.bool))
            owner, _, own = name.rpartition(".")
            model.get_submodule(owner).register_buffer(f"{own}_kept", mask.clone())
            live[name] = model.get_buffer(f"{name}_kept")
        model.register_buffer("rewired", torch.zeros((), dtype=torch.bool))
        super().__init__(model, {**masks, **live})

    def due(self, clock: Clock) -> bool:
        """Whether this step rewires; the last one does if the masks are not at the target."""
        if clock.step + 1 == clock.steps and (self.rewiring.rehearsed or not self._at_target):
            return True
        return clock.step > 0 and self.rewiring.rewirer.due(clock)

    def idles(self, clocks: Iterable[Clock]) -> bool:
        """Whether it is due at none of these moments, those between the first and the last step."""
        rewiring = self.rewiring
        return not (rewiring.rehearsed or any(rewiring.rewirer.due(clock) for clock in clocks))

    @property
    def _at_target(self) -> bool:
        return bool(self.model.get_buffer("rewired"))

    def kept_only(self, clock: Clock) -> Masks:
        dense = self.rewiring.gradients and self.due(clock)
        return {} if dense else self.masks

    def settled(self, clock: Clock) -> bool:
        return self._at_target

    def lend(self) -> dict[str, Tensor]:
        """The gradients of the last backward at all weights that are rewired, before masking."""
        named = {name: self._named[name] for name in self.rewiring.weights}
        return {
            n: torch.zeros_like(w) if w.grad is None else w.grad.clone() for n, w in named.items()
        }

    @torch.no_grad()
    def rewire(
        self,
        clock: Clock,
        optimizer: torch.optim.Optimizer,
        history: Sequence[Mapping[str, Any]] = (),
        gradients: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Let the rewirer choose masks; without `gradients` it is the first call of the stage.

        What is not kept, and what is kept anew, is zero afterwards, and so is every state of the
        optimizer for it (but a channel that grows starts with a scale of 1, and `LEAK` as shift).
        Raises `RunError` for scores that do not fit, or miss the target in the last step.
        """
        plan, final = self.rewiring, clock.step + 1 == clock.steps
        end = Clock(clock.steps, clock.steps, clock.epochs, clock.epochs)
        target = plan.selection.sparsity
        sparsity = target * plan.schedule(end if final else clock)
        choose = partial(select_masks, selection=replace(plan.selection, sparsity=sparsity))
        weights = {name: self._named[name].detach() for name in plan.weights}
        moment = Moment(
            clock,
            sparsity,
            weights,
            {name: self.masks[name].clone() for name in plan.weights},
            gradients or {},
            history,
            seeds.generator(*plan.seed, "rewire", clock.step),
            choose,
            first=gradients is None,
            final=final,
            trained=plan.trained,
        )
        seeds.seed_all(*plan.seed, "rewire", clock.step)
        scores = plan.rewirer(moment)
        check_scores(scores, weights, f"rewirer {plan.name!r}", allocates=plan.allocates)
        chosen = choose(scores)
        check_layers(chosen, sparsity)
        reached = meets(scores, plan.selection) if scores.keep else sparsity == target
        if final and not reached:
            raise RunError(f"rewirer {plan.name!r} does not end at sparsity {target:g}")
        self.model.get_buffer("rewired").fill_(reached)
        chosen |= follow(chosen, plan.groups)
        for name, mask in chosen.items():
            self._change(name, mask, optimizer)

    def _change(self, name: str, mask: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Set the mask of a weight; see `rewire`."""
        before, weight = self.masks[name], self._named[name]
        stays = before & mask
        weight.masked_fill_(~stays, 0)
        if weight.dim() == 1:
            # A channel cannot grow from nothing: not behind a normalization's scale of zero, nor
            # before a ReLU, whose derivative at 0 is zero.
            weight.masked_fill_(mask & ~before, 1.0 if name in self._scales else LEAK)
        for state in _shaped_like(weight, optimizer.state.get(weight, {}).values()):
            state.masked_fill_(~stays, 0)
        before.copy_(mask)

    def detach(self) -> None:
        """Take the buffers off the model; `masks` stays."""
        self._masks = {name: mask.clone() for name, mask in self.masks.items()}
        for module in self.model.modules():
            for name in [n for n in module._buffers if n.endswith("_kept")]:
                del module._buffers[name]
        del self.model._buffers["rewired"]


def _shaped_like(weight: Tensor, states: Iterable[Any]) -> list[Tensor]:
    return [s for s in states if isinstance(s, Tensor) and s.shape == weight.shape]
