"""Reporters: progress for people, a log for programs."""

from __future__ import annotations

from collections.abc import Iterable

from prunekit import Component, hookimpl


@hookimpl
def prunekit_reporters() -> Iterable[Component]:
    yield Component(
        name="console",
        summary="Live progress on a terminal, one plain line an epoch elsewhere (stderr)",
        build="prunekit_reporters.console:build",
    )
    yield Component(
        name="jsonl",
        summary="Every epoch, stage and note as a line of JSON in the run's metrics.jsonl",
        build="prunekit_reporters.jsonl:build",
    )
