"""AutoAttack, run with pyautoattack (a port of the reference code), for any number of classes."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit import read_kept, write_json
from prunekit.contexts import EvaluatorContext
from prunekit.contracts import Metric, Result, Threat
from prunekit.errors import UserError
from prunekit.evaluation import frozen, proportion
from prunekit.judging import Watch
from prunekit_adversarial import ATTACKS, FEW_CLASSES, AutoAttackOptions
from prunekit_adversarial.again import Finite, attack_again, count_flat, is_flat
from prunekit_adversarial.attacks import (
    check_threat,
    differentiate,
    is_correct,
    plan_attack,
    predict,
)
from prunekit_adversarial.suite import DRAWS, listening, make_suite

ROBUST, MISCLASSIFIED = "robust", "misclassified"
"""Values of the record `attack` for images that no attack fooled, and that needed no attack."""
LEAKING, NOT_FINITE = "leaking", "not-finite"
"""Values for images fooled by a gradient that leaks, and near which the network gives no numbers.
"""

RAND = ("apgd-ce", "apgd-dlr")
"""The attacks of its version `rand`, for networks that answer at random."""
BY_VALUE = {"square"}
"""Attacks that need no gradients."""

DLR = {"apgd-dlr", "apgd-t"}
"""Attacks whose loss compares the 4 largest logits (3 if untargeted)."""

SQUARE_GAIN = 0.002
"""If Square, which uses no gradients, fools more than this fraction, gradients may mislead."""


@dataclass(frozen=True)
class Evaluation:
    """Accuracy under several attacks in turn; an image that was fooled is not attacked again.

    By default the attacks are those of standard AutoAttack (Croce and Hein, ICML 2020),
    with min(9, K - 1) targets; for fewer than 4 classes they are APGD-CE, FAB and Square. For a
    network that answers at random they are those of AutoAttack's version `rand`, and the gradients
    of APGD are means over 20 draws whatever attacks are named. Images without a gradient that all
    attacks leave correct are attacked again (`attack_again`).

    Metrics: `accuracy` with its interval, `seed`, `standard`, which is 1 if attacks and budgets
    are those of standard AutoAttack, else 0, and `zero_gradient`, the number of images without a
    gradient, unless no attack uses one; `draws` for a random network. Records: `correct` (N,) bool;
    `attack` (N,), the name of the attack that fooled the image (`LEAKING` for one whose gradient
    leaks), or `ROBUST`, or `MISCLASSIFIED`; `zero_gradient` (N,) bool. AutoAttack's own doubts
    about a result are issued as warnings.

    Every attack is seeded with `seed` on every batch, so batches do not depend on each other. With
    a folder `scratch`, finished attacks on a batch are stored there, and an interrupted evaluation
    resumes after the last one with the same result. `pause` is called after each forward pass and
    may raise. (pyautoattack 0.2.0 has a `state_path` for this, but
    cannot read it back, and would restart the interrupted attack with the remaining images.)

    Raises `UserError` if an attack named in the recipe needs more classes, and `RunError` if one
    needs gradients that the network does not give.
    """

    threat: Threat
    options: AutoAttackOptions
    scratch: Path | None = None
    pause: Callable[[], None] = lambda: None
    random: bool = False
    """Whether the network answers at random."""
    watch: Watch = field(default_factory=Watch)

    def __call__(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Result:
        kept = self.scratch / "autoattack.json" if self.scratch else None
        fooled: list[str] = []
        flat: list[bool] = []
        doubts: dict[str, str] = {}
        begun: list[list[str]] = []
        if kept and (known := read_kept(kept, _check_kept)):
            fooled, flat, doubts, *begun = known

        def keep(*begun: list[str]) -> None:
            if kept is not None:
                write_json(kept, [fooled, flat, doubts, *begun])

        done, seen, classes = len(fooled), 0, 0
        with frozen(model) as model, listening(doubts):
            for x, y in batches:
                seen += len(y)
                if not classes:
                    classes = self._count_classes(model, x)
                if seen <= done:
                    continue
                found = self._attack_batch(model, x, y, classes, begun, keep)
                fooled, flat, begun = fooled + found[0], flat + found[1], []
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
        zeros = np.array(flat, dtype=bool)
        if self.random:
            metrics["draws"] = Metric(DRAWS, kind="setting")
            if not self.options.attacks:  # made for such networks: in place of the core's doubt
                metrics["random"] = Metric(1, kind="setting", note="of networks that do not draw")
            kind = "named attacks" if self.options.attacks else "version rand, APGD on two losses"
            warnings.warn(
                f"autoattack: the network answers at random: {kind}, with gradients over {DRAWS} "
                "draws; accuracies of other versions do not compare",
                stacklevel=2,
            )
        if not BY_VALUE.issuperset(self._choose(classes)):
            metrics["zero_gradient"] = count_flat(zeros, attack != MISCLASSIFIED)
        return Result(metrics, {"correct": correct, "attack": attack, "zero_gradient": zeros})

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
        if self.random and not self.options.attacks:
            return RAND if classes >= 3 else RAND[:1]
        return self.options.attacks or (ATTACKS if classes >= 4 else FEW_CLASSES)

    def _is_standard(self, classes: int) -> bool:
        """Whether attacks and budgets are those of standard AutoAttack."""
        if self.random:
            return False
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
    ) -> tuple[list[str], list[bool]]:
        """The records `attack` and `zero_gradient` of each image of x (B, C, H, W) in [0, 1], with
        labels y (B,).

        `keep` gets the first after each attack, and which are done; `begun` is what it got.
        """
        chosen = self._choose(classes)

        def logits(images: Tensor) -> Tensor:
            self.pause()
            return predict(model, Finite.apply(images))

        with torch.no_grad():
            correct = is_correct(predict(model, x), y)
        flat = torch.zeros_like(correct)
        if not BY_VALUE.issuperset(chosen):
            loss = partial(F.cross_entropy, target=y, reduction="sum")
            outputs, gradient = differentiate(model, x, loss)
            flat = correct & is_flat(gradient, outputs, y, self.threat.eps)
        found = np.where(correct.cpu().numpy(), ROBUST, MISCLASSIFIED).astype(object)
        done: list[str] = []
        if begun and len(begun[0]) == len(x):
            found, done = np.array(begun[0], dtype=object), begun[1]
        suite = make_suite(self.threat, self.options, logits, x.device, classes, self.random)
        for name in chosen[len(done) :]:
            left = np.flatnonzero(found == ROBUST)
            if not len(left):
                break
            suite.attacks_to_run = [name]
            index = torch.from_numpy(left).to(x.device)
            # Its checks switch off whatever traces the process: a debugger, coverage.
            tracer = sys.gettrace()
            own = x[index], y[index]
            try:
                _, prediction = suite.run_standard_evaluation(*own, batch_size=len(left))
            finally:
                sys.settrace(tracer)
            found[left[(prediction != y[index]).cpu().numpy()]] = name
            self._note_unreal(found)
            done = [*done, name]
            keep(list(found), done)
        left = np.flatnonzero(flat.cpu().numpy() & (found == ROBUST))
        if len(left):
            # Square has had all its queries where it is among the attacks.
            queries = (
                0 if "square" in chosen else min(self.options.queries, 10 * self.options.steps)
            )
            self._attack_again(model, x, y, found, left, queries)
        self._note_unreal(found)
        return list(found), flat.tolist()

    def _note_unreal(self, found: np.ndarray) -> None:
        """Attacks take the first NaN for the largest logit, which may be that of the label."""
        for i in self.watch.find_unreal():
            found[i] = NOT_FINITE if found[i] == ROBUST else found[i]

    def _attack_again(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        found: np.ndarray,
        left: np.ndarray,
        queries: int,
    ) -> None:
        """Change the records of the images `left` that attacks without their gradients fool."""
        index = torch.from_numpy(left).to(x.device)
        attack = plan_attack(self.threat, self.options.steps)
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            torch.manual_seed(self.options.seed)
            again = attack_again(model, x[index], y[index], attack, queries)
        leaking, either = (part.cpu().numpy() for part in again)
        found[left[either]] = "square"
        found[left[leaking]] = LEAKING

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


def _check_kept(kept: Any) -> Any:
    """What was kept; raises `ValueError` unless it has the types that it was kept with."""
    fooled, flat, doubts, *begun = kept
    texts = [fooled, list(doubts), list(doubts.values()), *begun]
    if not (
        len(fooled) == len(flat)
        and len(begun) in (0, 2)
        and all(isinstance(part, list) for part in (flat, *texts))
        and all(type(value) is bool for value in flat)
        and all(isinstance(text, str) for part in texts for text in part)
    ):
        raise ValueError("it holds something else than names of attacks")
    return kept


def build_autoattack(options: AutoAttackOptions, context: EvaluatorContext) -> Evaluation:
    """Build the evaluator `autoattack`; raises `UserError` if there is no threat."""
    threat = check_threat(context.threat)
    return Evaluation(
        threat, options, context.scratch, context.pause, context.examination.random, context.watch
    )
