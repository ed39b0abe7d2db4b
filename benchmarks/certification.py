"""What `certify` gains: uv run python benchmarks/certification.py [--device cuda] [--threads N]

1. Speed at equal samples, against the loop of Cohen et al. 2019 (one image at a time, 1,000 noisy
   copies in a forward pass), written here afresh. Interleaved; the median of the ratios.
2. Samples saved by sequential sampling, on a small network that is trained here on the digits.

Prints ratios. Times depend on the machine, and on what else it does.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from prunekit_smoothing import CertifyOptions
from prunekit_smoothing.certify import Certify
from prunekit_smoothing.objectives import Stability
from scipy.stats import beta, norm
from torch import Tensor, nn

from prunekit.catalog.kinds import Facts
from prunekit.catalog.registry import load_registry
from prunekit.contexts import ArchitectureContext, Context, DatasetContext
from prunekit.contracts import Clock
from prunekit.testing import example_context

SIGMA, N0, N, ALPHA = 0.25, 100, 10_000, 0.001


def build(kind: str, name: str, facts: Facts | None = None) -> Any:
    """A component of prunekit with its default options."""
    component = load_registry().find(kind, name).component
    module, _, function = component.build.partition(":")
    context: Context = example_context(DatasetContext)
    if facts:
        shape, classes = facts.shape, facts.classes
        context = example_context(ArchitectureContext, shape=shape, classes=classes)
    return getattr(importlib.import_module(module), function)(component.options(), context)


@torch.no_grad()
def cohen(
    model: nn.Module, x: Tensor, classes: int, n: int = N, batch: int = 1000
) -> list[tuple[int, int, float]]:
    """(class, count, radius) of the images x (B, C, H, W), one after the other."""

    def count(image: Tensor, samples: int) -> np.ndarray:
        counts = np.zeros(classes, dtype=int)
        while samples > 0:
            size = min(batch, samples)
            copies = image.repeat(size, 1, 1, 1)
            noisy = copies + torch.randn_like(copies) * SIGMA
            counts += np.bincount(model(noisy).argmax(1).cpu().numpy(), minlength=classes)
            samples -= size
        return counts

    found = []
    for image in x:
        chosen = int(count(image, N0).argmax())
        hits = int(count(image, n)[chosen])
        lower = beta.ppf(ALPHA, hits, n - hits + 1) if hits else 0.0
        found.append((chosen, hits, max(0.0, float(SIGMA * norm.ppf(lower)))))
    return found


def ours(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Any:
    options = {"n": N, "sigma": SIGMA, "n0": N0, "alpha": ALPHA} | options
    return Certify(CertifyOptions(**options), seed=0)(model, [(x, y)])


def clock(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare_speed(device: torch.device, repeats: int) -> None:
    print(f"\nspeed against the loop of Cohen et al. ({device}, {torch.get_num_threads()} threads)")
    for name, shape, n in (
        ("mnist-small", (1, 28, 28), 10_000),
        ("cifar-small", (3, 32, 32), 10_000),
        ("cifar-large", (3, 32, 32), 2_000),
    ):
        torch.manual_seed(0)
        model = build("architecture", name, Facts(shape, 10, 1, 1)).eval().to(device)
        x = torch.rand(2, *shape, device=device)
        y = torch.zeros(2, dtype=torch.long, device=device)

        def ratio(model: nn.Module = model, x: Tensor = x, y: Tensor = y, n: int = n) -> float:
            naive = clock(lambda: cohen(model, x, 10, n), device)
            return naive / clock(lambda: ours(model, x, y, n=n, radii=(0.1,)), device)

        ratio()
        found = sorted(ratio() for _ in range(repeats))
        print(f"  {name:12} {statistics.median(found):.2f}x ({found[0]:.2f} to {found[-1]:.2f})")


def train() -> tuple[nn.Module, Tensor, Tensor, int]:
    """small-cnn on the digits with stability training; and the test images."""
    data = build("dataset", "digits")
    torch.manual_seed(0)
    facts = Facts(data.shape, data.classes, 1, 1)
    model = build("architecture", "small-cnn", facts)
    objective = Stability(model, SIGMA, draws=1, smoothing=0.0, beta=6.0)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    x, y = data.train.images.float() / 255, data.train.labels
    for epoch in range(30):
        for index in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            objective(x[index], y[index], Clock(epoch, 30, epoch, 30)).value.backward()
            optimizer.step()
    return model.eval(), data.test.images.float() / 255, data.test.labels, data.classes


def compare_samples(device: torch.device, images: int) -> None:
    model, x, y, classes = train()
    model, x, y = model.to(device), x[:images].to(device), y[:images].to(device)
    theirs, records = cohen(model, x, classes), ours(model, x, y).records
    for (chosen, hits, radius), c, k, r in zip(
        theirs, records["prediction"], records["count"], records["radius"], strict=True
    ):
        # The same procedure under other noise: counts differ as binomial ones do, radii with them.
        spread = (2 * hits * (1 - hits / N)) ** 0.5 + 1
        assert chosen != c or abs(hits - k) < 5 * spread, "not the same procedure"
        assert (chosen, hits) != (c, k) or abs(radius - r) < 1e-6, "not the same bound"
    fixed = records["radius"]
    print(f"\nsamples, {len(x)} digits, sigma {SIGMA}, at most {N:,} + {N0}")
    for radii in ((0.25,), (110 / 255,), (0.5,), (0.25, 0.5), (0.25, 110 / 255, 0.5, 0.75)):
        quick = ours(model, x, y, radii=radii, sequential=True)
        fewer = (N + N0) / quick.metrics["passes"]
        same = np.mean([(fixed >= r) == (quick.records["radius"] >= r) for r in radii])
        shown = ", ".join(f"{r:.4g}" for r in radii)
        print(f"  radii {shown:24} {fewer:5.1f}x fewer, {same:.1%} of verdicts the same")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compare_speed(torch.device(arguments.device), arguments.repeats)
    compare_samples(torch.device(arguments.device), arguments.images)
