"""Flying Bird+: the density follows overfitting, and comes back to the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any

from torch import Tensor

from prunekit import count_kept, share_out
from prunekit.contexts import NetworkContext
from prunekit.contracts import Clock, Scores
from prunekit.errors import RunError
from prunekit.steps import Budget, Layers, Moment, Rewirer
from prunekit_rewirers import FlyingBirdPlusOptions
from prunekit_rewirers.exchange import anneal, choose_first, drop_and_grow


@dataclass(frozen=True)
class FlyingBirdPlus:
    """Flying Bird that prunes more where robust overfitting sets in, and grows more where the
    validation error rises (Chen et al., ICLR 2022)."""

    options: FlyingBirdPlusOptions
    budget: Budget

    def due(self, clock: Clock) -> bool:
        """Whether to rewire in this step."""
        return clock.step % self.options.every == 0

    def __call__(self, moment: Moment) -> Scores:
        """Scores, and how many weights each layer keeps.

        Raises `RunError` for a budget that compares scores, and without validation images.
        """
        if moment.first:
            start = choose_first(moment, self.options.start)
            return Scores(start.values, keep=self._share(moment, self._ask_budget(moment, start)))
        options, clock = self.options, moment.clock
        kept = {name: int(mask.sum()) for name, mask in moment.masks.items()}
        part = 0.0 if moment.final else anneal(options.fraction, options.last, clock.fraction)
        back = moment.final or clock.fraction >= options.until
        keep = self._share(moment, kept) if back else kept
        less, more = (0.0, 0.0) if back else self._adapt(moment)
        changes = {}
        for name, count in kept.items():
            exchanged, missing = ceil(part * count), keep[name] - count
            dropped = min(count, exchanged + int(less * part * count) + max(0, -missing))
            changes[name] = (dropped, exchanged + int(more * exchanged) + max(0, missing))
            if not back and count == moment.masks[name].numel():  # what is dense stays so
                changes[name] = (0, 0)
        values = drop_and_grow(moment, changes, options.growth)
        return Scores(values, keep={n: int(value.count_nonzero()) for n, value in values.items()})

    def _adapt(self, moment: Moment) -> tuple[float, float]:
        """How much more is dropped, and how much more is grown, of what is exchanged."""
        options, history = self.options, moment.history
        errors = [1 - _read_validation(row) for row in history]
        gaps = [row["accuracy"] + e for row, e in zip(history, errors, strict=True)]  # less 1
        begun = moment.clock.epoch >= options.after * moment.clock.epochs
        if not begun or len(history) <= options.epochs:
            return 0.0, 0.0
        less = options.less if _rises(gaps, options.epochs) else 0.0
        return less, options.more if _rises(errors, options.epochs) else 0.0

    def _ask_budget(self, moment: Moment, start: Scores) -> dict[str, int]:
        weights = moment.weights
        total = count_kept(sum(w.numel() for w in weights.values()), moment.sparsity)
        shapes = {name: weight.shape for name, weight in weights.items()}
        found = self.budget(Layers(start.values, {}, shapes, moment.sparsity, total))
        counts = {name: count for name, count in found.items() if not isinstance(count, Tensor)}
        if counts.keys() != weights.keys():
            raise RunError(
                "flyingbird-plus needs a budget that says how many weights layers keep, and "
                f'{self.options.budget.name} compares scores; write budget = "igq"'
            )
        return counts

    def _share(self, moment: Moment, kept: Mapping[str, int]) -> dict[str, int]:
        """The counts in proportion, their sum exactly what the sparsity leaves."""
        sizes = {name: weight.numel() for name, weight in moment.weights.items()}
        total = count_kept(sum(sizes.values()), moment.sparsity)
        return share_out({name: kept[name] / sizes[name] for name in sizes}, sizes, total)


def _rises(values: Sequence[float], last: int) -> bool:
    """Whether at least half of the last differences are above 0."""
    recent = values[-last - 1 :]
    rises = sum(after > before for before, after in pairwise(recent))
    return 2 * rises >= last


def _read_validation(row: Mapping[str, Any]) -> float:
    """The accuracy under attack (or its kin) of an epoch's validation, else the plain one."""
    plain = ("validation.accuracy", "validation.balanced_accuracy")
    names = [name for name in row if name.startswith("validation.")]
    hard = [name for name in names if name not in plain]
    if not names:
        raise RunError(
            "flyingbird-plus looks at validation images, and there are none; "
            "write validation = 0.1 in [dataset]"
        )
    return float(row[hard[0] if hard else plain[0]])


def build(options: FlyingBirdPlusOptions, context: NetworkContext) -> Rewirer:
    """Build the rewirer `flyingbird-plus`."""
    return FlyingBirdPlus(options, options.budget.build(context))
