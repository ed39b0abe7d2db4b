"""Small examples of what components work with: networks, images, contexts, events."""

from __future__ import annotations

import atexit
import copy
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunekit import report as told
from prunekit.contexts import Context
from prunekit.contracts import Clock, Loss, Scores
from prunekit.evaluation import eval_mode
from prunekit.judging import Examination, Watch
from prunekit.pruning.masks import apply_masks
from prunekit.pruning.selection import Selection, select_masks
from prunekit.steps import Masking
from prunekit.training.masking import LearnedScores

SHAPE, CLASSES, BATCH = (1, 8, 8), 3, 4
SPARSITY = 0.47
"""Of 36 and 48 weights, rounded together, it leaves 45; rounded layer by layer, 46."""

AnyContext = TypeVar("AnyContext", bound=Context)


def tiny_network(shape: tuple[int, int, int] = SHAPE, classes: int = CLASSES) -> nn.Module:
    """A network with a convolution, batch normalization and a linear layer, seeded."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(shape[0], 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, classes),
    )


def tiny_batches(batches: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Random images and labels, seeded."""
    g = torch.Generator().manual_seed(0)
    return [
        (torch.rand(BATCH, *SHAPE, generator=g), torch.randint(CLASSES, (BATCH,), generator=g))
        for _ in range(batches)
    ]


def train_once(masking: Masking) -> Scores:
    """The scores of a masking after one forward and backward pass; it is detached.

    Raises `AssertionError` if something it trains gets no gradient, its state comes late, or what
    it leaves is not what was judged.
    """
    model, clock = masking.model, Clock(0, 10, 0, 2)
    masking.check()
    entries = model.state_dict().keys()
    (x, y), _ = tiny_batches()
    with masking.effective(clock):
        nn.functional.cross_entropy(model(x), y).backward()
    trained = [p for group in masking.parameters() for p in group.parameters]
    assert all(p.grad is not None for p in trained), "something that it trains gets no gradient"
    masking.after_backward()
    masking.after_step()
    with masking.judged(clock), eval_mode(model), torch.no_grad():
        judged = model(x)
    late = sorted(entries ^ model.state_dict().keys())
    assert not late, f"{', '.join(late)} came or went while it trained; make them in __init__"
    scores = masking.scores()
    masking.detach()
    left = copy.deepcopy(model)
    apply_masks(left, select_masks(scores, Selection(SPARSITY)))
    with eval_mode(left), torch.no_grad():
        same = torch.allclose(left(x), judged, atol=1e-5)
    assert same, "the network that it leaves, under the masks of its scores, is not the judged one"
    return scores


def example_context(kind: type[AnyContext], **chosen: Any) -> AnyContext:
    """A context of one kind, such as `ObjectiveContext`: what is not chosen has an example value.

    >>> from prunekit.contexts import ArchitectureContext
    >>> example_context(ArchitectureContext, classes=7).classes
    7
    """
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.name not in chosen
    ]
    with torch.random.fork_rng(devices=[]):  # without a trace in the global generator
        values = _example_values(chosen.get("model") or tiny_network())
    return kind(**chosen, **{name: values[name]() for name in missing})


def _example_values(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """Name of a field of a context -> an example value for it, around a network."""

    def cross_entropy(x: Tensor, y: Tensor, clock: Clock) -> Loss:
        logits = model(x)
        return Loss(nn.functional.cross_entropy(logits, y), logits)

    def attach(start: Scores, kind: Callable[..., Any] = LearnedScores, **more: Any) -> Any:
        return kind(model, start, Selection(SPARSITY), {}, **more)

    def scratch() -> Path:
        folder = tempfile.mkdtemp(prefix="prunekit-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    return {
        "seed": lambda: 0,
        "examination": lambda: Examination(random=False, mixed=False, moved=(), finite=True),
        "watch": Watch,
        "folder": Path.cwd,
        "shape": lambda: SHAPE,
        "classes": lambda: CLASSES,
        "fresh": lambda: True,
        "model": lambda: model,
        "everything": lambda: True,
        "device": lambda: torch.device("cpu"),
        "stage": lambda: "pretrain",
        "sparsity": lambda: SPARSITY,
        "network": lambda: lambda file: tiny_network().eval().requires_grad_(False),
        "weights": lambda: {
            name: p.detach().clone() for name, p in model.named_parameters() if p.dim() > 1
        },
        "masks": dict,
        "generator": lambda: torch.Generator().manual_seed(0),
        "objective": lambda: cross_entropy,
        "batches": lambda: lambda: iter(tiny_batches()),
        "attach": lambda: attach,
        "train": lambda: train_once,
        "scratch": scratch,
        "pause": lambda: lambda: None,
        "live": lambda: False,
    }


def example_events(folder: Path) -> Iterator[Any]:
    """One of every event, in an order that can happen."""
    yield told.RunStarted("run", folder, ("pretrain", "evaluate"), {"seed": 0}, 1, 2, True)
    yield told.Note("a note", warning=True)
    yield told.StageStarted("pretrain", "pretrain", "0" * 32, 2, 3)
    yield told.Progress("pretrain", 1, 3, 0, 2, {"loss": 1.0}, "training")
    yield told.EpochDone("pretrain", 1, 2, {"loss": float("nan")}, True, 0.1, True)
    yield told.EpochDone("pretrain", 2, 2, {"loss": 0.5}, False, 0.1)
    yield told.StageDone("pretrain", "pretrain", "0" * 32, {"accuracy": 0.5}, 0.2)
    yield told.StageDone("evaluate", "evaluate", "1" * 32, {"clean.accuracy": 0.5}, 0.2, True)
    yield told.RunDone("run", folder, {"evaluate": {"clean.accuracy": 0.5}}, 1.0)
    yield told.RunStarted("other", folder, ("pretrain",), {"seed": 1}, 2, 2)
    yield told.RunFailed("other", folder, "the loss is not finite")
