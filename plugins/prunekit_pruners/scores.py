"""The pruners: each gives every prunable weight a score, and larger scores are kept."""

from __future__ import annotations

import torch

from prunekit import NoOptions
from prunekit.contexts import PrunerContext
from prunekit.contracts import Scores
from prunekit.steps import Pruner
from prunekit_pruners import ScoreOptions
from prunekit_pruners.sensitivity import measure_sensitivity
from prunekit_pruners.starts import start_scores


def build_score(options: ScoreOptions, context: PrunerContext) -> Pruner:
    """Scores trained on the stage's objective, from the start in the options (HYDRA, section 3)."""
    return lambda context: context.learn(
        Scores(start_scores(options.start, context), layerwise=True)
    )


def build_lwm(options: NoOptions, context: PrunerContext) -> Pruner:
    """The magnitudes |w| (Han et al., NeurIPS 2015)."""
    return lambda context: Scores({n: w.detach().abs() for n, w in context.weights.items()})


def build_snip(options: NoOptions, context: PrunerContext) -> Pruner:
    """|dL/dw * w| on one batch (Lee et al., ICLR 2019, equation 4).

    The scores can be compared across layers, so a global budget uses them unscaled.
    """
    return lambda context: Scores(measure_sensitivity(context))


def build_random(options: NoOptions, context: PrunerContext) -> Pruner:
    """Random scores, uniform on [0, 1), drawn on the CPU from the context's generator."""

    def score(context: PrunerContext) -> Scores:
        return Scores(
            {
                name: torch.rand(weight.shape, generator=context.generator).to(weight.device)
                for name, weight in context.weights.items()
            }
        )

    return score
