"""What a live display shows of runs that go on, and the texts of its lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prunekit import format_metric, format_setting, is_fraction, is_main
from prunekit.errors import printable
from prunekit.report import Progress, RunStarted, StageStarted


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


@dataclass
class Job:
    """A run that goes on, if one has begun, and its stage."""

    run: RunStarted | None = None
    part: Part | None = None


def name_run(run: RunStarted) -> Text:
    """The run's title: SMOKE for a smoke run, its number, and the settings that identify it."""
    settings = " ".join(f"{address}={format_setting(v)}" for address, v in run.settings.items())
    what = f"run {run.number}/{run.runs} {settings or run.run}"
    return Text.assemble(("SMOKE " if run.smoke else "", "bold yellow reverse"), (what, "bold"))


def show(jobs: Mapping[str, Job], clock: float) -> Group:
    """Alone: up to three lines, the run, unless this is the rehearsal, its stage with progress bar
    and times, and current metrics. Side by side: the label, and that stage, of each run."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_column(ratio=1, min_width=10)
    table.add_column(no_wrap=True)
    lines: list[Text | Table] = [name_run(job.run) for job in jobs.values() if job.run]
    lines = [] if any(jobs) else lines
    numbers: list[str] = []
    for label, job in jobs.items():
        if job.part:
            where, numbers = locate(job.run, job.part)
            left = job.part.estimate(clock)
            took = format_time(clock - job.part.began)
            table.add_row(
                Text(printable("  ".join([label, *where] if label else where))),
                ProgressBar(total=1.0, completed=job.part.fraction),
                Text(took + ("" if left is None else f", {format_time(left)} left")),
            )
    if table.row_count:
        lines += [table] if any(jobs) else [table, Text("  ".join(numbers))]
    for line in lines:
        if isinstance(line, Text):
            line.plain = printable(line.plain)
            line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines)


def locate(run: RunStarted | None, part: Part) -> tuple[list[str], list[str]]:
    """(where a part is: its stage, epoch and batch; current metrics)."""
    where = [part.stage.stage]
    if run and part.stage.stage in run.stages:
        where.append(f"{run.stages.index(part.stage.stage) + 1}/{len(run.stages)}")
    if part.now is None:
        return where, []
    if part.now.epochs:
        where.append(f"epoch {part.now.epoch + 1}/{part.now.epochs}")
    if part.now.label:
        where.append(part.now.label)
    # Evaluators are told of before a batch, training is after it.
    batch = part.now.done if part.now.epochs else min(part.now.done + 1, part.now.total)
    return [*where, f"batch {batch}/{part.now.total}"], format_metrics(part.now.metrics)


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
