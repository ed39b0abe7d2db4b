"""HARP: scores and the keep rates of layers, learned together (Zhao and Wressnegger, ICLR 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunekit import (
    LearnedScores,
    UserError,
    count_kept,
    count_units,
    exact,
    select_masks,
    share_out,
)
from prunekit.contexts import PrunerContext
from prunekit.contracts import Clock, Masks, Scores
from prunekit.evaluation import eval_mode
from prunekit.steps import Budget, ParamGroup, Pruner, SparsitySchedule
from prunekit_pruners import HarpOptions
from prunekit_pruners.starts import start_scores


class Rate(nn.Module):
    """The fraction of a layer that is kept: k = k_min + (1 - k_min) sigmoid(r), with r learned."""

    def __init__(self, least: float, start: float) -> None:
        super().__init__()
        self.least = least
        inner = (torch.tensor(start) - least) / (1 - least)
        self.raw = nn.Parameter(inner.clamp(0.01, 0.99).logit())

    def forward(self) -> Tensor:
        return self.least + (1 - self.least) * self.raw.sigmoid()


class Harp(LearnedScores):
    """Scores s and rates k: in layer l the k_l n_l largest |s| are kept (section 3 of the paper).

    n_l are the weights that earlier stages left; or the channels, where those of coupled layers
    count once and have one rate; in the budget loss, if there are `prices`, those of its weights.
    With g_m = dL/dw_eff * w, the gradient of k_l is the sum of
    g_m over the whole layer, and dk/dr = (1 - k_min) sigmoid(r) (1 - sigmoid(r)). `budget` shares
    out the rates at the start.

    Raises `UserError` if the floors leave more than the sparsity.
    """

    def __init__(
        self,
        model: nn.Module,
        start: Scores,
        selection: Any,
        alive: Masks,
        bn: str = "train",
        schedule: SparsitySchedule | None = None,
        *,
        options: HarpOptions,
        budget: Budget,
        prices: Mapping[str, float],
    ) -> None:
        self.options, self.layer = options, dict[str, str]()
        for group in selection.group(start.values):
            self.layer |= dict.fromkeys(group.weights, group.name)
        whole = {n: torch.ones_like(v, dtype=torch.bool) for n, v in start.values.items()}
        left = {name: alive.get(name, mask) for name, mask in whole.items()}
        self.sizes = count_units(left, selection)
        self.total = count_kept(sum(count_units(whole, selection).values()), selection.sparsity)
        self.target = self.total / sum(self.sizes.values())
        floor = options.floor * self.target
        least = exact(options.floor) * self.total / sum(self.sizes.values())
        self.least = {n: max(1, ceil(least * size)) for n, size in self.sizes.items()}
        if sum(self.least.values()) > self.total:
            raise UserError(
                f"floor = {options.floor:g} keeps {sum(self.least.values())} in all layers, where "
                f"sparsity {selection.sparsity:g} leaves {self.total}; lower one of them"
            )
        first = replace(
            selection,
            sparsity=min(1 - options.density, selection.sparsity),
            budget=budget,
            compares=options.rates.component.compares,
        )
        weights = dict(model.named_parameters())
        magnitudes = Scores({name: weights[name].detach().abs() for name in whole})
        begun = count_units(select_masks(magnitudes, first, alive), selection)
        device = next(iter(whole.values())).device
        self.own = {n: Rate(floor, begun[n] / s).to(device) for n, s in self.sizes.items()}
        rates = {name: self.own[layer] for name, layer in self.layer.items()}
        super().__init__(model, start, selection, alive, bn, schedule, rates)
        self.prices: dict[str, float] = dict(self.sizes)
        if prices:
            self.prices = dict.fromkeys(self.own, 0.0)
            for name, layer in self.layer.items():
                self.prices[layer] += prices[name] * int(left[name].sum())
        part = next(iter(self.parts.values()))
        part.register_buffer("epochs", torch.zeros((), dtype=torch.int64, device=device))
        self.met = part.get_buffer("epochs")
        """How many epochs it took to meet the budget; 0 while it is not met."""

    def parameters(self) -> list[ParamGroup]:
        """The scores, and each rate at a learning rate of its own."""
        groups = [super().parameters()[0]]
        for name, rate in self.own.items():
            scale = sqrt(self.sizes[name]) if self.options.rate_scale == "root" else 1.0
            lr, decay = self.options.rate_lr / scale, self.options.rate_decay
            groups.append(ParamGroup([rate.raw], lr, decay))
        return groups

    def penalty(self, clock: Clock) -> dict[str, Tensor]:
        """gamma_e max(sum n_l k_l / (d sum n_l) - 1, 0), with gamma_e = (epoch + 1) gamma.

        gamma_e stays as it is once the budget is met, to four digits, at the end of an epoch.
        """
        kept = torch.stack([rate() * self.prices[name] for name, rate in self.own.items()]).sum()
        excess = (kept / (self.target * sum(self.prices.values())) - 1).clamp_min(0)
        if clock.epoch and clock.step * clock.epochs == clock.epoch * clock.steps:
            now = (self.met == 0) & (excess.detach() < 5e-5)
            self.met.copy_(torch.where(now, clock.epoch, self.met))
        epochs = torch.where(self.met > 0, self.met, clock.epoch + 1)
        return {"budget": epochs * self.options.gamma * excess}

    def _densities(self) -> dict[str, float]:
        values = torch.stack([rate().detach() for rate in self.own.values()]).tolist()
        return dict(zip(self.own, values, strict=True))

    def _keep(self, counts: Mapping[str, int]) -> Scores:
        keep = {name: counts[layer] for name, layer in self.layer.items()}
        return replace(super().scores(), keep=keep)

    def moving(self) -> Scores:
        """Counts by the rates as they are."""
        counts = dict(self.least)
        for name, density in self._densities().items():
            gone = int((1 - density) * self.sizes[name])
            counts[name] = max(counts[name], self.sizes[name] - gone)
        return self._keep(counts)

    def scores(self) -> Scores:
        """Counts by the rates projected to the target."""
        return self._keep(project(self._densities(), self.sizes, self.least, self.total))


def project(
    rates: Mapping[str, float], sizes: Mapping[str, int], least: Mapping[str, int], total: int
) -> dict[str, int]:
    """Whole counts, `total` in all, that follow c * rates * sizes between `least` and `sizes`.

    The common factor c is found by bisection; largest remainders are rounded up.

    >>> project({"a": 0.1, "b": 0.3}, {"a": 100, "b": 100}, {"a": 8, "b": 8}, 20)
    {'a': 8, 'b': 12}
    """

    def scale(factor: float) -> dict[str, float]:
        return {n: min(max(factor * rates[n] * sizes[n], least[n]), sizes[n]) for n in sizes}

    low, high = 0.0, 1 / min(rates.values())
    for _ in range(80):
        middle = (low + high) / 2
        enough = sum(scale(middle).values()) >= total
        low, high = (low, middle) if enough else (middle, high)
    return share_out({n: value / sizes[n] for n, value in scale(high).items()}, sizes, total)


def find_prices(count: str, context: PrunerContext) -> dict[str, float]:
    """What the budget loss counts for an entry of each prunable weight; {} if it counts units.

    MACs: how often it is multiplied for one image. Raises `UserError` where it is not the module
    of a weight that multiplies.
    """
    if count != "macs":
        return dict.fromkeys(context.weights if count == "weights" else (), 1.0)
    with eval_mode(context.model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        context.model(torch.zeros(1, *context.shape, device=context.device))
    flops = {n.partition(".")[2]: sum(c.values()) for n, c in counter.get_flop_counts().items()}
    found = {}
    for name, weight in context.weights.items():
        found[name] = flops.get(name.rpartition(".")[0], 0) / 2 / weight.numel()
        if not found[name]:
            raise UserError(f'count = "macs" finds none of {name}; write count = "weights"')
    return found


def build_harp(options: HarpOptions, context: PrunerContext) -> Pruner:
    """Scores and rates trained on the stage's objective."""

    def prune(context: PrunerContext) -> Scores:
        start = Scores(start_scores(options.start, context), layerwise=True)
        prices = find_prices(options.count, context)
        budget = options.rates.build(context)
        return context.train(
            context.attach(start, Harp, options=options, budget=budget, prices=prices)
        )

    return prune
