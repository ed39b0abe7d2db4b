"""The folder that a plan writes to: that of its only run, or of a sweep the one around its runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w

from prunekit.errors import UserError, relative
from prunekit.recipe.plan import Plan
from prunekit.report import Tell
from prunekit.store.files import (
    OTHER_FOLDER,
    find_partial,
    is_held,
    make_folder,
    next_free,
    write_json,
    write_text,
)
from prunekit.store.layout import PLAN, RECIPE, RUN_FORMAT, RUN_LOCK
from prunekit.store.records import find_blocking, find_changed, read_record, read_run
from prunekit.store.runs import RunFolder, claim

ANEW = "move it aside with --force"
MADE_WITH = {"inputs": list, "compute": dict, "stages": list}
"""Key of a `plan.json` that says what its runs were made with -> the type of its value."""
MOMENT = 60.0
"""Longest time, in seconds, for which a process locks the folder of a sweep."""


@dataclass(frozen=True)
class OutFolder:
    """Where a plan writes: the run folder, or for a sweep the folder of its run folders.

    `plan.json` says which plan it belongs to, so that another one cannot overwrite it.
    """

    path: Path
    plan: Plan
    elsewhere: str = OTHER_FOLDER
    """What to do where it cannot be written to."""
    anew: str = ANEW
    """What to do where other things are in it."""

    def prepare(self, tell: Tell, *, force: bool) -> dict[str, Any] | None:
        """Claim the folder for the plan. If the plan is done in it already, returns its `mark`.

        With `force`, a folder that exists is moved aside first. Raises `UserError` if runs of
        another plan, or files that prunekit did not write, are in the way.
        """
        where, marker = relative(self.path), self.path / PLAN
        aside = f"{self.elsewhere}, or {self.anew}"
        if self.path.is_file():
            raise UserError(f"{where} is a file; {self.elsewhere}")
        if force and self.path.exists():
            self._move_aside(tell)
        if marker.is_file():
            content = read_record(marker, aside)
            if content.get("plan") != digest(self.plan):
                raise UserError(
                    f"{where} holds the runs of another recipe ({content.get('recipe', '?')}); "
                    f"{aside}"
                )
            kept = all(isinstance(content.get(k, t()), t) for k, t in MADE_WITH.items())
            return content if content.get("done") and kept else None
        ours = {self.path / RUN_LOCK, *find_partial(self.path)}
        if self.path.is_dir() and set(self.path.iterdir()) - ours:
            raise UserError(f"{where} holds files that are not runs of prunekit; {aside}")
        make_folder(self.path, self.elsewhere)
        with self.alone(MOMENT if self.plan.swept else 0.2):
            if marker.is_file():  # another process was faster
                return self.prepare(tell, force=False)
            self.mark(done=False)
            if self.plan.swept:
                write_text(self.path / RECIPE, tomli_w.dumps(dict(self.plan.document)))
        return None

    def withdraw(self) -> None:
        """Remove what `prepare` has written, if no run has begun."""
        if {path.name for path in self.path.iterdir()} <= {PLAN, RECIPE, RUN_LOCK}:
            shutil.rmtree(self.path, ignore_errors=True)

    def find_changed(self, *, done: bool) -> list[Path]:
        """Files of its runs that are lost or not what the runs wrote; unless the plan is done, only
        what they cannot be written over."""
        find = partial(find_changed, done=True) if done else find_blocking
        return [run.path / name for run in self.runs() for name in find(run.path)]

    @contextmanager
    def alone(self, timeout: float = 0.2) -> Iterator[None]:
        """Lock the folder. Raises `UserError` if another process holds it for so long (seconds).

        The runs of a sweep have locks of their own: then it is locked for moments only.
        """
        make_folder(self.path, self.elsewhere)
        with claim(self.path, timeout) as mine:
            if not mine:
                raise UserError(self._describe_taken())
            for part in find_partial(self.path):
                part.unlink()
            yield

    def _describe_taken(self) -> str:
        where = relative(self.path)
        return f"another process is running in {where}; wait for it, or {self.elsewhere}"

    def runs(self) -> list[RunFolder]:
        """The folders of its runs, whether they exist or not."""
        return [
            RunFolder(self.path / run.label if self.plan.swept else self.path, self.plan, run)
            for run in self.plan.runs
        ]

    def look(self) -> tuple[bool, dict[str, Any]]:
        """(whether another process runs some of a sweep, label -> stamp of its record).

        Beside another process, what is done already counts as its work: that has no stamp.
        """
        runs = self.runs()
        joined = self.plan.swept and any(is_held(run.path / RUN_LOCK) for run in runs)
        done = {label for label, status in self.find_statuses().items() if status == "done"}
        theirs = done if joined else set()
        return joined, {r.run.label: r.stamp for r in runs if r.run.label not in theirs}

    def find_statuses(self) -> dict[str, str]:
        """Label -> what the records of its runs say; "missing" of a run that has not begun."""
        found = {}
        for run in self.runs():
            found[run.run.label] = "missing"
            with suppress(UserError):
                found[run.run.label] = read_run(run.path).status
        return found

    def is_complete(self, stages: Sequence[Sequence[str]]) -> bool:
        """Whether all its runs are done, each with these keys of its stages."""
        for run, keys in zip(self.runs(), stages, strict=True):
            try:
                told = read_run(run.path)
            except UserError:
                return False
            if told.status != "done" or [stage.key for stage in told.stages] != list(keys):
                return False
        return True

    def mark(self, *, done: bool, **made_with: Any) -> None:
        """Record which plan the folder belongs to and, if it is done, what it was `made_with`."""
        content = {
            "format": RUN_FORMAT,
            "recipe": relative(self.plan.path),
            "plan": digest(self.plan),
            "runs": [run.label for run in self.plan.runs],
            "done": done,
            **made_with,
        }
        write_json(self.path / PLAN, content)

    def _move_aside(self, tell: Tell) -> None:
        where = relative(self.path)
        if self.path.resolve() in (Path.cwd(), *self.plan.path.resolve().parents):
            raise UserError(
                f"{where} is the current folder or holds the recipe, and is not moved aside; name "
                "a folder for the results with --out"
            )
        for lock in (self.path / RUN_LOCK, *self.path.glob(f"*/{RUN_LOCK}")):
            if lock.exists():
                with claim(lock.parent) as free:
                    if not free:
                        raise UserError(self._describe_taken())
        aside = next_free(self.path, ".old")
        try:
            shutil.move(self.path, aside)
        except OSError as error:
            raise UserError(f"cannot move {where} aside: {error.strerror}") from None
        tell(f"moved {where} to {relative(aside)}")


def digest(plan: Plan) -> str:
    """SHA-256 of what a plan computes: its name and its resolved runs."""
    content = [plan.name, plan.smoke, [[run.label, run.describe()] for run in plan.runs]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
