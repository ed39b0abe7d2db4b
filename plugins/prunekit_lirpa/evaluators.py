"""Verification: a proof for each image, by the cheapest bound that finds one."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunekit import judge_batches
from prunekit.contexts import EvaluatorContext
from prunekit.contracts import Metric, Result
from prunekit.errors import Interrupted, UserError
from prunekit.evaluation import plainly, proportion
from prunekit_lirpa import VerifiedOptions
from prunekit_lirpa.bounds import Bounds
from prunekit_lirpa.margins import allow_rounding, check_threat, is_certain, surround

OPEN, MISCLASSIFIED, FAILED, LATE = "open", "misclassified", "error", "timeout"
"""Values of the record `method` for images that no method verified."""


@dataclass(frozen=True)
class Verified:
    """Verified accuracy: the fraction of images whose margins are all proved positive over the box.

    The methods run in order, each on the correctly classified images that are still open; the best
    lower bound of each margin counts (Xu et al., NeurIPS 2020). What float32 finds, float64
    decides, and margins have to be larger where logits are (`allow_rounding`). `eps` is in pixel
    units.

    Metrics, each with its interval: `verified`; for each method the fraction that it and the
    methods before it verified, such as `crown_verified`; and `accuracy`. `errors` and `timeouts`
    count images that were not verified because a method failed or the time was up.

    Records: `verified` (N,) bool; `method` (N,), the name of the method that verified the image, or
    `OPEN`, `MISCLASSIFIED`, `FAILED`, `LATE`; `margin` (N,), the best lower bound of the smallest
    margin, NaN if none was computed.
    """

    eps: float
    options: VerifiedOptions
    scratch: Path | None = None
    pause: Callable[[], None] = lambda: None
    """Called before each torch operation of a bound; may raise `Interrupted`."""

    def __call__(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Result:
        bounds: list[Bounds] = []

        def judge(x: Tensor, y: Tensor) -> dict[str, np.ndarray]:
            if not bounds:
                quick = [None] if self.options.precision == "fp32" else []
                bounds[:] = [self._make_bounds(model, x, d) for d in (*quick, torch.float64)]
            parts = zip(*(t.split(self.options.batch or len(y)) for t in (x, y)), strict=True)
            found = [self._verify(bounds, *part) for part in parts]
            return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

        return self._summarize(judge_batches(judge, batches, self.scratch))

    def _make_bounds(self, model: nn.Module, x: Tensor, dtype: torch.dtype | None) -> Bounds:
        """The bounds of the network, for images like x (B, C, H, W).

        Raises `UserError` if auto_LiRPA cannot trace the network.
        """
        channels, height, width = x.shape[1:]
        bounds = Bounds(
            model,
            (channels, height, width),
            detached=True,
            dtype=dtype,
            iterations=self.options.iterations,
        )
        bounds.prepare()
        return bounds

    @plainly()
    def _verify(self, bounds: Sequence[Bounds], x: Tensor, y: Tensor) -> dict[str, np.ndarray]:
        """The records `method`, `margin` and `failure`, (B,) each, of images x (B, C, H, W) with
        labels y (B,). The last of `bounds` decides; one before it finds what is worth deciding."""
        with torch.no_grad():
            logits = bounds[0].model(x)
            correct = ((logits.argmax(1) == y) & logits.isfinite().all(1)).cpu().numpy()
        method = np.where(correct, OPEN, MISCLASSIFIED).astype(object)
        margin = np.full(len(y), np.nan)
        failure = np.full(len(y), "", dtype=object)
        # The best bound of each margin so far, in each precision.
        best = [logits[:, 1:].to(one.dtype).fill_(-torch.inf) for one in bounds]
        tried: list[str] = []
        seconds = self.options.seconds
        end = float("inf") if seconds is None else time.monotonic() + seconds
        for name in self.options.methods:
            left = np.flatnonzero((method == OPEN) | (method == FAILED))
            if not len(left):
                break
            index = torch.from_numpy(left).to(x.device)
            try:
                watch = Watch(end, self.pause)
                with torch.set_grad_enabled(name == "alpha-crown"), watch:
                    for one, lower in zip(bounds, best, strict=True):
                        box = surround(x[index].to(one.dtype), self.eps)
                        for each in (name,) if one is bounds[0] else (*tried, name):
                            found = one.margins(box, y[index], each).detach()
                            lower[index] = torch.fmax(lower[index], found)
                        margin[index.cpu().numpy()] = lower[index].amin(1).cpu().numpy()
                        least = allow_rounding(logits[index], one.operations)
                        index = index[is_certain(lower[index], least)]
                        if not len(index):
                            break
            except OutOfTimeError:
                for one in bounds:
                    one.forget()
                method[left] = LATE
                break
            except Interrupted:
                raise
            # An exception of the verifier, whatever it is, says nothing about the network.
            except Exception as error:
                for one in bounds:
                    one.forget()
                method[left] = FAILED
                failure[left] = f"{name} failed on some images, which are counted as errors: "
                failure[left] += describe(error)
                continue
            method[index.cpu().numpy()] = name
            tried.append(name)
        return {"method": method.astype(str), "margin": margin, "failure": failure.astype(str)}

    def _summarize(self, found: Mapping[str, np.ndarray]) -> Result:
        """Metrics and records, from those of all images."""
        method, margin = found["method"], found["margin"]
        for text in dict.fromkeys(map(str, found["failure"])):
            if text:
                warnings.warn(text, stacklevel=3)
        verified = np.isin(method, self.options.methods)
        metrics = {"verified": proportion(verified)}
        for number, name in enumerate(self.options.methods, 1):
            so_far = np.isin(method, self.options.methods[:number])
            metrics[f"{name}_verified"] = proportion(so_far)
        metrics["accuracy"] = proportion(method != MISCLASSIFIED)
        open_ = "they count as not verified but may be robust"
        for count, word, what in (
            ("errors", FAILED, "made the verifier fail"),
            ("timeouts", LATE, "ran out of time"),
        ):
            images = (method == word).sum()
            metrics[count] = Metric(images, kind="diagnosis", note=f"{what}; {open_}")
        records = {"verified": verified, "method": method, "margin": margin}
        return Result(metrics, records)


def describe(error: Exception) -> str:
    """The error in one line; if it has no message, the function that raised it."""
    text = str(error).partition("\n")[0]
    if isinstance(error, UserError):
        return text
    *_, frame = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {text or f'in {frame.name}'}"


class OutOfTimeError(BaseException):
    """The time limit is reached; not an `Exception`, so that no handler takes it for a failure."""


class Watch(TorchFunctionMode):
    """Raises `OutOfTimeError` at the first torch operation after `end` (monotonic clock).

    Calls `pause` before each, which may raise too.
    """

    def __init__(self, end: float, pause: Callable[[], None]) -> None:
        super().__init__()
        self.end, self.pause = end, pause

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.pause()
        if time.monotonic() > self.end:
            raise OutOfTimeError
        return func(*args, **(kwargs or {}))


def build_verified(options: VerifiedOptions, context: EvaluatorContext) -> Verified:
    """Build the evaluator `verified`; raises `UserError` unless there is an L-infinity threat."""
    eps = check_threat(context.threat, "verified")
    return Verified(eps, options, context.scratch, context.pause)
