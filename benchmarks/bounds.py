"""Bounds of masked networks against auto_LiRPA itself: `uv run python benchmarks/bounds.py`.

Each line is a ratio within one run, medians of interleaved steps, after the results were checked to
be equal: CROWN-IBP through learned masks against auto_LiRPA's bare call on a dense network of the
same weights, and MixTrain's symbolic bound against the bare call. Above 1 is faster than the peer.
Steps are a forward, the bounds and a backward; both sides bound the same images.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import torch
from prunekit_lirpa import versions
from prunekit_lirpa.bounds import Bounds
from prunekit_lirpa.margins import compare_classes, robust_cross_entropy, surround
from torch import Tensor, nn

from prunekit.catalog.registry import load_registry
from prunekit.contexts import ArchitectureContext
from prunekit.contracts import Clock, Scores
from prunekit.pruning.layers import find_prunable
from prunekit.pruning.learning import effective_parameters
from prunekit.pruning.selection import Selection
from prunekit.testing import example_context, resolve
from prunekit.training.masking import LearnedScores

SHAPE, K, EPS = (3, 32, 32), 10, 0.007


def make_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    component = load_registry().find("architecture", name).component
    use = resolve(component, {}, Path.cwd())
    return use.build(example_context(ArchitectureContext, shape=SHAPE, classes=K))


def measure(steps: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median seconds of each; they take turns, so that what else the machine does hits all."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats + 1):
        for name, step in steps.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:  # the first is warm-up
                spent[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in spent.items()}


def compare(network: str, method: str, relu: Any, images: int, repeats: int) -> float:
    """How many times faster than auto_LiRPA's bare call on the dense network."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = make_network(network).to(device)
    x, y = torch.rand(images, *SHAPE, device=device), torch.randint(K, (images,), device=device)
    start = Scores({name: torch.randn_like(weight) for name, weight in find_prunable(net).items()})
    trained = LearnedScores(net, start, Selection(0.9), {}, "train")
    bounds = Bounds(net, SHAPE, relu)

    dense = make_network(network).to(device)
    clock = Clock(0, 1, 0, 1)
    with trained.effective(clock):
        masked = {name: value.detach() for name, value in effective_parameters(net).items()}
    dense.load_state_dict(masked)
    bare = versions.trace(dense, torch.zeros(2, *SHAPE, device=device), relu)
    auto_lirpa = versions.load()

    def masked_step() -> Tensor:
        with trained.effective(clock):
            net(x)
            lower = bounds.margins(surround(x, EPS), y, method)
            robust_cross_entropy(lower).backward()
        return lower.detach()

    def bare_step() -> Tensor:
        dense(x)
        box = surround(x, EPS)
        region = auto_lirpa.PerturbationLpNorm(norm=inf, x_L=box.lower, x_U=box.upper)
        lower, _ = bare.compute_bounds(
            x=(auto_lirpa.BoundedTensor(x, region),), C=compare_classes(y, K),
            method={"crown-ibp": "CROWN-IBP", "crown": "CROWN"}[method], bound_upper=False,
        )  # fmt: skip
        robust_cross_entropy(lower).backward()
        return lower.detach()

    torch.testing.assert_close(masked_step(), bare_step(), atol=1e-3, rtol=1e-4)
    found = measure({"masked": masked_step, "bare": bare_step}, repeats)
    return found["bare"] / found["masked"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--large", action="store_true", help="the large CNN too; wants a GPU")
    arguments = parser.parse_args()
    for network in ("cifar-small", "cifar-large")[: 2 if arguments.large else 1]:
        for name, method, relu, images in (
            ("CROWN-IBP, masked against dense", "crown-ibp", "adaptive", 64),
            ("MixTrain, k = 1", "crown", "same-slope", 1),
            ("MixTrain, k = 5", "crown", "same-slope", 5),
        ):
            ratio = compare(network, method, relu, images, arguments.repeats)
            print(f"{network}, batch {images}: {name}: {ratio:.2f}x auto_LiRPA's bare call")


if __name__ == "__main__":
    main()
