from math import cos, pi

import torch

from prunekit.contracts import Scores


class Rigl:
    def __init__(self, options, context):
        self.options = options

    def due(self, clock):
        return clock.step % self.options.every == 0 and clock.fraction < self.options.until

    def __call__(self, moment):
        done = min(1.0, moment.clock.fraction / self.options.until)
        part = self.options.fraction / 2 * (1 + cos(pi * done))
        values = {}
        for name, weight in moment.weights.items():
            mask = moment.masks[name]
            if moment.first:  # at random among what earlier stages kept
                values[name] = mask + torch.rand(mask.shape, generator=moment.generator)
                continue
            kept = int(mask.sum())
            size = weight.abs().masked_fill(~mask, -1).flatten()
            stay = size.topk(kept - int(part * kept)).indices
            grow = moment.gradients[name].abs().flatten()
            values[name] = grow.index_fill(0, stay, float("inf")).view_as(weight)
        return Scores(values)
