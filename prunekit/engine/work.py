"""What a stage works with, and what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from prunekit.contracts import Context
from prunekit.data.batches import Feed
from prunekit.engine.inputs import Loaded
from prunekit.pruning.masks import State, count_weights, hash_masks, measure_sparsity
from prunekit.recipe.plan import Run, Stage
from prunekit.report import Report, Stop
from prunekit.store.stages import StageFolder


@dataclass(frozen=True)
class Work:
    """What a stage works with: its run, the data, and where it writes and reports."""

    run: Run
    loaded: Loaded
    device: torch.device
    folder: StageFolder
    key: str
    report: Report
    stop: Stop

    def context(self, stage: Stage, state: State) -> Context:
        return Context(
            seed=self.run.seed,
            folder=self.run.folder,
            shape=self.loaded.data.shape,
            classes=self.loaded.data.classes,
            device=self.device,
            stage=stage.kind,
            sparsity=stage.sparsity,
            model=state.model,
        )

    def feed(self, stage: Stage) -> Feed:
        loaded, chosen = self.loaded, self.run.data
        augment = loaded.data.augment if chosen.augment is None else chosen.augment
        return Feed(
            loaded.data.train,
            loaded.validation,
            chosen.batch_size,
            self.device,
            augment,
            loaded.extra,
            stage.limit,
        )


@dataclass(frozen=True)
class Outcome:
    """What a stage found."""

    metrics: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    records: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """Warnings that belong to the result."""


def describe_masks(state: State) -> dict[str, Any]:
    counts = count_weights(state.model, state.masks)
    return {"sparsity": measure_sparsity(counts), "masks": hash_masks(state.masks)}
