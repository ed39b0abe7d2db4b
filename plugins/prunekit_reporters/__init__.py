"""Reporters: progress for users, and a log for programs."""

from __future__ import annotations

from collections.abc import Iterable

from prunekit import ReporterComponent, hookimpl


@hookimpl
def prunekit_reporters() -> Iterable[ReporterComponent]:
    """Declare the reporters."""
    yield ReporterComponent(
        name="console",
        summary="Live progress on a terminal, otherwise one plain line per epoch (stderr)",
        build="prunekit_reporters.console:build",
        gathers=True,
    )
    yield ReporterComponent(
        name="jsonl",
        summary="One line of JSON for every epoch, stage and note, in the run's metrics.jsonl",
        build="prunekit_reporters.jsonl:build",
    )
