"""The attacks of pyautoattack with the settings of a recipe, and what they say in the log."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from pyautoattack import AutoAttack
from torch import Tensor

from prunekit.contracts import Threat
from prunekit_adversarial import TARGETS, AutoAttackOptions

DRAWS = 20
"""Draws over which version `rand`, for networks that answer at random, averages a gradient."""


def make_suite(
    threat: Threat,
    options: AutoAttackOptions,
    logits: Callable[[Tensor], Tensor],
    device: torch.device,
    classes: int,
    random: bool = False,
) -> AutoAttack:
    """AutoAttack with its standard settings, except for those in the options."""
    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    suite = AutoAttack(logits, norm=norm, eps=threat.eps, seed=options.seed, device=device)
    steps, targets = options.steps, min(TARGETS, classes - 1)
    for apgd in (suite.apgd, suite.apgd_targeted):
        # The checkpoints of its step size are fractions of the number of steps; the constructor
        # computed them for its default number.
        apgd.n_iter = steps
        apgd.n_iter_2 = max(int(0.22 * steps), 1)
        apgd.n_iter_min = max(int(0.06 * steps), 1)
        apgd.size_decr = max(int(0.03 * steps), 1)
    suite.apgd.n_restarts = suite.fab.n_restarts = options.restarts
    suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = targets
    suite.fab.n_iter = steps
    suite.square.n_queries = options.queries
    if random:
        suite.version = "rand"
        suite.apgd.eot_iter = suite.apgd_targeted.eot_iter = DRAWS
    return suite


@contextmanager
def listening(doubts: dict[str, str]) -> Iterator[None]:
    """Collects AutoAttack's log warnings in `doubts`; of those that differ only in numbers, one."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage().partition(" See flags_doc")[0].strip()
            doubts.setdefault(re.sub(r"\d+", "#", text), text)

    logger, listener = logging.getLogger("auto-attack"), Listener(logging.WARNING)
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)
