"""What every evaluation needs: a network that stands still, and fractions with intervals."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from math import sqrt

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunekit.contracts import Masks, Metric
from prunekit.steps import Backend

Z95 = 1.959963984540054
"""95 % of a normal distribution lie within this many standard deviations."""

UNBALANCED = 1.5
"""Classes are unbalanced when the largest has at least this many times as many images as the
smallest."""


BACKEND: ContextVar[Backend | None] = ContextVar("backend", default=None)
"""What networks run on at present; None is torch alone."""

_PLAIN: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, networks run on torch's own operators, as bounds that prove something need it."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def is_plain() -> bool:
    """Whether a backend has to leave alone what is called now."""
    return _PLAIN.get()


@contextmanager
def running(model: nn.Module, masks: Masks, *, still: bool = False) -> Iterator[None]:
    """Around passes of a network: the backend, if there is one, with these arguments."""
    backend = BACKEND.get()
    with nullcontext() if backend is None else backend.around(model, masks, still=still):
        yield


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


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """The network as a function of pixels while its weights stand, for attacks and judgements.

    Yields what to call: in evaluation mode, and plain parameters take no gradient. Afterwards every
    submodule is back in its own mode, and every parameter trains that trained.
    """
    # What weights are made from trains on: a weight that parametrize.cached() makes in here first
    # would be without a graph for the rest of the step.
    made_from = {
        parameter
        for module in model.modules()
        if isinstance(module, parametrize.ParametrizationList)
        for parameter in module.parameters()
    }
    own = (p for p in model.parameters() if p.is_leaf and p not in made_from)
    trained = [p for p in own if p.requires_grad]
    with eval_mode(model):
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            with running(model, {}, still=True):
                yield model
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


@contextmanager
def own_generators() -> Iterator[None]:
    """Restore the random generators of torch, numpy and Python afterwards."""
    states = random.getstate(), np.random.get_state()
    # What looks at the generator of a GPU sets that up, and a run on the CPU needs none.
    begun = torch.cuda.is_initialized()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if begun else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
    if not begun and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(torch.initial_seed())  # as torch would have begun them


class Standing:
    """The parameters and buffers of a network as they are now; for one that changes them itself."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._owners = [(module, dict(module._buffers)) for module in model.modules()]
        self._kept = {name: (value, value.detach().clone()) for name, value in _state(model)}

    def moved(self) -> tuple[str, ...]:
        """Names of those that are not what they were."""
        now = dict(_state(self._model))
        both = now.keys() & self._kept.keys()
        changed = [name for name in both if not _same(now[name], self._kept[name][1])]
        return tuple(sorted([*changed, *(now.keys() ^ self._kept.keys())]))

    @torch.no_grad()
    def restore(self) -> tuple[str, ...]:
        """Make them what they were; returns the names of what `moved`, all that is touched."""
        moved, now = self.moved(), dict(_state(self._model))
        for module, buffers in self._owners:
            for name in set(module._buffers.keys()) - buffers.keys():
                del module._buffers[name]
            for name, buffer in buffers.items():  # one by one: scripted modules know no other way
                module._buffers[name] = buffer
        for name, (value, kept) in self._kept.items():
            if now.get(name) is value and name not in moved:
                continue
            if _lies(value) != _lies(kept):  # another was put into its `.data`
                value.data = kept.clone()
            elif not _same(value, kept):
                value.copy_(kept)
        return moved


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _lies(value: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return value.shape, value.dtype, value.device


def _same(one: Tensor, other: Tensor) -> bool:
    if _lies(one) != _lies(other) or torch.equal(one, other):
        return _lies(one) == _lies(other)
    return one.is_floating_point() and torch.allclose(one, other, 0, 0, equal_nan=True)


def wilson(count: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a fraction count / n (Wilson 1927, JASA), 95 % by default.

    >>> tuple(round(v, 4) for v in wilson(8, 10))
    (0.4902, 0.9433)
    """
    p = count / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def proportion(correct: np.ndarray) -> Metric:
    """The metric of a per-image verdict (N,) of booleans: the fraction, its interval, and n.

    >>> proportion(np.array([True, False])), proportion(np.array([True, False])).n
    (0.5, 2)
    """
    n, count = len(correct), int(np.count_nonzero(correct))
    low, high = wilson(count, n)
    return Metric(count / n, n=n, low=low, high=high, unit="fraction")


def is_unbalanced(labels: np.ndarray) -> bool:
    """Whether accuracy alone would mislead: a constant answer to the largest class scores well.

    >>> is_unbalanced(np.array([0, 0, 0, 1])), is_unbalanced(np.array([0, 1, 2]))
    (True, False)
    """
    _, counts = np.unique(labels, return_counts=True)
    return len(counts) > 0 and bool(counts.max() >= UNBALANCED * counts.min())


def balance(values: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(mean over the classes that occur of the mean of their values, its standard error).

    `values` (N,) lie in [0, 1]. The variance of a class is that of Wilson's center, so that a class
    with all values right or wrong still has one.

    >>> balance(np.array([1, 1, 1, 0]), np.array([0, 0, 0, 1]))[0]
    0.5
    """
    means, variances = [], []
    for label in np.unique(labels):
        own = np.asarray(values[labels == label], dtype=float)
        center = (own.sum() + Z95**2 / 2) / (len(own) + Z95**2)
        means.append(own.mean())
        variances.append(center * (1 - center) / len(own))
    return float(np.mean(means)), sqrt(sum(variances)) / len(means)


def balanced_proportion(correct: np.ndarray, labels: np.ndarray) -> Metric:
    """As `proportion`, every class counting alike; with a normal 95 % interval.

    >>> balanced_proportion(np.array([True, False]), np.array([0, 1]))
    0.5
    """
    mean, error = balance(correct, labels)
    low, high = max(0.0, mean - Z95 * error), min(1.0, mean + Z95 * error)
    return Metric(mean, n=len(correct), low=low, high=high, unit="fraction")
