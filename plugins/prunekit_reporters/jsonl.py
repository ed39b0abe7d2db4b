"""The log of a run for programs: `metrics.jsonl`, one strict JSON object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prunekit import NoOptions
from prunekit.contracts import Context
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


def build(options: NoOptions, context: Context) -> Reporter:
    return Log()


class Log:
    """Writes each run's `metrics.jsonl` into the run's folder, afresh when the run starts.

    A line has the event's fields and, beside them, its metrics. The core retells stored epochs
    when a run goes on, so the file is always complete and in order.
    """

    def __init__(self) -> None:
        self.run: RunStarted | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.run = event
            get_path(event).write_text("", encoding="utf-8")
        if self.run is None or isinstance(event, Progress):
            return
        # Opened for each line, so that nothing waits in a buffer when the process dies.
        with get_path(self.run).open("a", encoding="utf-8") as file:
            file.write(json.dumps(describe(event, self.run), allow_nan=False) + "\n")
        if isinstance(event, RunDone | RunFailed):
            self.run = None


def get_path(run: RunStarted) -> Path:
    return run.folder / "metrics.jsonl"


def describe(event: Event, run: RunStarted) -> dict[str, Any]:
    """What a line says, in types that JSON has."""
    told = {field.name: getattr(event, field.name) for field in fields(event)}
    metrics = told.pop("metrics", {})
    told.pop("folder", None)
    head = {"event": NAMES[type(event)], "run": run.run, **told}
    if run.smoke:
        head["smoke"] = True
    head["time"] = datetime.now(UTC).isoformat(timespec="milliseconds")
    # Fields come first, and win over a metric of the same name.
    line: dict[str, Any] = make_strict({**head, **metrics, **head})
    return line


def make_strict(value: Any) -> Any:
    """The value in types that JSON has; numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): make_strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [make_strict(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    # Scalars of numpy and torch know their Python value.
    return make_strict(value.item()) if getattr(value, "shape", None) == () else str(value)
