"""What `run.json` says of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.errors import UserError, relative
from prunekit.store.layout import RUN, RUN_FORMAT


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run; `key` is the hash under which its result is stored."""

    name: str
    kind: str
    key: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` says of a run; `settings` maps addresses ("prune.sparsity") to values."""

    folder: Path
    name: str
    status: str
    smoke: bool
    seed: int
    settings: Mapping[str, Any]
    stages: tuple[StageRecord, ...]
    error: str = ""
    number: int = 0
    """Its place in the recipe's sweep."""
    keys: tuple[str, ...] = ()
    """Of all its stages, those to come too."""
    layers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Weight -> how many are "kept" of its "weights"."""


def find_runs(folder: Path) -> list[RunRecord]:
    """Read all runs in the folder and below, hidden folders apart; those of a sweep in its order.

    Raises `UserError` for a folder that is not there and for a `run.json` that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{relative(folder)}: there is no such folder")
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if RUN in files:
            found.append(Path(parent))
    runs = [read_run(path) for path in found]
    return sorted(runs, key=lambda run: (run.folder.parent, run.number, run.folder))


def read_run(folder: Path) -> RunRecord:
    """Read the `run.json` of a run's folder; `UserError` names a file that is not one."""
    path = folder / RUN
    where = relative(path)
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read ({error}); run the recipe again") from error
    if not isinstance(told, dict) or "format" not in told:
        raise UserError(f"{where}: not the record of a run; prunekit's have a 'format'")
    if told["format"] != RUN_FORMAT:
        raise UserError(
            f"{where}: has format {told['format']!r}, this prunekit reads {RUN_FORMAT}; use the "
            "version that wrote it"
        )
    try:
        return RunRecord(
            folder=folder,
            name=told["name"],
            status=told["status"],
            smoke=bool(told["smoke"]),
            seed=int(told["seed"]),
            settings=dict(told["settings"]),
            stages=tuple(
                StageRecord(s["name"], s["kind"], s["key"], dict(s.get("metrics") or {}))
                for s in told["stages"]
            ),
            error=told.get("error") or "",
            number=int(told.get("number", 0)),
            keys=tuple(told.get("keys", ())),
            layers=dict((told.get("sparsity") or {}).get("layers", {})),
        )
    except KeyError as error:
        raise UserError(f"{where}: lacks {error}; run the recipe again") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: is damaged ({error}); run the recipe again") from error
