"""The evaluate stage, and checks of evaluators against each other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.catalog.component import Use
from prunekit.contracts import Evaluator, EvaluatorContext
from prunekit.data import seeds
from prunekit.data.batches import eval_batches
from prunekit.engine.work import Outcome, Work, describe_masks
from prunekit.errors import RunError
from prunekit.evaluation import balanced_proportion, eval_mode, is_unbalanced
from prunekit.pruning.masks import (
    State,
    find_broken,
)
from prunekit.recipe.stages import Stage
from prunekit.report import Progress, StageStarted


def evaluate(state: State, stage: Stage, work: Work) -> Outcome:
    """Judge the network on the test images, one evaluator after the other."""
    options, size = stage.options, work.run.data.batch_size
    if broken := find_broken(state.model):
        raise RunError(f"{broken} of the network holds NaN or infinity: there is nothing to judge")
    index = _choose(len(work.loaded.data.test.labels), options.images)
    if stage.limit is not None:
        index = index[: stage.limit * size]
    labels = work.loaded.data.test.labels[index]
    unbalanced = is_unbalanced(work.loaded.data.test.labels.cpu().numpy())
    metrics: dict[str, Any] = {}
    records: dict[str, np.ndarray] = {"index": index.numpy(), "label": labels.cpu().numpy()}
    notes: list[str] = []
    work.report(StageStarted(stage.name, stage.kind, work.key))
    context = work.context(stage, state)
    state.model.requires_grad_(False)
    for use in options.with_:
        seeds.seed_all(work.run.seed, stage.position, "evaluate", use.name)
        scratch = work.folder.scratch(use.name)
        evaluator = use.build(
            EvaluatorContext(**vars(context), scratch=scratch, pause=work.stop.check)
        )
        with eval_mode(state.model), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = evaluator(state.model, _watched(work, stage, use.name, index))
        notes += [f"{use.name}: {text}" for text in dict.fromkeys(str(w.message) for w in caught)]
        for name, value in result.metrics.items():
            if not math.isfinite(value):
                raise RunError(
                    f"evaluator {use.component.name!r} of plugin {use.plugin} gave {name} = {value}"
                )
            metrics[f"{use.name}.{name}"] = value
        if use.threat is not None and use.component.judges:
            metrics[f"{use.name}.eps"] = use.threat.eps
        for name, values in result.records.items():
            if len(values) != len(labels):
                raise RunError(
                    f"evaluator {use.component.name!r} of plugin {use.plugin} gave "
                    f"{len(values)} records {name!r} for {len(labels)} images"
                )
            records[f"{use.name}.{name}"] = values
        if unbalanced and "accuracy" in result.metrics and "correct" in result.records:
            correct, name = np.asarray(result.records["correct"]), f"{use.name}.balanced_accuracy"
            metrics |= balanced_proportion(name, correct, records["label"])
    notes += cross_examine(options.with_, records)
    return Outcome({**metrics, **describe_masks(state)}, records=records, notes=tuple(notes))


def _choose(n: int, images: int | None) -> Tensor:
    """Indices of the test images to judge: all, or `images` of them, evenly spaced.

    The first ones would be of a few classes where a data set is sorted.
    """
    if images is None or images >= n:
        return torch.arange(n)
    return torch.arange(images) * n // images


def _watched(work: Work, stage: Stage, name: str, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = work.run.data.batch_size
    total = -(-len(index) // size)
    batches = eval_batches(work.loaded.data.test, size, work.device, index)
    for done, batch in enumerate(batches):
        work.stop.check()
        work.report(Progress(stage.name, done, total, label=name))
        yield batch
    work.report(Progress(stage.name, total, total, label=name))


TOLERATED = 0.002
"""The fraction of images by which an attack may be weaker than one it should beat."""


def cross_examine(
    uses: Sequence[Use[Evaluator]], records: Mapping[str, np.ndarray]
) -> Iterator[str]:
    """Warnings about verdicts under one threat model that contradict each other.

    `records` holds `NAME.correct` (N,) of each attack and `NAME.verified` (N,) of each proof, as
    `Component.judges` says. An attack that is declared to beat another should not leave more
    images correct than that (a sign of masked gradients, or of too small a budget), and an image
    with a proof cannot be broken by an attack within the same radius.
    """
    for one, other in permutations(uses, 2):
        if one.threat is None or one.threat != other.threat:
            continue
        if other.component.name in one.component.beats:
            yield from _compare_attacks(one.name, other.name, records)
        if (one.component.judges, other.component.judges) == ("proof", "attack"):
            yield from _refute(one.name, other.name, records)


def _compare_attacks(strong: str, weak: str, records: Mapping[str, np.ndarray]) -> Iterator[str]:
    standing = [float(_read(records, name, "correct").mean()) for name in (strong, weak)]
    if standing[0] - standing[1] > TOLERATED + 1e-9:
        yield (
            f"{strong} leaves {standing[0]:.1%} of the images correct, {weak} at the same radius "
            f"only {standing[1]:.1%}: trust the lower one, and give {strong} more "
            "steps or restarts"
        )


def _refute(proof: str, attack: str, records: Mapping[str, np.ndarray]) -> Iterator[str]:
    broken = _read(records, proof, "verified") & ~_read(records, attack, "correct")
    if broken.any():
        first = ", ".join(str(i) for i in np.asarray(records["index"])[broken][:5])
        yield (
            f"UNSOUND: {attack} breaks {int(broken.sum())} images that {proof} certified "
            f"at the same radius (test images {first}): trust neither, and report this"
        )


def _read(records: Mapping[str, np.ndarray], name: str, record: str) -> Any:
    return np.asarray(records[f"{name}.{record}"], dtype=bool)
