"""The pruners: each says how much every weight matters."""

from __future__ import annotations

import torch

from prunekit import NoOptions
from prunekit.contracts import Context, Pruner, Scores
from prunekit_pruners import ScoreOptions
from prunekit_pruners.sensitivity import measure_sensitivity
from prunekit_pruners.starts import start_scores


def build_score(options: ScoreOptions, context: Context) -> Pruner:
    """Scores trained on the stage's objective from the start that the recipe chose."""
    return lambda context: context.learn(
        Scores(start_scores(options.start, context), layerwise=True)
    )


def build_lwm(options: NoOptions, context: Context) -> Pruner:
    """|w|."""
    return lambda context: Scores({n: w.detach().abs() for n, w in context.weights.items()})


def build_snip(options: NoOptions, context: Context) -> Pruner:
    """|dL/dw * w| on one batch; layers compare, so that a global budget takes it as it is."""
    return lambda context: Scores(measure_sensitivity(context))


def build_random(options: NoOptions, context: Context) -> Pruner:
    """Uniform on [0, 1)."""

    def score(context: Context) -> Scores:
        return Scores(
            {
                name: torch.rand(weight.shape, generator=context.generator).to(weight.device)
                for name, weight in context.weights.items()
            }
        )

    return score
