"""What an epoch is judged by: the objective, and an attack or a proof, at validation images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.contracts import Objective, Validating
from prunekit.data import seeds
from prunekit.data.batches import Feed
from prunekit.errors import RunError
from prunekit.evaluation import Standing, balance, frozen, is_unbalanced
from prunekit.judging import Examination, Watch, examine, watching
from prunekit.report import Note, Progress, Report

Judge = Callable[
    [nn.Module, Iterable[tuple[Tensor, Tensor]], Watch, Examination], Mapping[str, np.ndarray]
]
"""`judge(model, batches, watch, examination)`: whether each image withstands it, (N,) bool, by the
name of the metric."""


@dataclass
class Validation:
    """How one training is validated; noise in it is the same in every epoch."""

    model: nn.Module
    objective: Objective
    judge: Judge | None
    feed: Feed
    seed: tuple[int, int]
    stage: str
    epochs: int
    report: Report
    _seen: Examination | None = None
    _told: set[str] = field(default_factory=set)

    def measure(self, epoch: int) -> dict[str, float]:
        """Means over the validation images; `epoch` counts from 0.

        Where their classes are unbalanced, `balanced_accuracy` stands beside `accuracy`: a training
        that answers with the largest class alone shows there.
        """
        if not self.feed.count_validation():
            return {}
        check = (
            self.objective.validate if isinstance(self.objective, Validating) else self._classify
        )
        parts: dict[str, list[Tensor]] = {}
        labels: list[Tensor] = []
        standing = Standing(self.model)
        with frozen(self.model) as model, watching(model) as watch:
            for x, y in self._batches(epoch, watch):
                for name, value in check(x, y).items():
                    parts.setdefault(name, []).append(value.double().cpu())
                labels.append(y.cpu())
            found = {name: torch.cat(values) for name, values in parts.items()}
            if self.judge is not None:
                found |= self._judge(self.judge, epoch, watch)
        # What validation images leave in a network would be training on them.
        standing.restore()
        if watch.outputs and not watch.real:
            raise diverged(
                self.stage, "the network gives NaN or infinity for every validation image"
            )
        if watch.unreal:
            self._tell("the network gives NaN or infinity for some images, which count as wrong")
        means = {name: float(values.mean()) for name, values in found.items()}
        if "accuracy" in found and is_unbalanced(self.feed.train.labels.cpu().numpy()):
            correct = found["accuracy"].numpy()
            means["balanced_accuracy"] = balance(correct, torch.cat(labels).numpy())[0]
        return means

    @torch.no_grad()
    def _classify(self, x: Tensor, y: Tensor) -> Mapping[str, Tensor]:
        logits = self.model(x)
        return {"accuracy": (logits.argmax(1) == y) & logits.isfinite().all(1)}

    def _judge(self, judge: Judge, epoch: int, watch: Watch) -> dict[str, Tensor]:
        assert self._seen is not None  # the objective's validation comes first
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = judge(self.model, self._batches(epoch, watch), watch, self._seen)
        self._tell(*(str(w.message) for w in caught))
        return {name: torch.as_tensor(values).double() for name, values in found.items()}

    def _batches(self, epoch: int, watch: Watch) -> Iterator[tuple[Tensor, Tensor]]:
        """The validation images, every batch with random numbers of its own."""
        total = self.feed.count_validation()
        for number, (x, y) in enumerate(self.feed.validate()):
            if self._seen is None:
                self._seen = examine(self.model, x)
                self._tell(*self._seen.doubts.values())
            watch.begin(x, number * self.feed.size)
            seeds.seed_all(*self.seed, "validation", number)
            yield x, y
            done = (number + 1, total, epoch, self.epochs)
            self.report(Progress(self.stage, *done, label="validating"))

    def _tell(self, *texts: str) -> None:
        """Warn of what was not told yet."""
        for text in texts:
            if text not in self._told:
                self.report(Note(f"validation: {text}", warning=True))
        self._told.update(texts)


def diverged(stage: str, what: str) -> RunError:
    """The error of a training that computes something else than numbers."""
    return RunError(
        f"stage {stage!r}: {what}; the last good checkpoint is kept: lower the optimizer's lr, "
        "or set clip_norm = 1.0"
    )
