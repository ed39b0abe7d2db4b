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

TICKS = 1
"""Updates in a second of a display that is told nothing."""


def build(options: NoOptions, context: ReporterContext) -> Reporter:
    """Build the reporter `console`; plain lines with NO_COLOR or without cursor control."""
    live = context.live and not os.environ.get("NO_COLOR")
    # `live` alone decides whether control characters are written, whatever FORCE_COLOR says.
    console = Console(stderr=True, force_terminal=live, markup=False, highlight=False, emoji=False)
    live = live and not console.is_dumb_terminal
    # A log in a file has lines of any length, unless somebody says how long they may be.
    return Screen(console, live=live, narrow=live or "COLUMNS" in os.environ)


@dataclass(frozen=True)
class Part:
    """What the progress bar shows: a stage that counts epochs, or the batches of one evaluator.

    Times are in seconds of the monotonic clock.
    """

    stage: StageStarted
    began: float
    """When counting began; the fraction `first` was done by then."""
    now: Progress | None = None
    first: float = 0.0
    fraction: float = 0.0
    told: float = 0.0
    """When it got to `fraction`."""

    def advance(self, event: Progress, clock: float) -> Part:
        """The part after an event; without epochs, a new label starts a new part."""
        done = event.done / max(event.total, 1)
        if event.epochs:
            # Validation counts from zero again, but the bar must not move back.
            fraction = max(self.fraction, (event.epoch + done) / event.epochs)
            return replace(self, now=event, fraction=fraction, told=clock)
        if self.now and self.now.label != event.label:
            return replace(self, began=clock, now=event, first=done, fraction=done, told=clock)
        return replace(self, now=event, fraction=done, told=clock)

    def estimate(self, clock: float) -> float | None:
        """Seconds left, extrapolated from what this process did.

        None if it did nothing yet, did everything, or takes longer than it seemed.
        """
        did = self.fraction - self.first
        if did <= 0:
            return None
        left = (self.told - self.began) * (1 - self.fraction) / did - (clock - self.told)
        return left if left > 0 else None


class Screen:
    """Prints a line for everything finished; on a live terminal, shows current progress below."""

    def __init__(self, console: Console, *, live: bool, narrow: bool = False) -> None:
        self.console = console
        self.live = live
        self.narrow = narrow
        """Whether the line of an epoch leaves out what does not fit."""
        self.run: RunStarted | None = None
        self.part: Part | None = None
        self.display: Live | None = None
        self.drawn = 0.0

    def __call__(self, event: Event) -> None:
        clock = monotonic()
        match event:
            case Progress():
                if self.live:
                    old, part = self.part, self._find_part(event, clock)
                    self.part = part.advance(event, clock)
                    where = old and old.now and (old.now.stage, old.now.label)
                    new = where != (event.stage, event.label)
                    if new or clock - self.drawn >= INTERVAL:
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

    def _find_part(self, event: Progress, clock: float) -> Part:
        """The part that an event belongs to; a rehearsal starts no stages."""
        return self.part or Part(StageStarted(event.stage, "", ""), clock)

    def _draw(self, clock: float) -> None:
        """Update the live display at the time `clock` (seconds, monotonic)."""
        if self.run is None and self.part is None:
            return
        if self.display is None:
            # Output to the same terminal is printed above the display; output redirected to a file
            # or pipe is left alone.
            same = sys.stdout.isatty()
            self.display = Live(
                console=self.console,
                refresh_per_second=TICKS,
                transient=True,
                redirect_stdout=same,
                get_renderable=lambda: make_display(self.run, self.part, monotonic()),
            )
            self.display.start()
        self.display.refresh()
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
                return Text(describe_epoch(event, self.console.width if self.narrow else None))
            case StageDone():
                how = "stored already" if event.reused else f"done in {format_time(event.seconds)}"
                # The losses of a training stage are in the lines of its epochs.
                metrics = {
                    name: value
                    for name, value in event.metrics.items()
                    if event.kind == "evaluate" or is_fraction(value)
                }
                first = f"validation.{event.metrics.get('select')}"
                return Text("  ".join([event.stage, how, *format_metrics(metrics, first)]), "bold")
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


def describe_epoch(event: EpochDone, width: int | None) -> str:
    """The line of an epoch, the number that decides first; what `width` has no room for is left
    out."""
    number = f"epoch {event.epoch:>{len(str(event.epochs))}}/{event.epochs}"
    line = "  ".join([event.stage, number, "best" if event.best else "    "])
    items = list_metrics(event.metrics, event.decides)
    seconds = format_time(event.seconds)
    # Behind what decides, and the accuracy in training.
    items.insert(min(len(items), 2 if event.decides else 1), (seconds, seconds))
    for text in items:
        known = (f"{line}  {way}" for way in text)
        line = next((longer for longer in known if width is None or len(longer) <= width), line)
    return line


def make_display(run: RunStarted | None, part: Part | None, clock: float) -> Group:
    """Up to three lines: the run, unless this is the rehearsal; its stage with progress bar and
    times; current metrics."""
    lines: list[Text | Table] = [name_run(run)] if run else []
    if part:
        where, numbers = [part.stage.stage], []
        if run and part.stage.stage in run.stages:
            where.append(f"{run.stages.index(part.stage.stage) + 1}/{len(run.stages)}")
        if part.now:
            if part.now.epochs:
                where.append(f"epoch {part.now.epoch + 1}/{part.now.epochs}")
            if part.now.label:
                where.append(part.now.label)
            # Evaluators are told of before a batch, training is after it.
            batch = part.now.done if part.now.epochs else min(part.now.done + 1, part.now.total)
            where.append(f"batch {batch}/{part.now.total}")
            numbers = format_metrics(part.now.metrics)
        left = part.estimate(clock)
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(
            Text(printable("  ".join(where))),
            ProgressBar(total=1.0, completed=part.fraction),
            Text(
                format_time(clock - part.began)
                + ("" if left is None else f", {format_time(left)} left")
            ),
        )
        lines += [row, Text("  ".join(numbers))]
    for line in lines:
        if isinstance(line, Text):
            line.plain = printable(line.plain)
            line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines)


def list_metrics(metrics: Mapping[str, Any], first: str = "") -> list[tuple[str, str]]:
    """The main metrics as texts "name value", and shorter: the `first`, then fractions
    (accuracies), then losses. A metric with a note says of what it is."""
    found = [(k, v) for k, v in metrics.items() if isinstance(v, int | float) and is_main(v)]
    texts = []
    for name, value in sorted(found, key=lambda item: (item[0] != first, not is_fraction(item[1]))):
        text, note = f"{name} {format_metric(value)}", getattr(value, "note", "")
        short = note.removesuffix(" images").removesuffix(" training") or name
        long = f"{text} ({note})" if note else text
        texts.append((long, f"{short} {format_metric(value)}"))
    return texts


def format_metrics(metrics: Mapping[str, Any], first: str = "") -> list[str]:
    """The longer texts of `list_metrics`."""
    return [text for text, _ in list_metrics(metrics, first)]


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
