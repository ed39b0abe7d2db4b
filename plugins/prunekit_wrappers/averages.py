"""Averages of what is trained: exponential (EMA), and over epochs (SWA)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prunekit import exact
from prunekit.contexts import NetworkContext
from prunekit.contracts import Clock
from prunekit.steps import Now
from prunekit_wrappers import EmaOptions, SwaOptions, count_batches


@dataclass
class Average:
    """average = (1 - r) * average + r * value after each step, r = `rate`(clock) in [0, 1].

    The average starts at the values after the first step with a rate above 0; until then the
    trained network is judged. Averaged are the parameters that train (scores too), and the buffers
    of floats, such as running statistics, which are measured anew on `recalibrate` batches before
    the average is judged. What a mask removes is zero in the average, and starts at its value where
    it grows again.
    """

    rate: Callable[[Clock], float]
    recalibrate: int = 0
    average: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def after_step(self, now: Now) -> None:
        """Move the average."""
        rate = self.rate(now.clock)
        values = _find_moving(now.model) if rate else {}
        if not self.average:
            self.average = {name: value.detach().clone() for name, value in values.items()}
        masked = now.masks.keys() & self.average.keys()
        for name, value in values.items():
            average = self.average[name]
            if name in masked:  # what grows again starts at its value, as the average did
                average.copy_(torch.where(average == 0, value, average))
            average.lerp_(value.detach(), rate)
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

    def batches(self, clock: Clock) -> int:
        """Batches on which the average's statistics are measured; none before there is one."""
        return self.recalibrate if self.average else 0

    def state_dict(self) -> dict[str, Tensor]:
        """The average."""
        return self.average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.average = {name: value.clone() for name, value in state.items()}


def _find_moving(model: nn.Module) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | {n: b for n, b in model.named_buffers() if b.is_floating_point()}


def build_ema(options: EmaOptions, context: NetworkContext) -> Average:
    """Build `ema`: r = 1 - min(decay, (1 + t) / (10 + t)) in step t, counted from 0."""

    def rate(clock: Clock) -> float:
        return 1 - min(options.decay, (1 + clock.step) / (10 + clock.step))

    return Average(rate, count_batches(options))


def build_swa(options: SwaOptions, context: NetworkContext) -> Average:
    """Build `swa`: r = 1 / n after the n-th epoch from `start` on (Izmailov et al., UAI 2018,
    section 3.2), which makes it their mean."""

    def rate(clock: Clock) -> float:
        last = (clock.step + 1) % (clock.steps // clock.epochs) == 0
        n = clock.epoch + 1 - int(exact(options.start) * clock.epochs)
        return 1 / n if last and n > 0 else 0.0

    return Average(rate, count_batches(options))
