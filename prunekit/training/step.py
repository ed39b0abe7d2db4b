"""One optimizer step: its passes, what goes around them, and the masks behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.contracts import Attacking, Clock, Loss, Objective, OptimizerChoice, Stepping
from prunekit.data import seeds
from prunekit.evaluation import running
from prunekit.steps import Around, Following, Masking, Now, Wrapper
from prunekit.training.masking import LearnedScores
from prunekit.training.rewiring import Rewired


class Step(nn.Module):
    """The loss of a training step as a module: it registers the model, never the objective."""

    def __init__(self, masking: Masking, objective: Objective) -> None:
        super().__init__()
        self.model = masking.model
        self._parts = (masking, objective)

    def forward(self, x: Tensor, y: Tensor, clock: Clock, *prepared: Any) -> Loss:
        """The loss at images x (B, C, H, W) with labels y (B,), or at what was `prepared`."""
        masking, objective = self._parts
        with running(self.model, masking.kept_only(clock)):
            loss: Any = objective.loss if isinstance(objective, Attacking) else None
            found: Loss = loss(*prepared, clock) if prepared else objective(x, y, clock)
        return found


def look(masking: Masking, clock: Clock) -> Now:
    """The step as wrappers see it."""
    parts = masking.parts if isinstance(masking, LearnedScores) else {}
    scores = {name: part.score for name, part in parts.items()}
    seen = (masking.weights(), masking.masks, masking.gradients)
    return Now(clock, masking.model, *seen, scores)


@dataclass
class Stepper:
    """Takes the steps of one training."""

    masking: Masking
    objective: Objective
    choice: OptimizerChoice
    seed: tuple[int, int]
    clip_norm: float | None = None
    wrappers: Sequence[Wrapper] = ()
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        groups = [g for g in self.masking.parameters() if g.parameters]
        self._parameters = [p for group in groups for p in group.parameters]
        self._rates = {id(p): group.rate for group in groups for p in group.parameters}
        own = [
            {"params": list(g.parameters)} | ({} if g.decay is None else {"weight_decay": g.decay})
            for g in groups
        ]
        if own:
            self.optimizer = self.choice.make(own)
        self._module = Step(self.masking, self.objective)
        self._around = [wrapper for wrapper in self.wrappers if isinstance(wrapper, Around)]

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return bool(self._parameters)

    def take(
        self, x: Tensor, y: Tensor, clock: Clock, history: Sequence[Mapping[str, Any]]
    ) -> Loss:
        """One step at the schedule's rate, on images x (B, C, H, W) with labels y (B,)."""
        masking, optimizer = self.masking, self.optimizer
        rate = self.choice.lr * self.choice.schedule(clock)
        for group in optimizer.param_groups:
            # An optimizer may form groups of its own, within those that it was given.
            group["lr"] = rate * self._rates[id(group["params"][0])]
        rewired = masking if isinstance(masking, Rewired) and masking.due(clock) else None
        dense: dict[str, Tensor] = {}
        now = look(masking, clock)
        go = self._prepare(x, y, clock, rewired, dense)
        for outer in reversed(self._around):
            go = partial(outer.around, go, now)
        loss = go()
        if rewired is not None:
            # Of a loss that is not finite the loop tells; masks would follow its gradients.
            if loss.value.isfinite():
                rewired.rewire(clock, optimizer, history, dense)
        else:
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self._parameters, self.clip_norm)
            optimizer.step()
            masking.after_step()
        if isinstance(self.objective, Stepping):
            self.objective.after_step()
        for wrapper in self.wrappers:
            if isinstance(wrapper, Following):
                wrapper.after_step(now)
        return loss

    def _prepare(
        self, x: Tensor, y: Tensor, clock: Clock, rewired: Rewired | None, dense: dict[str, Tensor]
    ) -> Callable[[], Loss]:
        """A function that does one forward and one backward; see `Around.around`.

        It puts the gradients at all weights that are `rewired` into `dense`.
        """
        masking = self.masking
        prepared: tuple[Any, ...] = ()
        before: dict[str, Tensor] = {}
        if self._around:
            # What masks decide once in a step they decide at the weights that no wrapper changed.
            with masking.effective(clock):
                if isinstance(self.objective, Attacking):
                    prepared = (self.objective.prepare(x, y, clock),)
            before = {name: b.clone() for name, b in masking.model.named_buffers()}

        def go() -> Loss:
            if self._around:
                seeds.seed_all(*self.seed, "pass", clock.step)
                for name, buffer in masking.model.named_buffers():
                    buffer.copy_(before[name])
            self.optimizer.zero_grad(set_to_none=True)
            with masking.effective(clock, lend=bool(self._around)):
                loss: Loss = self._module(x, y, clock, *prepared)
                if penalties := masking.penalty(clock):
                    value = loss.value + sum(penalties.values())
                    loss = replace(loss, value=value, terms={**loss.terms, **penalties})
                loss.value.backward()
            if rewired is not None and rewired.rewiring.gradients:
                dense.update(rewired.lend())
            masking.after_backward()
            return loss

        return go
