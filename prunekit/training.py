"""fit(): the only training loop. It trains weights (masked or not), or scores."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunekit import seeds
from prunekit.checkpoint import read_checkpoint, write_checkpoint
from prunekit.contracts import Clock, Objective, OptimizerChoice, Scores, Split
from prunekit.data import count_batches, eval_batches, train_batches
from prunekit.errors import Interrupted, RunError, UserError
from prunekit.evaluation import eval_mode
from prunekit.masks import (
    Masks,
    assert_masked,
    attach_scores,
    check_layers,
    detach_scores,
    effective_weights,
    select,
)
from prunekit.report import EpochDone, Progress, Report, StageStarted

CHECKPOINT_SECONDS = 300.0
"""In epochs longer than this, a checkpoint is also written between batches."""

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


class Variables(Protocol):
    """What `fit` trains. Everything lives in the model, so its state dict is all there is."""

    model: nn.Module

    def parameters(self) -> list[nn.Parameter]: ...

    def step(self) -> AbstractContextManager[None]:
        """Around one forward and one backward (or around a validation)."""
        ...

    def after_backward(self) -> None:
        """Between the backward and the clipping of gradients."""
        ...

    def check(self) -> None:
        """Once an epoch: raise `RunError` where a promise is broken."""
        ...


@dataclass
class Weights:
    """Trains the weights; those that a mask removed stay exactly zero."""

    model: nn.Module
    masks: Masks

    def __post_init__(self) -> None:
        self.model.requires_grad_(True)
        self.model.train()
        named = dict(self.model.named_parameters())
        self._masked = [(named[name], ~mask) for name, mask in self.masks.items()]

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def step(self) -> AbstractContextManager[None]:
        return nullcontext()

    def after_backward(self) -> None:
        for weight, removed in self._masked:
            if weight.grad is not None:
                # Filled, not multiplied: inf * 0 is NaN, and w * 0 may be -0.
                weight.grad.masked_fill_(removed, 0)

    def check(self) -> None:
        assert_masked(self.model, self.masks)


class LearnedScores:
    """Trains scores of frozen weights; masks follow the scores, once an optimiser step.

    Biases are frozen too. Normalisation layers train, affine parameters and running statistics,
    unless `bn` is "freeze".
    """

    def __init__(
        self,
        model: nn.Module,
        start: Scores,
        sparsity: float,
        budget: str,
        alive: Masks,
        bn: str,
    ) -> None:
        self.model, self.start, self.alive = model, start, alive
        self.sparsity, self.budget = sparsity, budget
        model.requires_grad_(False)
        model.train()
        for module in model.modules():
            if isinstance(module, NORMS):
                module.train(bn == "train")
                module.requires_grad_(bn == "train")
        self.parts = attach_scores(model, start.values)
        self.refresh()
        check_layers({name: part.mask for name, part in self.parts.items()}, sparsity)

    def scores(self) -> Scores:
        """Importance: |score|."""
        values = {name: part.score.detach().abs() for name, part in self.parts.items()}
        return Scores(values, self.start.layerwise)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the masks of the present scores."""
        for name, mask in select(self.scores(), self.sparsity, self.budget, self.alive).items():
            self.parts[name].mask.copy_(mask)

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextmanager
    def step(self) -> Iterator[None]:
        self.refresh()
        with effective_weights(self.model):
            yield

    def after_backward(self) -> None:
        pass

    def check(self) -> None:
        pass

    def detach(self) -> None:
        """Give the model its plain weights back."""
        detach_scores(self.model)


@dataclass
class Stop:
    """Asks a running loop to stop at the next safe moment; a second signal stops at once."""

    requested: bool = False

    def check(self) -> None:
        """Raise `Interrupted` where a stop was asked for."""
        if self.requested:
            raise Interrupted

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Inside, SIGINT and SIGTERM ask for a stop."""

        def request(number: int, frame: Any) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True

        try:
            old = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, which alone gets signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


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
    select: str = "accuracy"
    clip_norm: float | None = None
    most: int | None = None
    """Batches of an epoch at most (smoke)."""


@dataclass
class _Position:
    """Where a training is; with the tensors of `_pack`, all that a resume needs."""

    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
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
    at, best = _Position(), {}
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
        spent = time.monotonic() - started
        at.seconds += spent
        _save(job, optimizer, at, best)
        job.report(EpochDone(job.stage, at.epoch, job.epochs, _metrics(row), row["best"], spent))
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
    replays = getattr(objective, "replays", 1)
    after_step: Callable[[], None] = getattr(objective, "after_step", lambda: None)
    sums = {k: torch.tensor(v, dtype=torch.float64, device=job.device) for k, v in at.sums.items()}
    bad_step = torch.full((), -1, device=job.device)
    # Reading a value back stalls a GPU, so there it is done now and then.
    look_every = 1 if job.device.type == "cpu" else 20
    told = saved = time.monotonic()
    batches = train_batches(
        job.train, job.batch_size, job.augment, job.device,
        seeds.derive(*job.seed, "epoch", at.epoch), skip=at.batch, most=job.most,
    )  # fmt: skip
    for x, y in batches:
        for replay in range(replays):
            step = (at.epoch * per_epoch + at.batch) * replays + replay
            clock = Clock(step, job.epochs * per_epoch * replays, at.epoch, job.epochs)
            seeds.seed_all(*job.seed, "step", at.epoch, at.batch, replay)
            lr = job.optimizer.lr * job.optimizer.schedule(clock)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            with variables.step():
                loss = objective(x, y, clock)
                loss.value.backward()
            variables.after_backward()
            if job.clip_norm is not None:
                nn.utils.clip_grad_norm_(variables.parameters(), job.clip_norm)
            optimizer.step()
            after_step()
            bad = ~loss.value.detach().isfinite() & (bad_step < 0)
            bad_step = torch.where(bad, step, bad_step)
        values = {
            "loss": loss.value,
            **loss.terms,
            "accuracy": (loss.logits.detach().argmax(1) == y).double().mean(),
        }
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.detach().double() * len(y)
        sums["images"] = sums.get("images", 0) + torch.tensor(
            float(len(y)), dtype=torch.float64, device=job.device
        )
        at.batch += 1
        now = time.monotonic()
        last = at.batch == per_epoch
        if at.batch % look_every == 0 or last:
            _check_finite(job, int(bad_step), at.epoch)
        if now - told > 0.2 or last:
            told = now
            means = {k: float(v / sums["images"]) for k, v in sums.items() if k != "images"}
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
    images = at.sums["images"]
    row: dict[str, Any] = {"epoch": at.epoch + 1}
    row |= {name: value / images for name, value in at.sums.items() if name != "images"}
    for name, parameter in job.variables.model.named_parameters():
        if not parameter.isfinite().all():
            raise RunError(
                f"stage {job.stage!r}: {name} is not finite after epoch {at.epoch + 1}; the last "
                "good checkpoint is kept: lower the optimizer's lr, or set clip_norm = 1.0"
            )
    row |= {f"validation.{name}": value for name, value in validate(job, at.epoch).items()}
    return row


def validate(job: Fit, epoch: int) -> dict[str, float]:
    """Means over the validation images; noise in it is the same in every epoch."""
    if not len(job.validation.labels):
        return {}
    check: Callable[[Tensor, Tensor], Mapping[str, Tensor]] | None = getattr(
        job.objective, "validate", None
    )
    sums: dict[str, float] = {}
    n = 0
    total = count_batches(job.validation, job.batch_size, job.most)
    model = job.variables.model
    with job.variables.step(), eval_mode(model):
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
                sums[name] = sums.get(name, 0.0) + float(value.double().sum())
            n += len(y)
            job.report(
                Progress(job.stage, number + 1, total, epoch, job.epochs, label="validating")
            )
    return {name: value / n for name, value in sums.items()}


def _is_best(job: Fit, at: _Position, row: Mapping[str, Any], per_epoch: int) -> bool:
    settled: Callable[[Clock], bool] = getattr(job.objective, "settled", lambda clock: True)
    steps = job.epochs * per_epoch
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
    if not settled(Clock((at.epoch + 1) * per_epoch - 1, steps, at.epoch, job.epochs)):
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


def _restore(
    job: Fit, optimizer: torch.optim.Optimizer
) -> tuple[_Position, dict[str, Tensor]]:
    tensors, header = read_checkpoint(job.progress)

    def part(prefix: str) -> dict[str, Tensor]:
        return {
            k.removeprefix(prefix): v.to(job.device)
            for k, v in tensors.items()
            if k.startswith(prefix)
        }

    job.variables.model.load_state_dict(part("model/"))
    state: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in header["optimizer"].items()
    }
    for key, value in part("optimizer/").items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if hasattr(job.objective, "load_state_dict"):
        job.objective.load_state_dict(part("objective/"))
    return _Position(**header["at"]), part("best/")
