from dataclasses import replace

from torch import nn

from prunekit import LearnedScores, count_kept, share_out
from prunekit.contracts import Scores


class Rate(nn.Module):
    """The density of a layer, floor + (1 - floor) sigmoid(raw)."""

    def __init__(self, floor, start):
        super().__init__()
        self.floor = floor
        inner = ((start - floor) / (1 - floor)).clamp(0.01, 0.99)
        self.raw = nn.Parameter(inner.logit())

    def forward(self):
        return self.floor + (1 - self.floor) * self.raw.sigmoid()


class Harp(LearnedScores):
    def __init__(self, *given, rates, gamma):
        super().__init__(*given, rates=rates)
        self.gamma = gamma
        self.sizes = {name: value.numel() for name, value in self.start.values.items()}
        self.target = count_kept(sum(self.sizes.values()), self.selection.sparsity)

    def parameters(self):
        scores, rates = super().parameters()
        return [scores, replace(rates, rate=0.1, decay=0.0)]

    def penalty(self, clock):
        kept = sum(rate() * self.sizes[name] for name, rate in self.rates.items())
        return {"budget": (clock.epoch + 1) * self.gamma * (kept / self.target - 1).clamp_min(0)}

    def moving(self):
        counts = {n: round(rate().item() * self.sizes[n]) for n, rate in self.rates.items()}
        return Scores(super().scores().values, keep=counts)

    def scores(self):
        low, high = 0.0, 1 / min(rate().item() for rate in self.rates.values())
        for _ in range(60):  # the common factor that meets the target
            factor = (low + high) / 2
            scaled = {n: min(1.0, max(r.floor, factor * r().item())) for n, r in self.rates.items()}
            enough = sum(scaled[n] * size for n, size in self.sizes.items()) >= self.target
            low, high = (low, factor) if enough else (factor, high)
        return Scores(super().scores().values, keep=share_out(scaled, self.sizes, self.target))


def build(options, context):
    def prune(context):
        start, rates, floor = {}, {}, options.floor * (1 - context.sparsity)
        for name, weight in context.weights.items():
            start[name] = weight * (6 / weight[0].numel()) ** 0.5 / weight.abs().max()
            rates[name] = Rate(floor, weight.new_tensor(options.start))
        masking = context.attach(Scores(start), Harp, rates=rates, gamma=options.gamma)
        return context.train(masking)

    return prune
