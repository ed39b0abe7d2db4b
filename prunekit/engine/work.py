"""What a stage works with, and what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from prunekit.contracts import Context, Data, Split
from prunekit.data.batches import Extra
from prunekit.pruning.masks import (
    State,
    count_weights,
    hash_masks,
    measure_sparsity,
)
from prunekit.recipe.plan import Run, Stage
from prunekit.report import Report, Stop
from prunekit.store.stages import StageFolder


@dataclass(frozen=True)
class Work:
    """What a stage works with: its run, the split data, and where it writes and reports."""

    run: Run
    data: Data
    train: Split
    extra: Extra | None
    validation: Split
    device: torch.device
    folder: StageFolder
    key: str
    report: Report
    stop: Stop

    def context(self, stage: Stage, state: State) -> Context:
        return Context(
            seed=self.run.seed,
            folder=self.run.folder,
            shape=self.data.shape,
            classes=self.data.classes,
            device=self.device,
            stage=stage.kind,
            sparsity=stage.sparsity,
            model=state.model,
        )

    @property
    def augment(self) -> tuple[str, ...]:
        chosen = self.run.data.augment
        return self.data.augment if chosen is None else chosen


@dataclass(frozen=True)
class Outcome:
    """What a stage found."""

    metrics: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    records: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """Warnings that belong to the result."""


def _sparsity(state: State) -> dict[str, Any]:
    counts = count_weights(state.model, state.masks)
    return {"sparsity": measure_sparsity(counts), "masks": hash_masks(state.masks)}
