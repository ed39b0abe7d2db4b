"""The log of a run for programs: `metrics.jsonl`, with one strict JSON object per line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prunekit import NoOptions
from prunekit.contexts import ReporterContext
from prunekit.report import (
    EpochDone,
    Event,
    Note,
    Progress,
    Reporter,
    RunDone,
    RunFailed,
    RunStarted,
    StageDone,
    StageStarted,
)

NAMES: Mapping[type, str] = {
    RunStarted: "run_started",
    StageStarted: "stage_started",
    EpochDone: "epoch",
    StageDone: "stage_done",
    Note: "note",
    RunDone: "run_done",
    RunFailed: "run_failed",
}


def build(options: NoOptions, context: ReporterContext) -> Reporter:
    """Build the reporter `jsonl`."""
    return Log(context.folder / "metrics.jsonl")


class Log:
    """Writes `metrics.jsonl` into the run's folder, from scratch whenever the run starts.

    A line has the event's fields and its metrics. When a run is resumed, the core reports its
    stored epochs again, so the file is always complete and in order.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.run: RunStarted | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.run = event
            self.file.unlink(missing_ok=True)  # it may be a link to a file elsewhere
        if self.run is None or isinstance(event, Progress):
            return
        # Opened for each line, so that nothing waits in a buffer when the process dies.
        with open(self.file, "a", encoding="utf-8", opener=_open) as file:
            file.write(json.dumps(describe(event, self.run), allow_nan=False) + "\n")
        if isinstance(event, RunDone | RunFailed):
            self.run = None


def _open(path: str, flags: int) -> int:
    """As Python opens a file, but never what a link points to."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def describe(event: Event, run: RunStarted) -> dict[str, Any]:
    """The content of an event's line, in JSON types."""
    told = {field.name: getattr(event, field.name) for field in fields(event)}
    metrics = told.pop("metrics", {})
    told.pop("folder", None)
    head = {"event": NAMES[type(event)], "run": run.run, **told}
    if run.smoke:
        head["smoke"] = True
    head["time"] = datetime.now(UTC).isoformat(timespec="milliseconds")
    # Fields come first, and take precedence over metrics of the same name.
    line: dict[str, Any] = make_strict({**head, **metrics, **head})
    return line


def make_strict(value: Any) -> Any:
    """The value in JSON types; NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): make_strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [make_strict(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    # numpy and torch scalars convert themselves with `item`.
    return make_strict(value.item()) if getattr(value, "shape", None) == () else str(value)
