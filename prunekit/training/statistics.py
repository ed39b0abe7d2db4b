"""Running statistics of batch normalization, measured anew on training images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice

import torch
from torch import nn

from prunekit.contracts import Clock, Objective
from prunekit.data import seeds
from prunekit.data.batches import Feed
from prunekit.evaluation import eval_mode
from prunekit.graph.looking import is_frozen
from prunekit.steps import Recalibrating, Wrapper

Norms = list[nn.modules.batchnorm._BatchNorm]


def _find_norms(model: nn.Module) -> Norms:
    kinds = nn.modules.batchnorm._BatchNorm
    found = [module for module in model.modules() if isinstance(module, kinds)]
    return [norm for norm in found if norm.training and not is_frozen(norm)]


@torch.no_grad()
def recalibrate(model: nn.Module, passes: Iterable[Callable[[], object]]) -> None:
    """Set the statistics of batch normalization to the average over the batches of these passes.

    Everything but batch normalization is in evaluation mode meanwhile.
    """
    norms = _find_norms(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative average
    with eval_mode(model):
        for go in passes:
            for norm in norms:
                norm.train()
            go()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@contextmanager
def recalibrated(
    model: nn.Module,
    objective: Objective,
    feed: Feed,
    clock: Clock,
    seed: tuple[int, int],
    wrappers: Sequence[Wrapper],
) -> Iterator[None]:
    """Inside, the statistics are those of training batches, if a wrapper is `Recalibrating`.

    The objective goes through the network as in training, so that they are of its own mixture of
    clean and attacked images. The batches are the same in every epoch.
    """
    batches = sum(w.batches(clock) for w in wrappers if isinstance(w, Recalibrating))
    if not batches:
        yield
        return
    buffers = [buffer for norm in _find_norms(model) for buffer in norm.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]

    def passes() -> Iterator[Callable[[], object]]:
        images = feed.epoch(seeds.derive_seed(*seed, "statistics"))
        for number, (x, y) in enumerate(islice(images, batches)):
            seeds.seed_all(*seed, "statistics", number)
            yield partial(objective, x, y, clock)

    recalibrate(model, passes())
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
