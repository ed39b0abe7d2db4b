"""Events: what a run tells its reporters while it runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from prunekit.errors import Interrupted

STOPPING = "stopping after this batch; again to stop now"


@dataclass
class Stop:
    """Asks a running loop to stop at the next safe point; a second signal stops it at once.

    The first one is answered on stderr, whatever reporters there are.
    """

    requested: bool = False

    def check(self) -> None:
        """Raise `Interrupted` if a stop was requested."""
        if self.requested:
            raise Interrupted

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Inside this context, SIGINT and SIGTERM request a stop."""

        def request(number: int, frame: Any) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            _answer(STOPPING)

        try:
            old = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # only the main thread gets signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def _answer(text: str) -> None:
    """Write a line from a signal handler, above a live display if there is one."""
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    # The signal may have come in the middle of a write to the same stream.
    except (RuntimeError, OSError, ValueError):
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())


class Reporter(Protocol):
    """`reporter(event)`: called with every event; must not change results. It may be `Closing`."""

    def __call__(self, event: Event) -> None: ...


@runtime_checkable
class Closing(Protocol):
    """A reporter with something to end, such as a live display."""

    def close(self) -> None:
        """Called once after the last event, or after the reporter raised."""
        ...


@dataclass(frozen=True)
class RunStarted:
    """A run begins. `settings` are the values that the sweep gives to this run."""

    run: str
    folder: Path
    stages: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    number: int = 1
    runs: int = 1
    smoke: bool = False


@dataclass(frozen=True)
class StageStarted:
    """A stage begins, or resumes at the `epoch` and `batch` that an earlier process reached.

    `stored`: nothing is computed, what follows was stored by an earlier process. `seconds`: what
    earlier processes spent on it.
    """

    stage: str
    kind: str
    key: str
    epochs: int = 0
    batches: int = 0
    epoch: int = 0
    batch: int = 0
    stored: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Progress:
    """Within a stage: `done` of `total` batches, `metrics` so far. `epoch` counts from 0."""

    stage: str
    done: int
    total: int
    epoch: int = 0
    epochs: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True)
class EpochDone:
    """An epoch is over; `epoch` counts from 1. `stored`: an earlier process computed it.

    `decides` is the one of its metrics that chooses the best epoch, "" if none does. The note of a
    metric says of what it is. `seconds` are those of the whole epoch, over all processes.
    """

    stage: str
    epoch: int
    epochs: int
    metrics: Mapping[str, float]
    best: bool = False
    seconds: float = 0.0
    stored: bool = False
    decides: str = ""


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
    """Something worth knowing; `warning` if it may make a result wrong."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class RunDone:
    """A run is over and its folder is complete."""

    run: str
    folder: Path
    metrics: Mapping[str, Any]
    seconds: float = 0.0


@dataclass(frozen=True)
class RunFailed:
    """A run stopped with an error; the other runs of a sweep continue."""

    run: str
    folder: Path
    error: str


@dataclass(frozen=True)
class FromRun:
    """What one of several runs that go side by side reports; `run` is its label."""

    run: str
    event: Event


Event = (
    RunStarted
    | StageStarted
    | Progress
    | EpochDone
    | StageDone
    | Note
    | RunDone
    | RunFailed
    | FromRun
)
Report = Callable[[Event], None]


def rehearsing(report: Report) -> Report:
    """Of what a rehearsal reports, tells `report` only where it is: as progress of "rehearsal"."""

    def tell(event: Event) -> None:
        if isinstance(event, StageStarted):
            report(Progress("rehearsal", 0, 1, label=event.stage))
        elif isinstance(event, Progress):
            label = f"{event.stage}  {event.label}".strip()
            report(Progress("rehearsal", event.done, event.total, label=label))

    return tell


Tell = Callable[[str], None]
"""Shows the user a line that is neither an event of a run nor a result."""
