"""The position of a training, what is told of it, and the checkpoint that restores it to the same
bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.contracts import Metric, Stateful
from prunekit.errors import UserError, relative
from prunekit.report import EpochDone, Note, Report
from prunekit.store.files import set_aside
from prunekit.store.tensors.checkpoint import read_checkpoint, write_checkpoint
from prunekit.training.step import Stepper


@dataclass
class Position:
    """Where a training is; with the tensors of `save`, all that a resume needs."""

    epoch: int = 0
    batch: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    best_value: float | None = None
    spare: int = 0
    """The epoch that is kept should the objective halt before one was the best; 0: none."""
    times: list[float] = field(default_factory=list)
    """Seconds of each epoch, over all processes; checkpoints of older versions have none."""
    spent: float = 0.0
    """Seconds of the epoch that is not over."""

    @property
    def ended(self) -> str:
        """Why it ended before its last epoch; "" if it did not."""
        return str(self.history[-1].get("ended", "")) if self.history else ""


def save(path: Path, stepper: Stepper, at: Position, best: Mapping[str, Tensor]) -> None:
    """Write the model, the best one so far, and what the steps still need: the states of the
    optimizer, its groups, the objective and the wrappers."""
    tensors = {f"model/{k}": v for k, v in stepper.masking.model.state_dict().items()}
    tensors |= {f"best/{k}": v for k, v in best.items()}
    state = stepper.optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {"state": {}, "groups": {}}
    parts = {"state": state["state"], "groups": dict(enumerate(state["param_groups"]))}
    for part, owners in parts.items():
        for index, values in owners.items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{part}/{index}/{name}"] = value
                elif value is not None and name != "params":
                    scalars[part].setdefault(str(index), {})[name] = value
    for owner, part in _find_stateful(stepper):
        tensors |= {f"{owner}/{k}": v for k, v in part.state_dict().items()}
    write_checkpoint(path, tensors, {"at": vars(at), "optimizer": scalars}, sealed=True)


def restore(
    path: Path, stepper: Stepper, device: torch.device, report: Report
) -> tuple[Position, dict[str, Tensor]]:
    """Load what `save` wrote; the position, and the best model's state.

    That is the start if there is nothing, or if it is damaged: then it is told, and moved aside.
    """
    if not path.exists():
        return Position(), {}
    try:
        tensors, header = read_checkpoint(path, sealed=True)
    except UserError as error:
        aside = relative(set_aside(path))
        told = f"{error}: the stage starts anew, and what was there is now in {aside}"
        report(Note(told, warning=True))
        return Position(), {}

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    stepper.masking.model.load_state_dict(part("model/"))
    optimizer = stepper.optimizer
    content = optimizer.state_dict()
    for name, owners in (("state", content["state"]), ("groups", content["param_groups"])):
        found: dict[int, dict[str, Any]] = {
            int(index): {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            for index, values in header["optimizer"][name].items()
        }
        for key, value in part(f"optimizer/{name}/").items():
            number, own = key.split("/", 1)
            found.setdefault(int(number), {})[own] = value
        for index, values in found.items():
            if name == "state":
                owners[index] = values
            else:
                owners[index] |= values
    optimizer.load_state_dict(content)
    for owner, stateful in _find_stateful(stepper):
        stateful.load_state_dict({n: v.to(device) for n, v in part(f"{owner}/").items()})
    return Position(**header["at"]), part("best/")


def _find_stateful(stepper: Stepper) -> Iterator[tuple[str, Any]]:
    """(name in the checkpoint, owner) of what has a state that a resume must restore."""
    owners: dict[str, Any] = {"objective": stepper.objective}
    owners |= {f"wrap-{number}": wrapper for number, wrapper in enumerate(stepper.wrappers)}
    for name, owner in owners.items():
        if isinstance(owner, Stateful):
            yield name, owner


def label_metrics(row: Mapping[str, Any], images: str = "") -> dict[str, float]:
    """The metrics of an epoch; accuracies, and all validation metrics, are fractions of images.

    The accuracy is noted to be one of these training `images`.
    """
    notes = {"accuracy": images}
    return {
        name: Metric(value, unit="fraction", note=notes.get(name, ""))
        if name == "accuracy" or name.startswith("validation.")
        else value
        for name, value in row.items()
        if name not in ("epoch", "best", "ended", "seconds")
    }


def tell_epoch(
    stage: str, epochs: int, row: Mapping[str, Any], select: str, images: str, *, stored: bool
) -> EpochDone:
    """The event of an epoch from its row; `stored`: an earlier process computed it."""
    found, decides = label_metrics(row, images), f"validation.{select}"
    return EpochDone(
        stage,
        row["epoch"],
        epochs,
        found,
        row["best"],
        row.get("seconds", 0.0),
        stored,
        decides if decides in found else "",
    )
