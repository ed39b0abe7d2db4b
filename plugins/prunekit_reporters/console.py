"""Progress for users, on stderr: animated on a terminal, otherwise one line per epoch."""

from __future__ import annotations

import os
import sys
from time import monotonic

from rich.console import Console
from rich.live import Live
from rich.text import Text

from prunekit import NoOptions, is_fraction
from prunekit.contexts import ReporterContext
from prunekit.errors import printable, relative
from prunekit.report import (
    EpochDone,
    Event,
    FromRun,
    Note,
    Progress,
    Reporter,
    RunDone,
    RunFailed,
    RunStarted,
    StageDone,
    StageStarted,
)
from prunekit_reporters.display import (
    Job,
    Part,
    format_metrics,
    format_time,
    list_metrics,
    name_run,
    show,
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


class Screen:
    """Prints a line for everything finished; on a live terminal, shows current progress below.

    Lines of a run that goes beside others begin with its label.
    """

    def __init__(self, console: Console, *, live: bool, narrow: bool = False) -> None:
        self.console = console
        self.live = live
        self.narrow = narrow
        """Whether the line of an epoch leaves out what does not fit."""
        self.jobs: dict[str, Job] = {}
        """By the labels of runs that go side by side; "" is what goes alone."""
        self.display: Live | None = None
        self.drawn = 0.0

    def __call__(self, event: Event) -> None:
        clock = monotonic()
        label, event = (event.run, event.event) if isinstance(event, FromRun) else ("", event)
        job = self.jobs.setdefault(label, Job())
        match event:
            case Progress():
                if self.live:
                    old = job.part
                    # A rehearsal starts no stages.
                    part = old or Part(StageStarted(event.stage, "", ""), clock)
                    job.part = part.advance(event, clock)
                    where = old and old.now and (old.now.stage, old.now.label)
                    new = where != (event.stage, event.label)
                    if new or clock - self.drawn >= INTERVAL:
                        self._draw(clock)
                return
            case RunStarted():
                job.run, job.part = event, None
                if label:  # the rehearsal is over
                    self.jobs.pop("", None)
            case StageStarted(stored=False):
                total = max(event.epochs, 1)
                first = (event.epoch + event.batch / max(event.batches, 1)) / total
                job.part = Part(event, clock, first=first, fraction=first)
            case StageDone():
                job.part = None
            case RunDone() | RunFailed():
                del self.jobs[label]
                if not any(other.run for other in self.jobs.values()):
                    self.close()
        prefix = f"{label}  " if label else ""
        line = self._describe(event, job.run, self.console.width - len(prefix))
        if line:
            line = Text.assemble((prefix, "dim"), line)
            line.plain = printable(line.plain)
            self.console.print(line, soft_wrap=not self.live)
        if self.live:
            self._draw(clock)

    def close(self) -> None:
        """Remove the live display and restore the terminal's cursor; may be called twice."""
        if self.display:
            self.display.stop()
        self.display = None
        self.jobs.clear()

    def _draw(self, clock: float) -> None:
        """Update the live display at the time `clock` (seconds, monotonic)."""
        if not any(job.run or job.part for job in self.jobs.values()):
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
                get_renderable=lambda: show(dict(self.jobs), monotonic()),
            )
            self.display.start()
        self.display.refresh()
        self.drawn = clock

    def _describe(self, event: Event, run: RunStarted | None, width: int) -> Text | None:
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
                return Text(describe_epoch(event, width if self.narrow else None))
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
            case RunDone() if run:
                took = f" done in {format_time(event.seconds)}: {relative(event.folder)}"
                return name_run(run).append(took)
            case RunFailed():
                named = name_run(run) if run else Text(f"run {event.run}", "bold")
                return named.append(f" FAILED: {event.error}", "bold red")
        return None


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
