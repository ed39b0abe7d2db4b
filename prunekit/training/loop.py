"""fit(): the only training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.contracts import Clock, Halting, Loss, Objective, OptimizerChoice, Settling
from prunekit.data import seeds
from prunekit.data.batches import Feed
from prunekit.errors import RunError, UserError
from prunekit.pruning.masks import find_broken
from prunekit.report import Note, Progress, Report, StageStarted, Stop
from prunekit.steps import Averaging, Masking, Wrapper
from prunekit.training.progress import Checkpoint, Position, label_metrics, tell_epoch
from prunekit.training.rewiring import Rewired
from prunekit.training.statistics import recalibrated
from prunekit.training.step import Stepper
from prunekit.training.validation import Judge, Validation, diverged

IMAGES = "#"
"""Key of the number of images among the sums of an epoch."""

RESERVED = {IMAGES, "loss", "accuracy", "epoch", "best", "ended", "seconds"}
"""Names that a term of a loss cannot have."""
IDLE = (
    "its rewirer is due in none of its steps, so that masks do not move; lower `every`, or raise "
    "`until` where it has one"
)

CHECKPOINT_SECONDS = 300.0
"""In epochs longer than this, a checkpoint is also written between batches."""


@dataclass
class Fit:
    """One training: what is trained, on which data, how, and where it is saved."""

    masking: Masking
    objective: Objective
    optimizer: OptimizerChoice
    feed: Feed
    epochs: int
    seed: tuple[int, int]
    """(run seed, stage position)."""
    stage: str
    kind: str
    key: str
    report: Report
    stop: Stop
    checkpoint: Path
    """Where the state of an unfinished training is saved."""
    select: str = "accuracy"
    clip_norm: float | None = None
    replays: int = 1
    """Optimizer steps on each batch."""
    wrappers: Sequence[Wrapper] = ()
    images: str = "training images"
    """Of what the accuracy of an epoch is."""
    judge: Judge | None = None
    """What judges validation images beside the objective."""
    patience: int | None = None
    """Epochs without a better one after which it ends."""

    def clock(self, epoch: int, batch: int, replay: int = 0) -> Clock:
        per_epoch = self.feed.count() * self.replays
        step = epoch * per_epoch + batch * self.replays + replay
        return Clock(step, self.epochs * per_epoch, epoch, self.epochs)

    @property
    def stuck(self) -> str:
        """Why it ends when `patience` is over."""
        epochs = "1 epoch" if self.patience == 1 else f"{self.patience} epochs"
        return f"validation.{self.select} has not risen for {epochs}"

    def end(self, epoch: int) -> Clock:
        """The last step of an epoch."""
        return self.clock(epoch, self.feed.count() - 1, self.replays - 1)

    def between(self) -> Iterator[Clock]:
        """The steps between the first and the last."""
        steps = self.end(0).steps
        for step in range(1, steps - 1):
            yield Clock(step, steps, step * self.epochs // steps, self.epochs)


class _Sums:
    """Sums over the images of an epoch, on the device: reading values back would stall a GPU."""

    def __init__(self, start: Mapping[str, float], device: torch.device) -> None:
        self._device = device
        self._sums = {k: self._make(v) for k, v in start.items()}

    def _make(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self._device)

    def add(self, loss: Loss, labels: Tensor) -> None:
        n = len(labels)
        right = (loss.logits.detach().argmax(1) == labels).double().mean()
        values = {"loss": loss.value, **loss.terms, "accuracy": right}
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().double() * n
        self._sums[IMAGES] = self._sums.get(IMAGES, 0) + self._make(float(n))

    def read(self) -> dict[str, float]:
        return {k: float(v) for k, v in self._sums.items()}


def fit(job: Fit) -> list[dict[str, Any]]:
    """Train; the model ends with the best epoch's weights, ties going to the later epoch.

    It ends early where the objective halts it, or no epoch was better for `patience` epochs.

    Returns a row of metrics for each epoch. Resumes from `job.checkpoint` if it exists, to
    the same bits. Raises `RunError` if the loss is not finite (the last good checkpoint stays),
    and `Interrupted`, after saving, if a stop was requested.
    """
    model = job.masking.model
    own = (job.masking, job.objective, job.optimizer, job.seed, job.clip_norm, job.wrappers)
    stepper = Stepper(*own)
    if not stepper.trains:
        raise RunError(f"stage {job.stage!r}: nothing to train, every parameter is frozen")
    checkpoint = Checkpoint(job.checkpoint, stepper)
    at, best = checkpoint.restore(job.feed.device, job.report)
    batches = job.feed.count()
    if not batches:
        raise UserError("there is no training batch: too few images for batch_size")
    at.times += [0.0] * (at.epoch - len(at.times))
    where, spent = (job.epochs, batches, at.epoch, at.batch), sum(at.times) + at.spent
    job.report(StageStarted(job.stage, job.kind, job.key, *where, seconds=spent))

    def tell(row: Mapping[str, Any], *, stored: bool) -> None:
        timed = {**row, "seconds": at.times[row["epoch"] - 1]}
        told = (job.stage, job.epochs, timed, job.select, job.images)
        job.report(tell_epoch(*told, stored=stored))

    for row in at.history:
        tell(row, stored=True)
    names = model.state_dict().keys()
    if isinstance(job.masking, Rewired) and not (at.epoch or at.batch):
        job.masking.rewire(job.clock(0, 0), stepper.optimizer)
        if job.masking.idles(job.between()):
            job.report(Note(f"stage {job.stage!r}: {IDLE}", warning=True))
    judged_by = (model, job.objective, job.judge, job.feed, job.seed)
    validation = Validation(*judged_by, job.stage, job.epochs, job.report)
    while at.epoch < job.epochs and not at.ended:
        began = time.monotonic() - at.spent
        _train_epoch(job, stepper, checkpoint, at, best, began)
        job.masking.check()
        if changed := sorted(model.state_dict().keys() ^ names):
            raise RunError(
                f"stage {job.stage!r}: {', '.join(changed)} came or went while training, so that "
                "no checkpoint could be loaded; make the state of a masking in its __init__"
            )
        with ExitStack() as judged:
            for wrapper in job.wrappers:
                if isinstance(wrapper, Averaging):
                    judged.enter_context(wrapper.judged(model))
            end = job.end(at.epoch)
            judged.enter_context(job.masking.judged(end))
            measured = (job.objective, job.feed, end, job.seed, job.wrappers)
            judged.enter_context(recalibrated(model, *measured))
            row = _summarize(job, at, validation)
            failure = _find_failure(job, at, row)
            row["best"] = not failure and _is_best(job, at, row)
            if at.best_value is None and not failure and _is_spare(job, at):
                at.spare = at.epoch + 1
            if row["best"] or at.spare == at.epoch + 1:
                best = {name: value.detach().clone() for name, value in model.state_dict().items()}
        at.history.append(row)
        at.times.append(time.monotonic() - began)
        at.epoch, at.batch, at.sums, at.spent = at.epoch + 1, 0, {}, 0.0
        if failure:
            row["ended"] = failure
            if at.best_value is None:
                at.history[at.spare - 1]["best"] = True
        elif _is_stuck(job, at):
            row["ended"] = job.stuck
        checkpoint.save(at, best)
        tell(row, stored=False)
        job.stop.check()
    if at.ended:
        kept = max(row["epoch"] for row in at.history if row["best"])
        told = f"ends after epoch {at.epoch} of {job.epochs} with the weights of epoch {kept}"
        if at.best_value is None:
            told += ", whose objective had not settled"
        job.report(Note(f"stage {job.stage!r} {told}: {at.ended}", at.ended != job.stuck))
    model.load_state_dict(best)
    return at.history


def _train_epoch(
    job: Fit,
    stepper: Stepper,
    checkpoint: Checkpoint,
    at: Position,
    best: Mapping[str, Tensor],
    began: float,
) -> None:
    """Train the rest of an epoch; write a checkpoint if it takes long or is stopped."""
    device = job.feed.device
    sums, batches = _Sums(at.sums, device), job.feed.count()
    bad_step = torch.full((), -1, device=device)
    # Reading a value back stalls a GPU, so it is done only now and then there.
    look_every = 1 if device.type == "cpu" else 20
    told = saved = time.monotonic()
    for x, y in job.feed.epoch(seeds.derive_seed(*job.seed, "epoch", at.epoch), skip=at.batch):
        for replay in range(job.replays):
            clock = job.clock(at.epoch, at.batch, replay)
            seeds.seed_all(*job.seed, "step", at.epoch, at.batch, replay)
            loss = stepper.take(x, y, clock, at.history)
            bad = ~loss.value.detach().isfinite() & (bad_step < 0)
            bad_step = torch.where(bad, clock.step, bad_step)
        if taken := RESERVED & loss.terms.keys():
            raise RunError(f"stage {job.stage!r}: a term of a loss cannot be called {min(taken)!r}")
        sums.add(loss, y)
        at.batch += 1
        now, last = time.monotonic(), at.batch == batches
        halt = (job.stop.requested or now - saved > CHECKPOINT_SECONDS) and not last
        if at.batch % look_every == 0 or last or halt:
            _check_finite(job, int(bad_step), at.epoch)
        if now - told > 0.2 or last:
            told, read = now, sums.read()
            means = {k: v / read[IMAGES] for k, v in read.items() if k != IMAGES}
            means = label_metrics(means, job.images)
            progress = (at.batch, batches, at.epoch, job.epochs)
            job.report(Progress(job.stage, *progress, means, "training"))
        if halt:
            saved, at.sums, at.spent = now, sums.read(), now - began
            checkpoint.save(at, best)
            job.stop.check()
    at.sums = sums.read()


def _check_finite(job: Fit, step: int, epoch: int) -> None:
    if step >= 0:
        raise diverged(job.stage, f"the loss is not finite at step {step} (epoch {epoch + 1})")


def _summarize(job: Fit, at: Position, validation: Validation) -> dict[str, Any]:
    images = at.sums[IMAGES]
    row: dict[str, Any] = {"epoch": at.epoch + 1}
    row |= {name: value / images for name, value in at.sums.items() if name != IMAGES}
    if broken := find_broken(job.masking.model):
        raise diverged(job.stage, f"not finite after epoch {at.epoch + 1}: {broken}")
    row |= {f"validation.{name}": value for name, value in validation.measure(at.epoch).items()}
    return row


def _find_failure(job: Fit, at: Position, row: Mapping[str, Any]) -> str:
    """Why the objective goes no further, and an epoch before this one is kept; "" if it does."""
    if not isinstance(job.objective, Halting):
        return ""
    failure = job.objective.halts([*at.history, row])
    if failure and at.best_value is None and not at.spare:
        told = f"epoch {at.epoch + 1} fails, and there is none before it to go back to: {failure}"
        job.report(Note(f"stage {job.stage!r}: {told}", warning=True))
        return ""
    return failure


def _is_spare(job: Fit, at: Position) -> bool:
    """Whether to go back to this epoch, whose objective has not settled, if the next one fails."""
    return isinstance(job.objective, Halting) and job.masking.settled(job.end(at.epoch))


def _is_stuck(job: Fit, at: Position) -> bool:
    """Whether no epoch of the last `patience` was better than the best before; ties are not."""
    if job.patience is None or at.best_value is None or at.epoch == job.epochs:
        return False
    name = f"validation.{job.select}"
    first = next(row for row in at.history if row["best"] and row[name] == at.best_value)
    return at.epoch - int(first["epoch"]) >= job.patience


def _is_best(job: Fit, at: Position, row: Mapping[str, Any]) -> bool:
    value = float(at.epoch) if job.select == "last" else row.get(f"validation.{job.select}")
    if value is None:
        names = [k.removeprefix("validation.") for k in row if k.startswith("validation.")]
        raise RunError(
            f"stage {job.stage!r}: select = {job.select!r} is not a validation metric; there are: "
            f"{', '.join([*names, 'last'])}"
        )
    end = job.end(at.epoch)
    worse = at.best_value is not None and value < at.best_value
    settled = not isinstance(job.objective, Settling) or job.objective.settled(end)
    settled = settled and job.masking.settled(end)
    if not settled or worse or not math.isfinite(value):
        # There must be a best epoch at the end, even if nothing ever settles.
        return at.epoch + 1 == job.epochs and at.best_value is None
    at.best_value = value
    return True
