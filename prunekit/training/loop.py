"""fit(): the only training loop. It trains weights (masked or not), or scores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.contracts import Clock, Objective, OptimizerChoice, Split
from prunekit.data import seeds
from prunekit.data.batches import Extra, count_batches, eval_batches, train_batches
from prunekit.errors import RunError, UserError
from prunekit.evaluation import balance, eval_mode, is_unbalanced
from prunekit.report import EpochDone, Progress, Report, StageStarted, Stop
from prunekit.store.checkpoint import read_checkpoint, write_checkpoint
from prunekit.training.variables import Variables

IMAGES = "#"
"""Key of the number of images among the sums of an epoch."""

RESERVED = {IMAGES, "loss", "accuracy", "epoch", "best"}
"""What no term of a loss can be called."""

CHECKPOINT_SECONDS = 300.0
"""In epochs longer than this, a checkpoint is also written between batches."""


@dataclass
class Fit:
    """One training: what is trained, on what, how, and where it is kept."""

    variables: Variables
    objective: Objective
    optimizer: OptimizerChoice
    train: Split
    validation: Split
    epochs: int
    batch_size: int
    augment: tuple[str, ...]
    device: torch.device
    seed: tuple[int, int]
    """(run seed, stage position)."""
    stage: str
    kind: str
    key: str
    report: Report
    stop: Stop
    progress: Path
    """The checkpoint of a training that goes on."""
    extra: Extra | None = None
    select: str = "accuracy"
    clip_norm: float | None = None
    most: int | None = None
    """Batches of an epoch at most (smoke)."""
    replays: int = 1
    """Optimiser steps on each batch."""


@dataclass
class _Position:
    """Where a training is; with the tensors of `_save`, all that a resume needs."""

    epoch: int = 0
    batch: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    best_value: float | None = None
    best_epoch: int = 0


def fit(job: Fit) -> list[dict[str, Any]]:
    """Train; the model ends with the best epoch's weights, ties going to the later epoch.

    Returns a row of metrics for each epoch. Goes on from `job.progress` where that is there, to the
    same bits. Raises `RunError` where the loss is not finite (the last good checkpoint stays), and
    `Interrupted` after saving, where a stop was asked for.
    """
    model = job.variables.model
    parameters = job.variables.parameters()
    if not parameters:
        raise RunError(f"stage {job.stage!r}: nothing to train, every parameter is frozen")
    optimizer = job.optimizer.make(parameters)
    at = _Position()
    best: dict[str, Tensor] = {}
    if job.progress.exists():
        at, best = _restore(job, optimizer)
    per_epoch = count_batches(job.train, job.batch_size, job.most)
    if not per_epoch:
        raise UserError("there is no training batch: too few images for batch_size")
    job.report(
        StageStarted(job.stage, job.kind, job.key, job.epochs, per_epoch, at.epoch, at.batch)
    )
    for row in at.history:
        job.report(_retell(job, row))
    while at.epoch < job.epochs:
        started = time.monotonic()
        _train_epoch(job, optimizer, at, best, per_epoch)
        job.variables.check()
        row = _summarise(job, at)
        row["best"] = _is_best(job, at, row, per_epoch)
        if row["best"]:
            best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        at.history.append(row)
        at.epoch, at.batch, at.sums = at.epoch + 1, 0, {}
        _save(job, optimizer, at, best)
        spent = time.monotonic() - started
        job.report(EpochDone(job.stage, at.epoch, job.epochs, _metrics(row), row["best"], spent))
        job.stop.check()
    model.load_state_dict(best)
    return at.history


def _train_epoch(
    job: Fit,
    optimizer: torch.optim.Optimizer,
    at: _Position,
    best: Mapping[str, Tensor],
    per_epoch: int,
) -> None:
    objective, variables = job.objective, job.variables
    after_step: Callable[[], None] = getattr(objective, "after_step", lambda: None)
    sums = {k: torch.tensor(v, dtype=torch.float64, device=job.device) for k, v in at.sums.items()}
    bad_step = torch.full((), -1, device=job.device)
    # Reading a value back stalls a GPU, so there it is done now and then.
    look_every = 1 if job.device.type == "cpu" else 20
    told = saved = time.monotonic()
    batches = train_batches(
        job.train, job.batch_size, job.augment, job.device,
        seeds.derive_seed(*job.seed, "epoch", at.epoch), extra=job.extra, skip=at.batch,
        most=job.most,
    )  # fmt: skip
    for x, y in batches:
        for replay in range(job.replays):
            step = (at.epoch * per_epoch + at.batch) * job.replays + replay
            clock = Clock(step, job.epochs * per_epoch * job.replays, at.epoch, job.epochs)
            seeds.seed_all(*job.seed, "step", at.epoch, at.batch, replay)
            lr = job.optimizer.lr * job.optimizer.schedule(clock)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            with variables.effective():
                loss = objective(x, y, clock)
                loss.value.backward()
            variables.after_backward()
            if job.clip_norm is not None:
                nn.utils.clip_grad_norm_(variables.parameters(), job.clip_norm)
            optimizer.step()
            after_step()
            bad = ~loss.value.detach().isfinite() & (bad_step < 0)
            bad_step = torch.where(bad, step, bad_step)
        if taken := RESERVED & loss.terms.keys():
            raise RunError(
                f"stage {job.stage!r}: a term of the loss cannot be called {min(taken)!r}"
            )
        values = {
            "loss": loss.value,
            **loss.terms,
            "accuracy": (loss.logits.detach().argmax(1) == y).double().mean(),
        }
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.detach().double() * len(y)
        sums[IMAGES] = sums.get(IMAGES, 0) + torch.tensor(
            float(len(y)), dtype=torch.float64, device=job.device
        )
        at.batch += 1
        now = time.monotonic()
        last = at.batch == per_epoch
        if at.batch % look_every == 0 or last:
            _check_finite(job, int(bad_step), at.epoch)
        if now - told > 0.2 or last:
            told = now
            means = {k: float(v / sums[IMAGES]) for k, v in sums.items() if k != IMAGES}
            job.report(
                Progress(job.stage, at.batch, per_epoch, at.epoch, job.epochs, means, "training")
            )
        if (job.stop.requested or now - saved > CHECKPOINT_SECONDS) and not last:
            _check_finite(job, int(bad_step), at.epoch)
            saved = now
            at.sums = {k: float(v) for k, v in sums.items()}
            _save(job, optimizer, at, best)
            job.stop.check()
    at.sums = {k: float(v) for k, v in sums.items()}


def _check_finite(job: Fit, step: int, epoch: int) -> None:
    if step >= 0:
        raise RunError(
            f"stage {job.stage!r}: the loss is not finite at step {step} (epoch {epoch + 1}); the "
            "last good checkpoint is kept: lower the optimizer's lr, or set clip_norm = 1.0"
        )


def _summarise(job: Fit, at: _Position) -> dict[str, Any]:
    images = at.sums[IMAGES]
    row: dict[str, Any] = {"epoch": at.epoch + 1}
    row |= {name: value / images for name, value in at.sums.items() if name != IMAGES}
    for name, parameter in job.variables.model.named_parameters():
        if not parameter.isfinite().all():
            raise RunError(
                f"stage {job.stage!r}: {name} is not finite after epoch {at.epoch + 1}; the last "
                "good checkpoint is kept: lower the optimizer's lr, or set clip_norm = 1.0"
            )
    row |= {f"validation.{name}": value for name, value in validate(job, at.epoch).items()}
    return row


def validate(job: Fit, epoch: int) -> dict[str, float]:
    """Means over the validation images; noise in it is the same in every epoch.

    Where their classes are unbalanced, `balanced_accuracy` stands beside `accuracy`: a training
    that answers with the largest class alone shows there.
    """
    if not len(job.validation.labels):
        return {}
    check: Callable[[Tensor, Tensor], Mapping[str, Tensor]] | None = getattr(
        job.objective, "validate", None
    )
    found: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    total = count_batches(job.validation, job.batch_size, job.most)
    model = job.variables.model
    with job.variables.effective(), eval_mode(model):
        batches = eval_batches(job.validation, job.batch_size, job.device)
        for number, (x, y) in enumerate(batches):
            if job.most is not None and number >= job.most:
                break
            seeds.seed_all(*job.seed, "validation", number)
            if check is not None:
                values = check(x, y)
            else:
                with torch.no_grad():
                    values = {"accuracy": model(x).argmax(1) == y}
            for name, value in values.items():
                found.setdefault(name, []).append(value.double().cpu())
            labels.append(y.cpu())
            job.report(
                Progress(job.stage, number + 1, total, epoch, job.epochs, label="validating")
            )
    means = {name: float(torch.cat(values).mean()) for name, values in found.items()}
    if "accuracy" in found and is_unbalanced(job.train.labels.cpu().numpy()):
        correct = torch.cat(found["accuracy"]).numpy()
        means["balanced_accuracy"] = balance(correct, torch.cat(labels).numpy())[0]
    return means


def _is_best(job: Fit, at: _Position, row: Mapping[str, Any], per_epoch: int) -> bool:
    settled: Callable[[Clock], bool] = getattr(job.objective, "settled", lambda clock: True)
    steps_per_epoch = per_epoch * job.replays
    last = at.epoch + 1 == job.epochs
    if job.select == "last":
        value = float(at.epoch)
    else:
        name = f"validation.{job.select}"
        if name not in row:
            names = [k.removeprefix("validation.") for k in row if k.startswith("validation.")]
            raise RunError(
                f"stage {job.stage!r}: select = {job.select!r} is no validation metric; there are: "
                f"{', '.join([*names, 'last'])}"
            )
        value = row[name]
    if not settled(
        Clock(
            (at.epoch + 1) * steps_per_epoch - 1, job.epochs * steps_per_epoch, at.epoch, job.epochs
        )
    ):
        # Something must be there at the end, even if nothing ever settles.
        return last and at.best_value is None
    if not math.isfinite(value) or (at.best_value is not None and value < at.best_value):
        return last and at.best_value is None
    at.best_value, at.best_epoch = value, at.epoch + 1
    return True


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if k not in ("epoch", "best")}


def _retell(job: Fit, row: Mapping[str, Any]) -> EpochDone:
    return EpochDone(job.stage, row["epoch"], job.epochs, _metrics(row), row["best"], stored=True)


def _save(
    job: Fit, optimizer: torch.optim.Optimizer, at: _Position, best: Mapping[str, Tensor]
) -> None:
    tensors = {f"model/{k}": v for k, v in job.variables.model.state_dict().items()}
    tensors |= {f"best/{k}": v for k, v in best.items()}
    scalars: dict[str, dict[str, Any]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            elif value is not None:
                scalars.setdefault(str(index), {})[name] = value
    if hasattr(job.objective, "state_dict"):
        tensors |= {f"objective/{k}": v for k, v in job.objective.state_dict().items()}
    write_checkpoint(job.progress, tensors, {"at": vars(at), "optimizer": scalars})


def _restore(job: Fit, optimizer: torch.optim.Optimizer) -> tuple[_Position, dict[str, Tensor]]:
    tensors, header = read_checkpoint(job.progress)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    job.variables.model.load_state_dict(part("model/"))
    state: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in header["optimizer"].items()
    }
    for key, value in part("optimizer/").items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    if hasattr(job.objective, "load_state_dict"):
        state_dict = {name: value.to(job.device) for name, value in part("objective/").items()}
        job.objective.load_state_dict(state_dict)
    return _Position(**header["at"]), part("best/")
