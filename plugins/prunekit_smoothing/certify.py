"""Certified radii of the smoothed classifier, from a fixed number of samples or from fewer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from prunekit import read_json, write_json
from prunekit.contracts import Context, Result
from prunekit.evaluation import proportion
from prunekit_smoothing import CHUNK, CertifyOptions, name_radius, plan_looks
from prunekit_smoothing.bounds import certified_radius, lower_bound, upper_bound
from prunekit_smoothing.sampling import NO_CLASS, Chunk, Sampler

SAVE_SECONDS = 5.0
"""So much sampling a kill may cost."""


@dataclass
class Tally:
    """What is known of an image: of `samples` noisy copies, `hits` were of the class `prediction`.

    Other copies chose the class. `lower` bounds its probability; `decided` images are sampled no
    more.
    """

    prediction: int
    hits: int = 0
    samples: int = 0
    lower: float = 0.0
    decided: bool = False


@dataclass
class Work:
    """How far an evaluation is: images that are done, and those that are sampled together now."""

    done: list[Tally] = field(default_factory=list)
    group: list[Tally] = field(default_factory=list)
    look: int = 0
    """The number of the look that `group` is sampled for."""


@dataclass
class Keeper:
    """Keeps the work in a file, now and then; without one, it does nothing."""

    file: Path | None
    saved: float = field(default_factory=time.monotonic)

    def read(self) -> Work:
        if self.file is None or not self.file.exists():
            return Work()
        kept = read_json(self.file)
        done, group = ([Tally(**tally) for tally in kept[key]] for key in ("done", "group"))
        return Work(done, group, kept["look"])

    def save(self, work: Work) -> None:
        if self.file is not None and time.monotonic() - self.saved >= SAVE_SECONDS:
            write_json(self.file, asdict(work))
            self.saved = time.monotonic()


@dataclass(frozen=True)
class Certify:
    """Certified L2 radii of the smoothed classifier (Cohen et al., ICML 2019, section 3.2.2).

    The class of an image is the mode of `n0` noisy copies. Fresh ones bound its probability p from
    below, and the class is certified within sigma * Phi^-1(p): for each image this is wrong with
    probability `alpha` at most. Below p = 1/2 the classifier abstains.

    With `sequential`, p is bounded at several looks that share `alpha`, so that all bounds hold
    together and the largest counts. Sampling stops where each of the given radii is certified, or
    futile: not certified at the last look either, even if the remaining samples hit as often as
    they plausibly can (as the upper bound at level `alpha` says). Futility costs no alpha, and says
    "not certified", no more. The radius of an image is then the largest of the given ones that is
    certified, or 0.

    Metrics: `accuracy` (right, not abstained), `abstained`, `certified@R`, and `acr`, the mean over
    all images of radius * [correct], or if sequential `passes`, the forward passes an image took;
    and what it was measured with, `sigma`, `alpha`, `n0`, `samples` (n) and `sequential` (1 or 0).
    Records, (N,) each: `prediction`, `count` of `samples`, `radius` (0 if abstained), `abstained`,
    `correct`, `precision` (of the network that was sampled: the certificate is its).

    With a folder `scratch`, counts are kept there, and an evaluation that was cut off goes on from
    them to the same result. `pause` is called after each forward pass, and may raise.
    """

    options: CertifyOptions
    seed: int
    scratch: Path | None = None
    pause: Callable[[], None] = lambda: None

    @property
    def looks(self) -> tuple[int, ...]:
        return plan_looks(self.options)

    @property
    def alpha(self) -> float:
        """Of a look: by Bonferroni, the bounds of all looks hold with 1 - `options.alpha`."""
        return self.options.alpha / len(self.looks)

    @torch.no_grad()
    def __call__(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Result:
        keeper = Keeper(self.scratch / "certify.json" if self.scratch else None)
        work, seen = keeper.read(), 0
        labels: list[Tensor] = []
        precision = ""
        for x, y in batches:
            labels.append(y.cpu())
            precision = name_precision(model, x)
            batch = self.options.batch or (50 if x.device.type == "cpu" else 1000)
            sampler = Sampler(model, self.options.sigma, self.seed, batch)
            # So many images that the first chunks of all make one forward pass.
            for part in x.split(sampler.together):
                if seen >= len(work.done):
                    self.judge(sampler, part, work, keeper)
                seen += len(part)
        return self.conclude(work.done, torch.cat(labels).numpy(), precision)

    def judge(self, sampler: Sampler, x: Tensor, work: Work, keeper: Keeper) -> None:
        """Add the tallies of the images x (B, C, H, W), the next of the evaluation, to the work."""
        first = len(work.done)
        if not work.group:
            work.group, work.look = self.choose(sampler, x, first), 0
        while work.look < len(self.looks):
            chunks = [
                chunk
                for row, tally in enumerate(work.group)
                if not tally.decided
                for chunk in self.plan(row, first + row, tally.samples, self.looks[work.look])
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
                    self.decide(tally)
            work.look += 1
        work.done += work.group
        work.group = []

    def plan(self, row: int, image: int, start: int, stop: int) -> list[Chunk]:
        """The chunks of samples `start` to `stop`; a start within a chunk is the end of all."""
        numbers = range(ceil(start / CHUNK), ceil(stop / CHUNK))
        return [Chunk(row, image, k, min(CHUNK, stop - k * CHUNK)) for k in numbers]

    def choose(self, sampler: Sampler, x: Tensor, first: int) -> list[Tally]:
        """Tallies with the most frequent class of `n0` samples, the smallest of several."""
        votes: list[list[Tensor]] = [[] for _ in x]
        chunks = [
            c for row in range(len(x)) for c in self.plan(row, first + row, 0, self.options.n0)
        ]
        for found in sampler.sample(x, chunks, "choose"):
            for chunk, classes in found:
                votes[chunk.row].append(classes[classes != NO_CLASS])
        # Where no output is a number, class 0 serves: it gets no hits either.
        return [Tally(int(torch.cat(v).bincount(minlength=1).argmax())) for v in votes]

    def decide(self, tally: Tally) -> None:
        """Look at the samples so far."""
        n = self.options.n
        bound = lower_bound(tally.hits, tally.samples, self.alpha)
        tally.lower = max(tally.lower, bound)
        plausible = upper_bound(tally.hits, tally.samples, self.options.alpha)
        hits = tally.hits + ceil((n - tally.samples) * plausible)
        best = max(tally.lower, lower_bound(hits, n, self.alpha))
        reached = self.count_reached(tally.lower)
        tally.decided = tally.samples == n or reached == self.count_reached(best)

    def count_reached(self, p: float) -> int:
        """How many of 0 and the given radii such a bound certifies."""
        radius = certified_radius(p, self.options.sigma)
        return sum(radius >= r for r in (0.0, *self.options.radii))

    def conclude(self, tallies: Sequence[Tally], y: np.ndarray, precision: str) -> Result:
        """Metrics and records; labels y are (N,)."""
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
        metrics = proportion("accuracy", correct) | proportion("abstained", abstained)
        for r in options.radii:
            metrics |= proportion(f"certified@{name_radius(r)}", correct & (radius >= r))
        if options.sequential:
            metrics["passes"] = options.n0 + float(samples.mean())
        else:
            metrics["acr"] = float((radius * correct).mean())
        metrics |= {
            "sigma": options.sigma, "alpha": options.alpha, "n0": options.n0, "samples": options.n,
            "sequential": float(options.sequential),
        }  # fmt: skip
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
    """The type of number that the network computes with, such as "float32"."""
    device = x.device.type
    dtype = next((p.dtype for p in model.parameters()), x.dtype)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return str(dtype).removeprefix("torch.")


def build_certify(options: CertifyOptions, context: Context) -> Certify:
    return Certify(options, context.seed, context.scratch, context.pause)
