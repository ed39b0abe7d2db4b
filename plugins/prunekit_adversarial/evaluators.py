"""Evaluators: clean accuracy, and accuracy under PGD with restarts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit import NoOptions, judge_batches
from prunekit.contexts import EvaluatorContext
from prunekit.contracts import Evaluator, Result
from prunekit.evaluation import proportion
from prunekit.judging import Watch
from prunekit_adversarial import PgdOptions
from prunekit_adversarial.again import attack_again, count_flat, is_flat
from prunekit_adversarial.attacks import (
    Attack,
    climb,
    differentiate,
    is_correct,
    plan_attack,
    predict,
)

ROBUST = -1
MISCLASSIFIED = -2
"""Values of the record `restart` for images that no restart fooled, and that needed none."""

QUERIES = 100
"""The least queries of Square at an image without a gradient."""


@torch.no_grad()
def evaluate_clean(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Result:
    """Accuracy on batches of images x (B, C, H, W) in [0, 1] with labels y (B,).

    Metrics: `accuracy` with its interval. Records: `prediction` (N,) int64, `correct` (N,) bool.
    """
    predictions, verdicts = [], []
    for x, y in batches:
        logits = predict(model, x)
        predictions.append(logits.argmax(1).cpu().numpy())
        verdicts.append(is_correct(logits, y).cpu().numpy())
    correct = np.concatenate(verdicts)
    return Result(
        {"accuracy": proportion(correct)},
        {"prediction": np.concatenate(predictions), "correct": correct},
    )


@dataclass(frozen=True)
class Pgd:
    """Accuracy under PGD on the cross-entropy, worst case over restarts from uniform starts.

    An image that is misclassified without an attack counts as fooled; an image that was fooled is
    not attacked again. With `iterate` "last", the last iterate of a restart decides; with "any",
    one iterate that fools the network is enough. Source: Madry et al., ICLR 2018, section 2.1.

    Metrics: `accuracy` with its interval, and `zero_gradient`, the number of images whose input
    gradient was zero, or lost in rounding, at their first start: gradient attacks say little about
    them, so that those that are left are attacked again (`attack_again`). Records: `correct` (N,)
    bool; `restart` (N,) int16, the number of the restart that fooled the image, `restarts` for an
    attack whose gradient leaks, the next number for Square, the one after it where some iterate
    gave NaN or infinity; or `ROBUST`, or `MISCLASSIFIED`;
    `zero_gradient` (N,) bool. With a folder `scratch`, finished batches are kept there.

    Raises `RunError` where the network lets no gradient through to its images.
    """

    attack: Attack
    restarts: int
    iterate: Literal["last", "any"]
    scratch: Path | None = None
    watch: Watch = field(default_factory=Watch)

    def __call__(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Result:
        last: list[Tensor] = []

        def attack(x: Tensor, y: Tensor) -> dict[str, np.ndarray]:
            last[:] = [x[:1]]
            return self._attack_batch(model, x, y)

        found = judge_batches(attack, batches, self.scratch)
        found["correct"] = found["restart"] == ROBUST
        attacked = found["restart"] != MISCLASSIFIED
        if last and not attacked.any():
            # As in a rehearsal: a network that no attack could be made on is told anyway.
            differentiate(model, last[0], torch.sum)
        zeros = count_flat(found["zero_gradient"], attacked)
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            warnings.warn(
                "the network is scripted: where gradients vanish inside it, nothing can be put in "
                "their place; autoattack's square needs no gradients",
                stacklevel=2,
            )
        return Result({"accuracy": proportion(found["correct"]), "zero_gradient": zeros}, found)

    def _attack_batch(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, np.ndarray]:
        """The records `restart` and `zero_gradient`, (B,) each, of a batch.

        x is (B, C, H, W) in [0, 1], y is (B,).
        """
        restart, zeros = self._attack_images(model, x, y)
        unreal = [i for i in self.watch.find_unreal() if restart[i] == ROBUST]
        restart[unreal] = self.restarts + 2
        return {"restart": restart.cpu().numpy(), "zero_gradient": zeros.cpu().numpy()}

    def _attack_images(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The records as tensors, but for images whose iterates in between gave no numbers."""
        with torch.no_grad():
            correct = is_correct(predict(model, x), y)
        restart = torch.where(correct, ROBUST, MISCLASSIFIED).to(torch.int16)
        zeros = torch.zeros_like(correct)
        for number in range(self.restarts):
            left = (restart == ROBUST).nonzero().squeeze(1)
            if not len(left):
                break
            fooled, flat = self._climb_once(model, x[left], y[left])
            restart[left[fooled]] = number
            if number == 0:
                zeros[left] = flat
        left = (zeros & (restart == ROBUST)).nonzero().squeeze(1)
        if len(left):
            queries = max(QUERIES, 2 * self.restarts * self.attack.steps)
            leaking, either = attack_again(model, x[left], y[left], self.attack, queries)
            restart[left[either]] = self.restarts + 1
            restart[left[leaking]] = self.restarts
        return restart, zeros

    def _climb_once(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One restart on x (B, C, H, W) with labels y (B,).

        Returns booleans (B,) for each image: whether it was fooled, and whether its first gradient
        was zero.
        """
        fooled = flat = torch.zeros_like(y, dtype=torch.bool)
        left = torch.arange(len(y), device=y.device)
        adversarial = self.attack.ball.start(x)
        for step in range(self.attack.steps):
            loss = partial(F.cross_entropy, target=y, reduction="sum")
            ahead, logits, gradient = climb(model, x, adversarial, loss, self.attack)
            if step == 0:
                flat = is_flat(gradient, logits, y, self.attack.ball.eps)
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


def build_clean(options: NoOptions, context: EvaluatorContext) -> Evaluator:
    """Build the evaluator `clean`."""
    return evaluate_clean


def build_pgd(options: PgdOptions, context: EvaluatorContext) -> Pgd:
    """Build the evaluator `pgd`; raises `UserError` if there is no threat."""
    attack = plan_attack(context.threat, options.steps, options.step_size)
    return Pgd(attack, options.restarts, options.iterate, context.scratch, context.watch)
