"""Optimizers and learning-rate schedules. A schedule is a pure function of the step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from prunekit.contexts import Context
from prunekit.contracts import Clock, OptimizerChoice, Schedule
from prunekit_optimizers import (
    AdamOptions,
    AdamWOptions,
    ConstantOptions,
    CosineOptions,
    CyclicOptions,
    SgdOptions,
    StepOptions,
)


def constant(options: ConstantOptions, context: Context) -> Schedule:
    """The factor 1, after the warmup."""
    return _warmed(options.warmup, lambda clock: 1.0)


def cosine(options: CosineOptions, context: Context) -> Schedule:
    """final + (1 - final) (1 + cos(pi t)) / 2, where t is the fraction of the stage that is done.

    t counts optimizer steps, or whole epochs with `every = "epoch"` (Loshchilov and Hutter, ICLR
    2017, equation 5, without restarts).
    """

    def factor(clock: Clock) -> float:
        done = clock.fraction if options.every == "step" else clock.epoch / clock.epochs
        return options.final + (1 - options.final) * (1 + math.cos(math.pi * done)) / 2

    return _warmed(options.warmup, factor)


def step_decay(options: StepOptions, context: Context) -> Schedule:
    """`factor` to the power of the number of milestones that have passed."""
    return _warmed(
        options.warmup,
        lambda clock: options.factor ** sum(clock.fraction >= m for m in options.milestones),
    )


def cyclic(options: CyclicOptions, context: Context) -> Schedule:
    """t / peak, then (1 - t) / (1 - peak), where t is the fraction of the stage that is done.

    One cycle (Smith, WACV 2017, arXiv 1506.01186), as fast adversarial training takes it.
    """
    peak = options.peak
    return lambda clock: min(clock.fraction / peak, (1 - clock.fraction) / (1 - peak))


def _warmed(epochs: float, factor: Schedule) -> Schedule:
    """The schedule, multiplied by a factor that grows linearly to 1 over the first epochs."""

    def warm(clock: Clock) -> float:
        steps = epochs * clock.steps / clock.epochs
        return factor(clock) * min(1.0, (clock.step + 1) / steps if steps else 1.0)

    return warm


def _eager(kind: type[Optimizer]) -> Callable[..., Optimizer]:
    """The optimizer without what torch puts around its methods for a step that is compiled.

    That imports torch's compiler, which takes longer than torch itself. Nothing else changes:
    hooks and the profiler see it, and so does `torch.compile`.
    """
    around = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    own = {name: inspect.unwrap(getattr(kind, name)) for name in around}
    return type(kind.__name__, (kind,), {**own, "step": torch.no_grad()(inspect.unwrap(kind.step))})


_SGD, _ADAM, _ADAMW = map(_eager, (SGD, Adam, AdamW))


def _choice(
    make: Callable[[Iterable[torch.nn.Parameter]], Optimizer],
    options: Any,
    context: Context,
) -> OptimizerChoice:
    return OptimizerChoice(make, options.lr, options.schedule.build(context))


def sgd(options: SgdOptions, context: Context) -> OptimizerChoice:
    """`torch.optim.SGD` with these options and their schedule."""
    return _choice(
        lambda parameters: _SGD(
            parameters,
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=options.nesterov,
        ),
        options,
        context,
    )


def adam(options: AdamOptions, context: Context) -> OptimizerChoice:
    """`torch.optim.Adam` with these options and their schedule (Kingma and Ba, ICLR 2015)."""
    return _choice(
        lambda parameters: _ADAM(
            parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay
        ),
        options,
        context,
    )


def adamw(options: AdamWOptions, context: Context) -> OptimizerChoice:
    """`torch.optim.AdamW` with these options and their schedule (Loshchilov and Hutter, 2019)."""
    return _choice(
        lambda parameters: _ADAMW(
            parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay
        ),
        options,
        context,
    )
