"""How the sparsity grows during a stage: pure functions of the step."""

from __future__ import annotations

from prunekit import NoOptions
from prunekit.contexts import Context
from prunekit.contracts import Clock
from prunekit.steps import SparsitySchedule
from prunekit_budgets import RampOptions


def build_constant(options: NoOptions, context: Context) -> SparsitySchedule:
    """1 throughout."""
    return lambda clock: 1.0


def build_linear(options: RampOptions, context: Context) -> SparsitySchedule:
    """t, the fraction that is done of the part from `start` to `end`."""
    return lambda clock: _progress(options, clock)


def build_cubic(options: RampOptions, context: Context) -> SparsitySchedule:
    """1 - (1 - t)^3, with t as for `linear` (Zhu and Gupta 2017, equation 1, from sparsity 0)."""
    return lambda clock: 1 - (1 - _progress(options, clock)) ** 3


def _progress(options: RampOptions, clock: Clock) -> float:
    done = (clock.fraction - options.start) / (options.end - options.start)
    return min(1.0, max(0.0, done))
