"""The evaluate stage, and checks of evaluators against each other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.catalog.component import Use
from prunekit.contexts import EvaluatorContext
from prunekit.contracts import Evaluator, Metric, Result
from prunekit.data import seeds
from prunekit.data.batches import eval_batches, spread
from prunekit.engine.watched import recall
from prunekit.engine.work import Loaded, Outcome, Work, describe_masks
from prunekit.errors import RunError
from prunekit.evaluation import (
    Standing,
    balanced_proportion,
    eval_mode,
    frozen,
    is_unbalanced,
    running,
)
from prunekit.judging import Examination, Watch, examine, watching
from prunekit.pruning.masks import State, describe_counts, find_broken
from prunekit.recipe.plan import Run
from prunekit.recipe.stages import Stage
from prunekit.report import Progress, StageStarted
from prunekit.store.files import read_kept, write_npz
from prunekit.store.stages import StageFolder


def evaluate(state: State, stage: Stage, work: Work) -> Outcome:
    """Judge the network on the test images, one evaluator after the other."""
    work.report(StageStarted(stage.name, stage.kind, work.key))
    found = {}
    for use in stage.options.with_:
        own = replace(work, folder=StageFolder(work.folder.path / use.name))
        found[use.name] = judge(state, stage, use, own)
    return assemble(stage, work.run, work.loaded, found)


def judge(state: State, stage: Stage, use: Use[Evaluator], work: Work) -> Outcome:
    """What one evaluator finds; metrics and records have its own names.

    Its random numbers depend on the run's seed, the component and the batch alone.
    """
    if broken := find_broken(state.model):
        raise RunError(f"the network holds {broken}: there is nothing to judge")
    index = _choose_images(stage, work.run, work.loaded)
    owner = f"evaluator {use.component.name!r} of plugin {use.plugin}"
    standing = Standing(state.model)
    examination, watch = _look(state.model, use, index, work), Watch()
    seed = (work.run.seed, "evaluate", use.component.name)
    seeds.seed_all(*seed)
    context = EvaluatorContext(
        **vars(work.context(stage, state)),
        scratch=work.folder.scratch(),
        pause=work.stop.check,
        examination=examination,
        watch=watch,
    )
    evaluator = use.build(context)
    try:
        with (
            frozen(state.model) as model,
            watching(model, watch),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            recall(watch, work.folder)
            result = evaluator(model, _watched(work, stage, use.name, index, seed, watch))
    finally:
        moved = standing.restore()
    examination = replace(examination, moved=examination.moved or moved)
    for name, value in result.metrics.items():
        if not math.isfinite(value):
            raise RunError(f"{owner} gave {name} = {value}")
    if NETWORK in result.metrics:
        raise RunError(f"{owner}: a metric cannot be called {NETWORK!r}")
    for name, values in result.records.items():
        if len(values) != len(index):
            raise RunError(f"{owner} gave {len(values)} records {name!r} for {len(index)} images")
    doubts = _describe(examination, len(index)) | _count_unreal(watch, use, result, len(index))
    notes = [text for text, _ in doubts.values()] + [str(w.message) for w in caught]
    network = {**describe_masks(state), "counts": describe_counts(state)}
    for value in result.metrics.values():
        if isinstance(value, Metric) and value.doubtful:
            notes.append(f"{int(value)} of {value.n} images {value.note}; not to be ranked")
    metrics = {k: v if isinstance(v, Metric) else Metric(v) for k, v in result.metrics.items()}
    # A metric of the same name is of an evaluator that takes the doubt into account.
    metrics = {**{name: metric for name, (_, metric) in doubts.items()}, **metrics}
    return Outcome(
        {**metrics, NETWORK: network}, records=result.records, notes=tuple(dict.fromkeys(notes))
    )


Doubts = dict[str, tuple[str, Metric]]
"""Name -> what is said of a result, and the metric that says it in tables."""


def _look(model: nn.Module, use: Use[Evaluator], index: Tensor, work: Work) -> Examination:
    """How the network answers a few of the images.

    Raises `RunError` if there is nothing to judge: no numbers at all, or no function to prove of.
    """
    test, size = work.loaded.data.test, work.run.data.batch_size
    x, _ = next(iter(eval_batches(test, size, work.device, index[:: -(-len(index) // size)])))
    with running(model, {}, still=True):
        found = examine(model, x)
    if not found.finite:
        with eval_mode(model), torch.no_grad():
            batches = eval_batches(test, size, work.device, index)
            if not any(model(x).isfinite().all(1).any() for x, _ in batches):
                raise RunError(NOTHING.format(images=f"each of the {len(index)} images"))
    if use.component.guarantees or use.component.judges == "proof":
        found.demand("a guarantee")
    return found


def _describe(found: Examination, n: int) -> Doubts:
    """What keeps the network from being a function of single images, of n of them."""
    return {
        name: (text, Metric(n, n=n, kind="diagnosis", note=f"are in doubt: {text}"))
        for name, text in found.doubts.items()
    }


MASKED = " (to leave classes out, write -1e4 as their logits, not -inf)"
NOTHING = f"the network gives NaN or infinity for {{images}}: there is nothing to judge{MASKED}"


def _count_unreal(watch: Watch, use: Use[Evaluator], result: Result, n: int) -> Doubts:
    """What is to say of images for which the network gave NaN or infinity, attacked or not.

    Raises `RunError` if it gave nothing else.
    """
    if watch.outputs and not watch.real:
        raise RunError(NOTHING.format(images=f"everything that {use.name} showed it"))
    if not (unreal := sorted(watch.unreal)):
        return {}
    text = f"the network gives NaN or infinity for {len(unreal)} of {n} images, or near them; "
    text += "such outputs count as wrong"
    wrongly = np.asarray(result.records.get("correct", np.zeros(n)))[sorted(watch.nowhere)]
    if wrongly.any():
        text += f", but {use.name} counts {np.count_nonzero(wrongly)} of these images as correct"
    text += MASKED
    note = "got NaN or infinity from it, which counts as wrong"
    return {"not_finite": (text, Metric(len(unreal), n=n, kind="diagnosis", note=note))}


NETWORK = "network"
"""The key of facts about the network among what an evaluator found."""


def assemble(stage: Stage, run: Run, loaded: Loaded, found: Mapping[str, Outcome]) -> Outcome:
    """The outcome of an evaluate stage from those of its evaluators, by their names."""
    index = _choose_images(stage, run, loaded)
    labels = loaded.data.test.labels[index].cpu().numpy()
    unbalanced = is_unbalanced(loaded.data.test.labels.cpu().numpy())
    metrics: dict[str, Any] = {}
    records: dict[str, np.ndarray] = {"index": index.numpy(), "label": labels}
    told: dict[str, list[str]] = {}
    for use in stage.options.with_:
        own = found[use.name]
        metrics |= {f"{use.name}.{k}": v for k, v in own.metrics.items() if k != NETWORK}
        if use.threat is not None and use.component.judges:
            metrics[f"{use.name}.eps"] = Metric(use.threat.eps, unit="pixels", kind="setting")
        records |= {f"{use.name}.{name}": values for name, values in own.records.items()}
        if unbalanced and "accuracy" in own.metrics and "correct" in own.records:
            correct = np.asarray(own.records["correct"])
            metrics[f"{use.name}.balanced_accuracy"] = balanced_proportion(correct, labels)
        for text in own.notes:
            told.setdefault(text.removeprefix(f"{use.name}: "), []).append(use.name)
    notes = [f"{', '.join(names)}: {text}" for text, names in told.items()]
    if (stage.options.images or 0) > (most := len(loaded.data.test.labels)):
        notes.append(f"images = {stage.options.images}, but there are {most}: all are judged")
    notes += cross_examine(stage.options.with_, records)
    network = dict(next(iter(found.values())).metrics[NETWORK])
    # What was stored is a plain number again.
    network["sparsity"] = Metric(network["sparsity"], unit="sparsity")
    return Outcome({**metrics, **network}, records=records, notes=tuple(notes))


def join_places(places: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where evaluators computed, as the last did, with the layers of all."""
    whole = dict(places[-1])
    for place in places:
        for name, layers in place.items():
            if name == "sparse_layers":
                whole[name] = sorted({*whole[name], *layers})
            elif name == "dense_layers":
                whole[name] = {**whole[name], **layers}
    return whole


def judge_batches(
    judge: Callable[[Tensor, Tensor], Mapping[str, np.ndarray]],
    batches: Iterable[tuple[Tensor, Tensor]],
    scratch: Path | None,
) -> dict[str, np.ndarray]:
    """Records (N, ...) by name from those of each batch, `judge(x, y)`.

    With a folder `scratch`, finished batches are kept there, and an evaluation that was stopped or
    killed goes on after the last one, to the same records.
    """
    found: list[Mapping[str, np.ndarray]] = []
    for number, (x, y) in enumerate(batches):
        file = scratch / f"batch-{number}.npz" if scratch else None
        part = read_kept(file, partial(_check_part, n=len(y))) if file is not None else None
        if part is None:
            part = judge(x, y)
            if file is not None:
                write_npz(file, part)
        found.append(part)
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _check_part(part: Mapping[str, np.ndarray], n: int) -> Mapping[str, np.ndarray]:
    if not part or any(len(values) != n for values in part.values()):
        raise ValueError(f"it is not of {n} images")
    return part


def _choose_images(stage: Stage, run: Run, loaded: Loaded) -> Tensor:
    """Indices of the test images that a stage judges."""
    index = spread(len(loaded.data.test.labels), stage.options.images)
    return index if stage.limit is None else index[: stage.limit * run.data.batch_size]


def _watched(
    work: Work, stage: Stage, name: str, index: Tensor, seed: tuple[int | str, ...], watch: Watch
) -> Iterator[tuple[Tensor, Tensor]]:
    size = work.run.data.batch_size
    total = -(-len(index) // size)
    batches = eval_batches(work.loaded.data.test, size, work.device, index)
    for done, batch in enumerate(batches):
        work.stop.check()
        work.report(Progress(stage.name, done, total, label=name))
        seeds.seed_all(*seed, done)
        watch.begin(batch[0], done * size)
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

    def read(use: Use[Evaluator], record: str) -> np.ndarray:
        return np.asarray(records[f"{use.name}.{record}"], dtype=bool)

    for one, other in permutations(uses, 2):
        if one.threat is None or one.threat != other.threat:
            continue
        if other.component.name in one.component.beats:
            strong, weak = (float(read(use, "correct").mean()) for use in (one, other))
            if strong - weak > TOLERATED + 1e-9:
                yield (
                    f"{one.name} leaves {strong:.1%} of the images correct, {other.name} at the "
                    f"same radius only {weak:.1%}: trust the lower one, and give {one.name} more "
                    "steps or restarts"
                )
        if (one.component.judges, other.component.judges) == ("proof", "attack"):
            broken = read(one, "verified") & ~read(other, "correct")
            if broken.any():
                first = ", ".join(str(i) for i in np.asarray(records["index"])[broken][:5])
                yield (
                    f"UNSOUND: {other.name} breaks {int(broken.sum())} images that {one.name} "
                    f"certified at the same radius (test images {first}): trust neither, and "
                    "report this"
                )
