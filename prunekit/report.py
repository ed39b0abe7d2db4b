"""Events: what a run tells its reporters while it goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prunekit.errors import Interrupted

if TYPE_CHECKING:
    pass


@dataclass
class Stop:
    """Asks a running loop to stop at the next safe moment; a second signal stops at once."""

    requested: bool = False

    def check(self) -> None:
        """Raise `Interrupted` where a stop was asked for."""
        if self.requested:
            raise Interrupted

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Inside, SIGINT and SIGTERM ask for a stop."""

        def request(number: int, frame: Any) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True

        try:
            old = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, which alone gets signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


class Reporter(Protocol):
    """`reporter(event)`: told of everything that happens; must not change results.

    It may also have `close()`, called once when nothing more comes, or after it raised.
    """

    def __call__(self, event: Event) -> None: ...


@dataclass(frozen=True)
class RunStarted:
    """A run begins. `settings` are the sweep's values that make it this run."""

    run: str
    folder: Path
    stages: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    number: int = 1
    runs: int = 1
    smoke: bool = False


@dataclass(frozen=True)
class StageStarted:
    """A stage begins, or goes on from `epoch` (and its `batch`) of an earlier process."""

    stage: str
    kind: str
    key: str
    epochs: int = 0
    batches: int = 0
    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Progress:
    """Within a stage: `done` of `total` batches. `epoch` counts from 0, `metrics` are so far."""

    stage: str
    done: int
    total: int
    epoch: int = 0
    epochs: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True)
class EpochDone:
    """An epoch is over; `epoch` counts from 1. `stored`: it was computed earlier and is retold."""

    stage: str
    epoch: int
    epochs: int
    metrics: Mapping[str, float]
    best: bool = False
    seconds: float = 0.0
    stored: bool = False


@dataclass(frozen=True)
class StageDone:
    """A stage is over. `reused`: its result was stored already."""

    stage: str
    kind: str
    key: str
    metrics: Mapping[str, Any]
    seconds: float = 0.0
    reused: bool = False


@dataclass(frozen=True)
class Note:
    """Something worth knowing; `warning` where it may spoil a result."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class RunDone:
    """A run is over and its folder complete."""

    run: str
    folder: Path
    metrics: Mapping[str, Any]
    seconds: float = 0.0


@dataclass(frozen=True)
class RunFailed:
    """A run stopped with an error; the other runs of a sweep go on."""

    run: str
    folder: Path
    error: str


Event = RunStarted | StageStarted | Progress | EpochDone | StageDone | Note | RunDone | RunFailed
Report = Callable[[Event], None]

Tell = Callable[[str], None]
"""Tells the user a line that is neither an event of a run nor a result."""
