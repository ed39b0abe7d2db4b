"""Judgements by attack: clean accuracy, and accuracy under PGD with restarts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit import NoOptions
from prunekit.contracts import Context, Evaluator, Result
from prunekit.evaluation import proportion
from prunekit_adversarial import PgdOptions
from prunekit_adversarial.attacks import Attack, climb, is_correct, plan_attack, predict

ROBUST = -1
MISCLASSIFIED = -2
"""What the record `restart` says of images that no restart fooled, and that needed none."""


@torch.no_grad()
def evaluate_clean(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Result:
    """Accuracy. Records: `prediction` (N,) int64 and `correct` (N,) bool."""
    predictions, verdicts = [], []
    for x, y in batches:
        logits = predict(model, x)
        predictions.append(logits.argmax(1).cpu().numpy())
        verdicts.append(is_correct(logits, y).cpu().numpy())
    correct = np.concatenate(verdicts)
    return Result(
        proportion("accuracy", correct),
        {"prediction": np.concatenate(predictions), "correct": correct},
    )


@dataclass(frozen=True)
class Pgd:
    """Accuracy under PGD on the cross-entropy, worst case over restarts from uniform starts.

    An image that is misclassified as it is counts as fooled; a fooled image leaves the batch. With
    `iterate` "last" the last iterate of a restart decides, with "any" the first that fools.

    The metric `zero_gradient` counts the images whose input gradient was exactly zero at their
    first start: attacks by gradient say little about those. Records: `correct` (N,) bool, `restart`
    (N,) int16, the restart that fooled the image, or `ROBUST`, or `MISCLASSIFIED`.
    """

    attack: Attack
    restarts: int
    iterate: Literal["last", "any"]

    def __call__(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Result:
        found, zero_gradient = [], 0
        for x, y in batches:
            records, zeros = self.attack_batch(model, x, y)
            found.append(records.cpu().numpy())
            zero_gradient += zeros
        restart = np.concatenate(found)
        correct = restart == ROBUST
        metrics = proportion("accuracy", correct) | {"zero_gradient": zero_gradient}
        return Result(metrics, {"correct": correct, "restart": restart})

    def attack_batch(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """The record `restart` (B,) and the number of images without a gradient."""
        with torch.no_grad():
            correct = is_correct(predict(model, x), y)
        restart = torch.where(correct, ROBUST, MISCLASSIFIED).to(torch.int16)
        zeros = 0
        for number in range(self.restarts):
            left = (restart == ROBUST).nonzero().squeeze(1)
            if not len(left):
                break
            fooled, flat = self.climb_once(model, x[left], y[left])
            restart[left[fooled]] = number
            if number == 0:
                zeros = int(flat.sum())
        return restart, zeros

    def climb_once(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One restart: (B,) booleans, whether it fooled, and whether its first gradient was 0."""
        fooled = flat = torch.zeros_like(y, dtype=torch.bool)
        left = torch.arange(len(y), device=y.device)
        adversarial = self.attack.ball.start(x)
        for step in range(self.attack.steps):
            loss = partial(F.cross_entropy, target=y, reduction="sum")
            ahead, logits, gradient = climb(model, x, adversarial, loss, self.attack)
            if step == 0:
                flat = (gradient == 0).flatten(1).all(1)
            if self.iterate == "any":
                stands = is_correct(logits, y)
                fooled = fooled.index_fill(0, left[~stands], True)
                left, x, y, ahead = (t[stands] for t in (left, x, y, ahead))
            if not len(left):
                return fooled, flat
            adversarial = ahead
        with torch.no_grad():
            last = is_correct(predict(model, adversarial), y)
        return fooled.index_fill(0, left[~last], True), flat


def build_clean(options: NoOptions, context: Context) -> Evaluator:
    return evaluate_clean


def build_pgd(options: PgdOptions, context: Context) -> Pgd:
    attack = plan_attack(context.threat, options.steps, options.step_size)
    return Pgd(attack, options.restarts, options.iterate)
