"""Certified radii of the smoothed classifier, from a fixed or sequential number of samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from math import ceil, log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit import read_kept, write_json
from prunekit.contexts import EvaluatorContext
from prunekit.contracts import Metric, Result
from prunekit.evaluation import proportion
from prunekit_smoothing import CHUNK, CertifyOptions, name_radius, plan_looks
from prunekit_smoothing.bounds import (
    certified_radius,
    log_evidence,
    lower_bound,
    needed,
    upper_bound,
)
from prunekit_smoothing.sampling import NO_CLASS, Chunk, Sampler

AT_ONCE = 4
"""So many times the images that fill a forward pass are sampled together."""
SAVE_SECONDS = 5.0
"""Seconds between two saves; the most sampling that is lost when the process is killed."""


@dataclass
class Tally:
    """The counts of an image: `hits` of `samples` noisy copies were assigned to `prediction`.

    The class `prediction` was selected with other copies. `lower` bounds its probability from
    below; `decided` images are not sampled any further.
    """

    prediction: int
    hits: int = 0
    samples: int = 0
    lower: float = 0.0
    decided: bool = False


@dataclass
class Work:
    """The progress of an evaluation: finished images, and the group that is being sampled now."""

    done: list[Tally] = field(default_factory=list)
    group: list[Tally] = field(default_factory=list)
    look: int = 0
    """Index of the look that `group` is being sampled for."""


@dataclass
class Keeper:
    """Saves the work to a file every few seconds; does nothing if there is no file."""

    file: Path | None
    saved: float = field(default_factory=time.monotonic)

    def read(self, looks: Sequence[int]) -> Work:
        """The saved work, or new work if there is none; it samples up to these `looks`."""
        known = self.file and read_kept(self.file, partial(_make_work, looks=looks))
        return known or Work()

    def save(self, work: Work) -> None:
        """Save the work, if the last time is at least `SAVE_SECONDS` ago."""
        if self.file is not None and time.monotonic() - self.saved >= SAVE_SECONDS:
            write_json(self.file, asdict(work))
            self.saved = time.monotonic()


def _make_work(kept: Any, looks: Sequence[int]) -> Work:
    """What `Keeper.save` wrote; raises if it is anything else."""
    done, group = ([Tally(**tally) for tally in kept[key]] for key in ("done", "group"))
    look = kept["look"]
    for tally in (*done, *group):
        numbers = (tally.prediction, tally.hits, tally.samples, look)
        if not (
            all(type(number) is int and number >= 0 for number in numbers)
            and tally.hits <= tally.samples <= looks[-1]
            and look < len(looks)
            and type(tally.lower) is float
            and 0 <= tally.lower <= 1
            and type(tally.decided) is bool
        ):
            raise ValueError(f"no counts of an image: {tally}, look {look}")
    return Work(done, group, look)


@dataclass(frozen=True)
class Certify:
    """Certified L2 radii of the smoothed classifier (Cohen et al., ICML 2019, section 3.2.2).

    The class of an image is the most frequent one among `n0` noisy copies. Further copies bound its
    probability p from below, and the class is certified within sigma * Phi^-1(p), in L2 and pixel
    units; for each image this is wrong with probability at most `alpha`. If p cannot be bounded
    above 1/2, the classifier abstains.

    With `sequential`, the given radii (and 0) are tested from the smallest on, each once the one
    before it is certified, and each at level `alpha` at any number of samples (`log_evidence`): the
    first one that does not hold is certified with probability `alpha` at most, and larger ones
    only after it. Sampling stops once the next radius is futile, or none is left. Futile means
    that n samples would not certify it either, even if the remaining ones hit as often as the
    upper bound at level `alpha` allows. Stopping for futility uses up no alpha, because its only
    consequence is "not certified". The radius of an image is then the largest that is certified,
    or 0.

    Metrics: `accuracy` (correct and not abstained), `abstained`, `certified@R`, and `acr`, the mean
    of radius * [correct] over all images; if sequential, instead of `acr`, `passes`, the mean
    number of forward passes per image; and the settings `sigma`, `alpha`, `n0`, `samples` (n) and
    `sequential` (1 or 0). Records, (N,) each: `prediction`, `count` (hits) of `samples`, `radius`
    (0 if abstained), `abstained`, `correct`, and `precision` of the network, because the
    certificate holds for the network in this precision.

    With a folder `scratch`, counts are saved there, and an interrupted evaluation resumes with the
    same result. `pause` is called after each forward pass and may raise.
    """

    options: CertifyOptions
    seed: int
    scratch: Path | None = None
    pause: Callable[[], None] = lambda: None

    @cached_property
    def looks(self) -> tuple[int, ...]:
        """The numbers of samples at which a decision is tried."""
        return plan_looks(self.options)

    @cached_property
    def steps(self) -> tuple[float, ...]:
        """The bounds on p that certify radius 0 and the given radii, increasing."""
        return tuple(needed(r, self.options.sigma) for r in sorted((0.0, *self.options.radii)))

    @torch.no_grad()
    def __call__(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Result:
        keeper = Keeper(self.scratch / "certify.json" if self.scratch else None)
        work, seen = keeper.read(self.looks), 0
        labels: list[Tensor] = []
        precision = ""
        for x, y in batches:
            labels.append(y.cpu())
            precision = name_precision(model, x)
            batch = self.options.batch or (50 if x.device.type == "cpu" else 1000)
            sampler = Sampler(model, self.options.sigma, self.seed, batch)
            # More images than fill a forward pass with a chunk each: some are decided early.
            for part in torch.split(x, AT_ONCE * sampler.together):
                if seen >= len(work.done):
                    self._judge(sampler, part, work, keeper)
                seen += len(part)
        return self._conclude(work.done, torch.cat(labels).numpy(), precision)

    def _judge(self, sampler: Sampler, x: Tensor, work: Work, keeper: Keeper) -> None:
        """Sample the evaluation's next images x (B, C, H, W) and add their tallies to `work`."""
        first = len(work.done)
        if not work.group:
            work.group, work.look = self._choose(sampler, x, first), 0
        while work.look < len(self.looks):
            chunks = [
                chunk
                for row, tally in enumerate(work.group)
                if not tally.decided
                for chunk in self._plan(row, first + row, tally.samples, self.looks[work.look])
            ]
            for found in sampler.sample(x, chunks, "estimate"):
                for chunk, classes in found:
                    tally = work.group[chunk.row]
                    tally.hits += int((classes == tally.prediction).sum())
                    tally.samples += chunk.size
                keeper.save(work)
                self.pause()
            for tally in work.group:
                if not tally.decided:
                    self._decide(tally)
            work.look += 1
        work.done += work.group
        work.group = []

    def _plan(self, row: int, image: int, start: int, stop: int) -> list[Chunk]:
        """The chunks with the samples `start` to `stop` of an image.

        A `start` within a chunk can only be the end of all samples, which leaves no chunks.
        """
        numbers = range(ceil(start / CHUNK), ceil(stop / CHUNK))
        return [Chunk(row, image, k, min(CHUNK, stop - k * CHUNK)) for k in numbers]

    def _choose(self, sampler: Sampler, x: Tensor, first: int) -> list[Tally]:
        """Tallies with the most frequent class among `n0` samples; of several, the smallest.

        `first` is the number of the first image of x (B, C, H, W) in the evaluation.
        """
        votes: list[list[Tensor]] = [[] for _ in x]
        chunks = [
            c for row in range(len(x)) for c in self._plan(row, first + row, 0, self.options.n0)
        ]
        for found in sampler.sample(x, chunks, "choose"):
            for chunk, classes in found:
                votes[chunk.row].append(classes[classes != NO_CLASS])
        # If all outputs of an image are NaN, class 0 will do: it will not get any hits.
        return [Tally(int(torch.cat(v).bincount(minlength=1).argmax())) for v in votes]

    def _decide(self, tally: Tally) -> None:
        """Update the bound of a tally with its samples so far, and whether it is decided."""
        n, alpha, enough = self.options.n, self.options.alpha, log(1 / self.options.alpha)
        if not self.options.sequential:
            tally.lower, tally.decided = lower_bound(tally.hits, n, alpha), True
            return
        left = [p for p in self.steps if p > tally.lower]
        while left and log_evidence(tally.hits, tally.samples, left[0]) >= enough:
            tally.lower = left.pop(0)
        plausible = upper_bound(tally.hits, tally.samples, alpha)
        hits = tally.hits + ceil((n - tally.samples) * plausible)
        tally.decided = tally.samples == n or not left or log_evidence(hits, n, left[0]) < enough

    def _conclude(self, tallies: Sequence[Tally], y: np.ndarray, precision: str) -> Result:
        """Metrics and records of all images, with labels y (N,)."""
        options = self.options
        radius = np.array([certified_radius(t.lower, options.sigma) for t in tallies])
        abstained = radius < 0
        if options.sequential:
            steps = np.sort([0.0, *options.radii])
            radius = steps[np.searchsorted(steps, radius, side="right").clip(1) - 1]
        radius = radius.clip(0)
        prediction = np.array([t.prediction for t in tallies])
        samples = np.array([t.samples for t in tallies])
        correct = (prediction == y) & ~abstained
        metrics = {"accuracy": proportion(correct), "abstained": proportion(abstained)}
        for r in options.radii:
            metrics[f"certified@{name_radius(r)}"] = proportion(correct & (radius >= r))
        if options.sequential:
            metrics["passes"] = Metric(options.n0 + samples.mean(), n=len(y))
        else:
            metrics["acr"] = Metric((radius * correct).mean(), n=len(y), unit="pixels")
        settings = {
            "sigma": options.sigma,
            "alpha": options.alpha,
            "n0": options.n0,
            "samples": options.n,
            "sequential": options.sequential,
        }
        metrics |= {name: Metric(value, kind="setting") for name, value in settings.items()}
        records = {
            "prediction": prediction,
            "count": np.array([t.hits for t in tallies]),
            "samples": samples,
            "radius": radius,
            "abstained": abstained,
            "correct": correct,
            "precision": np.full(len(y), precision),
        }
        return Result(metrics, records)


def name_precision(model: nn.Module, x: Tensor) -> str:
    """The dtype in which the network computes on x, such as "float32"."""
    device = x.device.type
    dtype = next((p.dtype for p in model.parameters()), x.dtype)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return str(dtype).removeprefix("torch.")


def build_certify(options: CertifyOptions, context: EvaluatorContext) -> Certify:
    """Build the evaluator `certify`."""
    return Certify(options, context.seed, context.scratch, context.pause)
