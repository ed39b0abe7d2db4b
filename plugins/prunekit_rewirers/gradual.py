"""Gradual magnitude pruning."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.contexts import NetworkContext
from prunekit.contracts import Clock, Scores
from prunekit.errors import RunError
from prunekit.steps import Moment, Rewirer
from prunekit_rewirers import GradualOptions
from prunekit_rewirers.exchange import Exchange, anneal, measure


@dataclass(frozen=True)
class Gradual:
    """The largest |w| of what is left; how many is what the stage's schedule and budget say.

    With the schedule `cubic` that is Zhu and Gupta 2017, equation 1 from sparsity 0: every Δt steps
    the smallest weights go, until s_t = s_f - s_f (1 - (t - t_0) / (n Δt))^3 of all are removed.
    """

    target: float
    exchange: Exchange
    regrow: bool

    def due(self, clock: Clock) -> bool:
        """Whether to rewire in this step."""
        return self.exchange.due(clock)

    def __call__(self, moment: Moment) -> Scores:
        """|w|, above 0 for what is left and 0 elsewhere.

        Raises `RunError` where the whole sparsity holds from the first step on.
        """
        if moment.first and moment.sparsity >= self.target:
            raise RunError(
                "gradual needs a sparsity that grows during the stage; write "
                'sparsity_schedule = { use = "cubic", start = 0.1, end = 0.75 }'
            )
        if self.regrow and not moment.first:
            return self.exchange(moment)
        masks, first = moment.masks, moment.first
        return Scores({n: measure(w, masks[n] | first) for n, w in moment.weights.items()})


def build(options: GradualOptions, context: NetworkContext) -> Rewirer:
    """Build the rewirer `gradual`."""

    def count(clock: Clock, kept: int) -> int:
        return int(anneal(options.fraction, 0, clock.fraction) * kept)

    exchange = Exchange(lambda clock: options.every, count, "gradient", None)
    return Gradual(context.sparsity, exchange, options.regrow)
