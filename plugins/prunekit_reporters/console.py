"""Progress for users, on stderr: animated on a terminal, otherwise one line per epoch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prunekit import NoOptions, format_metric, format_setting, is_fraction, is_main
from prunekit.contexts import ReporterContext
from prunekit.errors import printable, relative
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

INTERVAL = 0.2
"""Seconds between two updates of the display; each takes milliseconds away from training."""


def build(options: NoOptions, context: ReporterContext) -> Reporter:
    """Build the reporter `console`; plain lines with NO_COLOR or without cursor control."""
    live = context.live and not os.environ.get("NO_COLOR")
    # `live` alone decides whether control characters are written, whatever FORCE_COLOR says.
    console = Console(stderr=True, force_terminal=live, markup=False, highlight=False, emoji=False)
    return Screen(console, live=live and not console.is_dumb_terminal)


@dataclass(frozen=True)
class Part:
    """What the progress bar shows: a stage that counts epochs, or the batches of one evaluator."""

    stage: StageStarted
    began: float
    """When counting began (seconds, monotonic clock); the fraction `first` was done by then."""
    now: Progress | None = None
    first: float = 0.0
    fraction: float = 0.0

    def advance(self, event: Progress, clock: float) -> Part:
        """The part after an event; without epochs, a new label starts a new part."""
        done = event.done / max(event.total, 1)
        if event.epochs:
            # Validation counts from zero again, but the bar must not move back.
            fraction = max(self.fraction, (event.epoch + done) / event.epochs)
            return replace(self, now=event, fraction=fraction)
        if self.now and self.now.label != event.label:
            return replace(self, began=clock, now=event, first=done, fraction=done)
        return replace(self, now=event, fraction=done)

    def estimate(self, clock: float) -> float | None:
        """Seconds left, extrapolated from what this process did; None if it did nothing yet."""
        did = self.fraction - self.first
        return (clock - self.began) * (1 - self.fraction) / did if did > 0 else None


class Screen:
    """Prints a line for everything finished; on a live terminal, shows current progress below."""

    def __init__(self, console: Console, *, live: bool) -> None:
        self.console = console
        self.live = live
        self.run: RunStarted | None = None
        self.part: Part | None = None
        self.display: Live | None = None
        self.drawn = 0.0

    def __call__(self, event: Event) -> None:
        clock = monotonic()
        match event:
            case Progress():
                if self.live and self.part:
                    self.part = self.part.advance(event, clock)
                    if clock - self.drawn >= INTERVAL:
                        self._draw(clock)
                return
            case RunStarted():
                self.run, self.part = event, None
            case StageStarted(stored=False):
                total = max(event.epochs, 1)
                first = (event.epoch + event.batch / max(event.batches, 1)) / total
                self.part = Part(event, clock, first=first, fraction=first)
            case StageDone():
                self.part = None
            case RunDone() | RunFailed():
                self.close()
        line = self._describe(event)
        if line:
            line.plain = printable(line.plain)
        if line and self.live and isinstance(event, EpochDone):
            self.console.print(line, no_wrap=True, overflow="ellipsis")
        elif line:
            self.console.print(line, soft_wrap=not self.live)
        if isinstance(event, RunDone | RunFailed):
            self.run = None
        elif self.live:
            self._draw(clock)

    def close(self) -> None:
        """Remove the live display and restore the terminal's cursor; may be called twice."""
        if self.display:
            self.display.stop()
        self.display = self.part = None

    def _draw(self, clock: float) -> None:
        """Update the live display at the time `clock` (seconds, monotonic)."""
        if self.run is None:
            return
        if self.display is None:
            # Output to the same terminal is printed above the display; output redirected to a file
            # or pipe is left alone.
            same = sys.stdout.isatty()
            self.display = Live(
                console=self.console, auto_refresh=False, transient=True, redirect_stdout=same
            )
            self.display.start()
        self.display.update(make_display(self.run, self.part, clock), refresh=True)
        self.drawn = clock

    def _describe(self, event: Event) -> Text | None:
        """The line to print for an event, if it gets one."""
        match event:
            case RunStarted():
                return name_run(event).append(f": {' > '.join(event.stages)}")
            case StageStarted() if event.epoch or event.batch:
                where = []
                if event.epoch < event.epochs:
                    where.append(f"epoch {event.epoch + 1}/{event.epochs}")
                if event.batch:
                    where.append(f"batch {event.batch + 1}/{event.batches}")
                return Text(f"{event.stage}  resumes at {', '.join(where) or 'its end'}")
            case EpochDone(stored=False):
                number = f"epoch {event.epoch:>{len(str(event.epochs))}}/{event.epochs}"
                best = "best" if event.best else "    "
                numbers = [format_time(event.seconds), *format_metrics(event.metrics)]
                return Text("  ".join([event.stage, number, best, *numbers]))
            case StageDone():
                how = "stored already" if event.reused else f"done in {format_time(event.seconds)}"
                # The losses of a training stage are in the lines of its epochs.
                metrics = {
                    name: value
                    for name, value in event.metrics.items()
                    if event.kind == "evaluate" or is_fraction(value)
                }
                return Text("  ".join([event.stage, how, *format_metrics(metrics)]), "bold")
            case Note():
                mark = ("warning: ", "bold yellow") if event.warning else ("note: ", "")
                return Text.assemble(mark, event.text)
            case RunDone() if self.run:
                took = f" done in {format_time(event.seconds)}: {relative(event.folder)}"
                return name_run(self.run).append(took)
            case RunFailed() if self.run:
                return name_run(self.run).append(f" FAILED: {event.error}", "bold red")
        return None


def name_run(run: RunStarted) -> Text:
    """The run's title: SMOKE for a smoke run, its number, and the settings that identify it."""
    settings = " ".join(f"{address}={format_setting(v)}" for address, v in run.settings.items())
    what = f"run {run.number}/{run.runs} {settings or run.run}"
    return Text.assemble(("SMOKE " if run.smoke else "", "bold yellow reverse"), (what, "bold"))


def make_display(run: RunStarted, part: Part | None, clock: float) -> Group:
    """Up to three lines: the run; its stage with progress bar and time left; current metrics."""
    lines: list[Text | Table] = [name_run(run)]
    if part:
        where, numbers = [part.stage.stage], []
        if part.stage.stage in run.stages:
            where.append(f"{run.stages.index(part.stage.stage) + 1}/{len(run.stages)}")
        if part.now:
            if part.now.epochs:
                where.append(f"epoch {part.now.epoch + 1}/{part.now.epochs}")
            if part.now.label:
                where.append(part.now.label)
            where.append(f"batch {part.now.done}/{part.now.total}")
            numbers = format_metrics(part.now.metrics)
        left = part.estimate(clock)
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(
            Text(printable("  ".join(where))),
            ProgressBar(total=1.0, completed=part.fraction),
            Text("" if left is None else f"{format_time(left)} left"),
        )
        lines += [row, Text("  ".join(numbers))]
    for line in lines:
        if isinstance(line, Text):
            line.plain = printable(line.plain)
            line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines)


def format_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """The main metrics as texts "name value", fractions (accuracies) before losses."""
    return [
        f"{name} {format_metric(value)}"
        for name, value in sorted(metrics.items(), key=lambda item: not is_fraction(item[1]))
        if isinstance(value, int | float) and is_main(value)
    ]


def format_time(seconds: float) -> str:
    """Time in its two largest units.

    >>> [format_time(seconds) for seconds in (3.21, 42.1, 75, 7260)]
    ['3.2s', '42s', '1m15s', '2h01m']
    """
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"
