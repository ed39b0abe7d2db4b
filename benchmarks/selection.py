"""Does the radix selection by hand pay? `uv run python benchmarks/selection.py`.

A learning stage selects its masks anew at every step. Each line is a ratio within one run: medians
of interleaved calls, after the masks were checked to be equal. It is the time of `torch.topk` over
that of `prunekit.pruning.selection`, on one thread; above 1 the selection is faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from prunekit.pruning.selection import keep_top

SIZES = {"small CNN": 20_000, "VGG-4": 200_000, "WRN-28-4": 5_800_000, "ResNet-18": 11_200_000}
ROUNDS = 9


def keep_top_plainly(values: Tensor, kept: int) -> Tensor:
    flat = values.flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[torch.topk(flat, kept, sorted=False).indices] = True
    return mask.view_as(values)


def measure(call: Callable[[Tensor, int], Tensor], values: Tensor, kept: int) -> float:
    started = time.perf_counter()
    call(values, kept)
    return time.perf_counter() - started


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, one thread")
    for name, n in SIZES.items():
        values = torch.randn(n).abs()
        for sparsity in (0.9, 0.99):
            kept = round(n * (1 - sparsity))
            assert torch.equal(keep_top(values, kept), keep_top_plainly(values, kept))
            pairs = [
                [measure(call, values, kept) for call in (keep_top_plainly, keep_top)]
                for _ in range(ROUNDS)
            ]
            ours = statistics.median(pair[1] for pair in pairs)
            ratios = sorted(pair[0] / pair[1] for pair in pairs)
            low, middle, high = ratios[0], statistics.median(ratios), ratios[-1]
            print(
                f"{name:<10} {n:>10,} weights, {sparsity:.0%} removed: {middle:.2f} "
                f"({low:.2f} to {high:.2f}), {1000 * ours:.2f} ms"
            )


if __name__ == "__main__":
    main()
