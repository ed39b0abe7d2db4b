"""Optimizers and learning-rate schedules. A schedule is a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from prunekit.contracts import Clock, Context, OptimizerChoice, Schedule
from prunekit_optimizers import (
    AdamOptions,
    AdamWOptions,
    ConstantOptions,
    CosineOptions,
    SgdOptions,
    StepOptions,
)


def constant(options: ConstantOptions, context: Context) -> Schedule:
    """Factor 1."""
    return _warmed(options.warmup, lambda clock: 1.0)


def cosine(options: CosineOptions, context: Context) -> Schedule:
    """final + (1 - final) (1 + cos(pi t)) / 2, t the part of the stage that is done.

    t counts optimizer steps, or whole epochs with `every = "epoch"`.
    """

    def factor(clock: Clock) -> float:
        done = clock.fraction if options.every == "step" else clock.epoch / clock.epochs
        return options.final + (1 - options.final) * (1 + math.cos(math.pi * done)) / 2

    return _warmed(options.warmup, factor)


def step_decay(options: StepOptions, context: Context) -> Schedule:
    """factor to the power of the milestones that are passed."""
    return _warmed(
        options.warmup,
        lambda clock: options.factor ** sum(clock.fraction >= m for m in options.milestones),
    )


def _warmed(epochs: float, factor: Schedule) -> Schedule:
    def warm(clock: Clock) -> float:
        steps = epochs * clock.steps / clock.epochs
        return factor(clock) * min(1.0, (clock.step + 1) / steps if steps else 1.0)

    return warm


def _choice(
    make: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
    options: Any,
    context: Context,
) -> OptimizerChoice:
    return OptimizerChoice(make, options.lr, options.schedule.build(context))


def sgd(options: SgdOptions, context: Context) -> OptimizerChoice:
    return _choice(
        lambda parameters: torch.optim.SGD(
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
    return _choice(
        lambda parameters: torch.optim.Adam(
            parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay
        ),
        options,
        context,
    )


def adamw(options: AdamWOptions, context: Context) -> OptimizerChoice:
    return _choice(
        lambda parameters: torch.optim.AdamW(
            parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay
        ),
        options,
        context,
    )
