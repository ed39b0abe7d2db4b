"""What every evaluation needs: the mode of a network while it is judged, and honest fractions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt

import numpy as np
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule is back in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def wilson(count: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a fraction count / n (Wilson 1927, JASA), 95 % by default.

    >>> tuple(round(v, 4) for v in wilson(8, 10))
    (0.4902, 0.9433)
    """
    p = count / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def proportion(name: str, correct: np.ndarray) -> dict[str, float]:
    """Metrics of a per-image verdict (N,) of booleans: the fraction, its interval, and n.

    >>> proportion("accuracy", np.array([True, False]))["accuracy"]
    0.5
    """
    n, count = len(correct), int(np.count_nonzero(correct))
    low, high = wilson(count, n)
    return {name: count / n, f"{name}_low": low, f"{name}_high": high, "n": n}
