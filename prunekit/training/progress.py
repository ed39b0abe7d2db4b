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
from prunekit.store.tensors.checkpoint import read_header
from prunekit.store.tensors.pieces import hash_piece, read_pieces, write_pieces
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


class Checkpoint:
    """The checkpoint of one training: the file `path`, and beside it that of the best epoch.

    Neither holds what the network freezes, which the stage begins with each time, and the best
    epoch is written once. Made before anything trains.
    """

    def __init__(self, path: Path, stepper: Stepper) -> None:
        self.path, self._stepper = path, stepper
        frozen = (p for p in stepper.masking.model.parameters() if not p.requires_grad)
        self._frozen = {hash_piece(p): p.detach() for p in frozen}
        self._best: Mapping[str, Tensor] = {}
        self._beside = ""
        self._pieces: set[str] = set()

    def save(self, at: Position, best: Mapping[str, Tensor]) -> None:
        """Write the model, the best one so far, and what the steps still need: the states of the
        optimizer, its groups, the objective and the wrappers."""
        stepper = self._stepper
        tensors = {f"model/{k}": v for k, v in stepper.masking.model.state_dict().items()}
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
        for owner, stateful in _find_stateful(stepper):
            tensors |= {f"{owner}/{k}": v for k, v in stateful.state_dict().items()}
        if best and best is not self._best:
            # Under a name of its own: the old one counts until `path` names another.
            beside = self.path.with_stem(f"{self.path.stem}-{at.epoch}")
            self._pieces = write_pieces(beside, best, {}, self._frozen)
            self._best, self._beside = best, beside.name
        header = {"at": vars(at), "optimizer": scalars, "beside": self._beside}
        write_pieces(self.path, tensors, header, {*self._frozen, *self._pieces})
        for old in self._find_beside():
            if old.name != self._beside:
                old.unlink(missing_ok=True)

    def restore(self, device: torch.device, report: Report) -> tuple[Position, dict[str, Tensor]]:
        """Load what `save` wrote; the position, and the best model's state.

        That is the start if there is nothing, or if it is damaged: then it is told, and moved
        aside.
        """
        if not self.path.exists():
            return Position(), {}
        try:
            tensors, header, best = self._read()
        except UserError as error:
            aside = [relative(set_aside(file)) for file in (self.path, *self._find_beside())]
            told = f"{error}: the stage starts anew, and what was there is now in "
            report(Note(told + " and ".join(aside), warning=True))
            return Position(), {}

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        stepper = self._stepper
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
        self._best, self._beside = best, header["beside"]
        return Position(**header["at"]), best

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
        """(tensors, header, best model's state)."""
        name, best = read_header(self.path).get("beside"), {}
        if name:
            beside = {file.name: file for file in self._find_beside()}
            if name not in beside:
                raise UserError(f"{relative(self.path)} is damaged ({name} beside it is missing)")
            best = read_pieces(beside[name], self._frozen)[0]
        pieces = {hash_piece(value): value for value in best.values()}
        self._pieces = set(pieces)
        return (*read_pieces(self.path, {**self._frozen, **pieces}), best)

    def _find_beside(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}-*{self.path.suffix}"))


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
