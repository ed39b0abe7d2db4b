"""An exponential moving average of what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prunekit.contexts import NetworkContext
from prunekit.steps import Now
from prunekit_wrappers import EmaOptions


@dataclass
class Ema:
    """average = d * average + (1 - d) * value after each step, d = min(decay, (1 + t) / (10 + t)).

    t counts the steps from 0; the average starts at the values after the first. Averaged are the
    parameters that train (scores too), and the buffers of floats, such as running statistics. What
    a mask removes is zero in the average, and starts at its value where it grows again.
    """

    decay: float
    average: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def after_step(self, now: Now) -> None:
        """Move the average."""
        values = _find_moving(now.model)
        if not self.average:
            self.average = {name: value.detach().clone() for name, value in values.items()}
        step = now.clock.step
        decay = min(self.decay, (1 + step) / (10 + step))
        masked = now.masks.keys() & self.average.keys()
        for name, value in values.items():
            average = self.average[name]
            if name in masked:  # what grows again starts at its value, as the average did
                average.copy_(torch.where(average == 0, value, average))
            average.lerp_(value.detach(), 1 - decay)
        for name in masked:
            self.average[name].masked_fill_(~now.masks[name], 0)

    @contextmanager
    def judged(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model holds the average."""
        values = {name: value.detach() for name, value in _find_moving(model).items()}
        before = {name: value.clone() for name, value in values.items()}
        for name, value in self.average.items():
            values[name].copy_(value)
        try:
            yield
        finally:
            for name, value in values.items():
                value.copy_(before[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The average."""
        return self.average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.average = {name: value.clone() for name, value in state.items()}


def _find_moving(model: nn.Module) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | {n: b for n, b in model.named_buffers() if b.is_floating_point()}


def build(options: EmaOptions, context: NetworkContext) -> Ema:
    """Build the wrapper `ema`."""
    return Ema(options.decay)
