"""The evaluator that judges validation images while a stage trains."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from prunekit.contexts import EvaluatorContext, NetworkContext
from prunekit.contracts import Evaluator
from prunekit.errors import RunError
from prunekit.judging import Examination, Watch
from prunekit.recipe.stages import Stage, name_verdict
from prunekit.training.validation import Judge


def make_judge(stage: Stage, context: NetworkContext) -> Judge | None:
    """What gives the verdicts of the stage's `validate` on each image; None without one.

    It is built anew for every epoch, and keeps nothing: a stopped epoch is validated again.
    """
    use = stage.options.validate
    if use is None:
        return None
    name, verdict = name_verdict(use), use.component.verdict

    def judge(
        model: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        watch: Watch,
        examination: Examination,
    ) -> Mapping[str, np.ndarray]:
        if use.component.judges == "proof":
            examination.demand("a proof")
        with tempfile.TemporaryDirectory(prefix="prunekit-") as scratch:
            own = EvaluatorContext(
                **vars(context),
                scratch=Path(scratch),
                pause=lambda: None,
                examination=examination,
                watch=watch,
            )
            evaluator: Evaluator = use.build(own)
            result = evaluator(model, batches)
        if verdict not in result.records:
            raise RunError(f"evaluator {use.name!r} says of no image whether it withstands it")
        return {name: result.records[verdict]}

    return judge
