"""The position of a training, and the checkpoint that restores it to the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.contracts import Objective, Stateful
from prunekit.store.checkpoint import read_checkpoint, write_checkpoint


@dataclass
class Position:
    """Where a training is; with the tensors of `save`, all that a resume needs."""

    epoch: int = 0
    batch: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    best_value: float | None = None


def save(
    path: Path,
    model: torch.nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    at: Position,
    best: Mapping[str, Tensor],
) -> None:
    """Write the model, the best one so far, and the states of the optimizer and objective."""
    tensors = {f"model/{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"best/{k}": v for k, v in best.items()}
    scalars: dict[str, dict[str, Any]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            elif value is not None:
                scalars.setdefault(str(index), {})[name] = value
    if isinstance(objective, Stateful):
        tensors |= {f"objective/{k}": v for k, v in objective.state_dict().items()}
    write_checkpoint(path, tensors, {"at": vars(at), "optimizer": scalars})


def restore(
    path: Path,
    model: torch.nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> tuple[Position, dict[str, Tensor]]:
    """Load what `save` wrote into the three; the position, and the best model's state."""
    tensors, header = read_checkpoint(path)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    model.load_state_dict(part("model/"))
    state: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in header["optimizer"].items()
    }
    for key, value in part("optimizer/").items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    if isinstance(objective, Stateful):
        objective.load_state_dict({n: v.to(device) for n, v in part("objective/").items()})
    return Position(**header["at"]), part("best/")
