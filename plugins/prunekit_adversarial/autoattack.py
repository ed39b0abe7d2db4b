"""AutoAttack, run with pyautoattack (a port of the reference code), for any number of classes."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from prunekit import read_json, write_json
from prunekit.contexts import EvaluatorContext
from prunekit.contracts import Metric, Result, Threat
from prunekit.errors import UserError
from prunekit.evaluation import frozen, proportion
from prunekit_adversarial import ATTACKS, FEW_CLASSES, TARGETS, AutoAttackOptions
from prunekit_adversarial.attacks import check_threat, is_correct, predict

ROBUST, MISCLASSIFIED = "robust", "misclassified"
"""Values of the record `attack` for images that no attack fooled, and that needed no attack."""

DLR = {"apgd-dlr", "apgd-t"}
"""Attacks whose loss compares the 4 largest logits (3 if untargeted)."""

SQUARE_GAIN = 0.002
"""If Square, which uses no gradients, fools more than this fraction, gradients may mislead."""


@dataclass(frozen=True)
class Evaluation:
    """Accuracy under several attacks in turn; an image that was fooled is not attacked again.

    By default the attacks are those of standard AutoAttack (Croce and Hein, ICML 2020),
    with min(9, K - 1) targets; for fewer than 4 classes they are APGD-CE, FAB and Square.

    Metrics: `accuracy` with its interval, `seed`, and `standard`, which is 1 if attacks and budgets
    are those of standard AutoAttack, else 0. Records: `correct` (N,) bool; `attack` (N,), the name
    of the attack that fooled the image, or `ROBUST`, or `MISCLASSIFIED`. AutoAttack's own doubts
    about a result are issued as warnings.

    Every attack is seeded with `seed` on every batch, so batches do not depend on each other. With
    a folder `scratch`, finished attacks on a batch are stored there, and an interrupted evaluation
    resumes after the last one with the same result. `pause` is called after each forward pass and
    may raise. (pyautoattack 0.2.0 has a `state_path` for this, but
    cannot read it back, and would restart the interrupted attack with the remaining images.)

    Raises `UserError` if an attack named in the recipe needs more classes.
    """

    threat: Threat
    options: AutoAttackOptions
    scratch: Path | None = None
    pause: Callable[[], None] = lambda: None

    def __call__(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Result:
        kept = self.scratch / "autoattack.json" if self.scratch else None
        fooled: list[str] = []
        doubts: dict[str, str] = {}
        begun: list[list[str]] = []
        if kept is not None and kept.exists():
            fooled, doubts, *begun = read_json(kept)

        def keep(*begun: list[str]) -> None:
            if kept is not None:
                write_json(kept, [fooled, doubts, *begun])

        done, seen, classes = len(fooled), 0, 0
        with frozen(model) as model, listening(doubts):
            for x, y in batches:
                seen += len(y)
                if not classes:
                    classes = self._count_classes(model, x)
                if seen <= done:
                    continue
                fooled += self._attack_batch(model, x, y, classes, begun, keep)
                begun = []
                keep()
        attack = np.array(fooled)
        correct = attack == ROBUST
        self._warn(attack, self._choose(classes), doubts)
        metrics = {
            "accuracy": proportion(correct),
            "standard": Metric(
                self._is_standard(classes),
                kind="setting",
                note="not its standard attacks and budgets in all rows; compare only like rows",
            ),
            "seed": Metric(self.options.seed, kind="setting"),
        }
        return Result(metrics, {"correct": correct, "attack": attack})

    @torch.no_grad()
    def _count_classes(self, model: nn.Module, x: Tensor) -> int:
        """The number of classes K, read off the logits of one image of x (B, C, H, W).

        Raises `UserError` if an attack named in the recipe needs more classes.
        """
        classes = predict(model, x[:1]).shape[1]
        if classes < 4 and (wrong := DLR.intersection(self.options.attacks or ())):
            raise UserError(
                f"autoattack: {min(wrong)} needs at least 4 classes, but this network has "
                f"{classes}; leave out attacks, or write attacks = {json.dumps(FEW_CLASSES)}"
            )
        return classes

    def _choose(self, classes: int) -> Sequence[str]:
        """The names of the attacks for this number of classes, in order."""
        return self.options.attacks or (ATTACKS if classes >= 4 else FEW_CLASSES)

    def _is_standard(self, classes: int) -> bool:
        """Whether attacks and budgets are those of standard AutoAttack."""
        budgets = (self.options.steps, self.options.queries, self.options.restarts)
        return tuple(self._choose(classes)) == ATTACKS and budgets == (100, 5000, 1)

    def _attack_batch(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        classes: int,
        begun: Sequence[list[str]] = (),
        keep: Callable[[list[str], list[str]], None] = lambda found, done: None,
    ) -> list[str]:
        """The record `attack` of each image of x (B, C, H, W) in [0, 1], with labels y (B,).

        `keep` gets the record after each attack, and which are done; `begun` is what it got.
        """

        def logits(images: Tensor) -> Tensor:
            self.pause()
            return predict(model, images)

        with torch.no_grad():
            correct = is_correct(predict(model, x), y).cpu().numpy()
        found = np.where(correct, ROBUST, MISCLASSIFIED).astype(object)
        done: list[str] = []
        if begun:
            found, done = np.array(begun[0], dtype=object), begun[1]
        suite = self._make_suite(logits, x.device, classes)
        for name in self._choose(classes)[len(done) :]:
            left = np.flatnonzero(found == ROBUST)
            if not len(left):
                break
            suite.attacks_to_run = [name]
            index = torch.from_numpy(left).to(x.device)
            # Its checks switch off whatever traces the process: a debugger, coverage.
            tracer = sys.gettrace()
            _, prediction = suite.run_standard_evaluation(x[index], y[index], batch_size=len(left))
            sys.settrace(tracer)
            found[left[(prediction != y[index]).cpu().numpy()]] = name
            done = [*done, name]
            keep(list(found), done)
        return list(found)

    def _make_suite(
        self, logits: Callable[[Tensor], Tensor], device: torch.device, classes: int
    ) -> AutoAttack:
        """AutoAttack with its standard settings, except for those in the options."""
        norm = {"linf": "Linf", "l2": "L2"}[self.threat.norm]
        suite = AutoAttack(
            logits, norm=norm, eps=self.threat.eps, seed=self.options.seed, device=device
        )
        steps, targets = self.options.steps, min(TARGETS, classes - 1)
        for apgd in (suite.apgd, suite.apgd_targeted):
            # The checkpoints of its step size are fractions of the number of steps; the constructor
            # computed them for its default number.
            apgd.n_iter = steps
            apgd.n_iter_2 = max(int(0.22 * steps), 1)
            apgd.n_iter_min = max(int(0.06 * steps), 1)
            apgd.size_decr = max(int(0.03 * steps), 1)
        suite.apgd.n_restarts = suite.fab.n_restarts = self.options.restarts
        suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = targets
        suite.fab.n_iter = steps
        suite.square.n_queries = self.options.queries
        return suite

    def _warn(self, attack: np.ndarray, chosen: Sequence[str], doubts: dict[str, str]) -> None:
        """Warn of AutoAttack's `doubts`, and if Square fooled many images (`SQUARE_GAIN`).

        `attack` (N,) is the record; `chosen` are the attacks that ran.
        """
        texts = list(doubts.values())
        square = float((attack == "square").mean())
        if "square" in chosen[1:] and square > SQUARE_GAIN:
            texts.append(
                f"Square, which uses no gradients, fooled {square:.1%} of the images after the "
                "gradient attacks had failed; gradients may be masked here, and the accuracy "
                "overestimated"
            )
        for text in texts:
            warnings.warn(f"autoattack: {text}", stacklevel=3)


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


def build_autoattack(options: AutoAttackOptions, context: EvaluatorContext) -> Evaluation:
    """Build the evaluator `autoattack`; raises `UserError` if there is no threat."""
    threat = check_threat(context.threat)
    return Evaluation(threat, options, context.scratch, context.pause)
