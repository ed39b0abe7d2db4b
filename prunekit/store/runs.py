"""The folders that a plan writes to: one for each run, and for a sweep one around them."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import tomli_w

from prunekit.errors import UserError, relative
from prunekit.reading import hash_file
from prunekit.recipe.plan import Plan, Run
from prunekit.recipe.stages import Stage
from prunekit.report import Tell
from prunekit.store.files import (
    OTHER_FOLDER,
    copy,
    find_partial,
    make_folder,
    next_free,
    refuse_link,
    seal,
    write_json,
    write_npz,
    write_text,
)
from prunekit.store.keys import find_versions
from prunekit.store.layout import MODEL, PLAN, RECIPE, RECORDS, RUN, RUN_FORMAT, RUN_LOCK
from prunekit.store.metrics import write_metrics
from prunekit.store.records import find_blocking, find_changed, read_record
from prunekit.store.stages import StageResult

ANEW = "move it aside with --force"
MADE_WITH = {"inputs": list, "compute": dict, "stages": list}
"""Key of a `plan.json` that says what its runs were made with -> the type of its value."""


@dataclass
class RunFolder:
    """The folder of a run: its recipe, its record, its model and its records of images."""

    path: Path
    plan: Plan
    run: Run
    status: str = "running"
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    cause: BaseException | None = None
    """The exception that stopped the run, for `--debug`."""
    _record: dict[str, Any] = field(default_factory=dict)
    _arrays: dict[str, Any] = field(default_factory=dict)
    """What evaluators recorded of each image, as "stage/evaluator.record"."""
    _files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the recipe, the model and the records, by name."""

    def start(self, compute: Mapping[str, Any], recipe: str = "") -> None:
        """Make the folder, and write the recipe, by default as resolved, and a first record.

        The stages that an earlier process recorded stay listed until `expect` is called.
        """
        if self.plan.swept:  # the folder has a name that no user chose
            refuse_link(self.path)
        make_folder(self.path)
        for part in find_partial(self.path):
            part.unlink()
        write_text(self.path / RECIPE, recipe or tomli_w.dumps(self.plan.describe(self.run)))
        self._files = {RECIPE: hash_file(self.path / RECIPE)}
        known: dict[str, Any] = {"keys": [], "stages": [], "sparsity": None}
        with suppress(UserError):
            known |= {k: v for k, v in read_record(self.path / RUN, "").items() if k in known}
        self._record = {
            "format": RUN_FORMAT,
            "name": self.plan.name,
            "run": self.run.label,
            "number": self.plan.runs.index(self.run),
            "status": self.status,
            "smoke": self.plan.smoke,
            "seed": self.run.seed,
            "settings": dict(self.run.settings),
            "started": _now(),
            "device": compute["device"],
            "compute": dict(compute),
            "versions": find_versions(),
            "git": _find_commit(self.plan.path.parent),
            **known,
            "error": None,
        }
        self._write()

    @property
    def model(self) -> Path:
        """The file of its network."""
        return self.path / MODEL

    def expect(self, keys: Sequence[str]) -> None:
        """Record the keys of all results, so that `clean` keeps what a stopped run has."""
        self._record |= {"keys": list(keys), "stages": [], "sparsity": None}
        self._write()

    def add(
        self,
        stage: Stage,
        key: str,
        result: StageResult,
        reused: bool,
        model: Path | None = None,
        records: Mapping[str, Any] | None = None,
    ) -> None:
        """Record a finished stage; copy its model, or write its records of images."""
        metrics = {k: v for k, v in result.metrics.items() if k != "counts"}
        self._record["sparsity"] = result.metrics["counts"]
        self._record["stages"].append(
            {
                "name": stage.name,
                "kind": stage.kind,
                "key": key,
                "seconds": result.seconds,
                "reused": reused,
                "notes": result.notes,
                "versions": dict(result.versions),
                "compute": dict(result.compute),
                "files": dict(result.files),
                "metrics": write_metrics(metrics),
            }
        )
        self.metrics[stage.name] = metrics
        if records is not None:
            self._arrays |= {f"{stage.name}/{k}": v for k, v in records.items()}
            write_npz(self.path / RECORDS, self._arrays)
            self._files[RECORDS] = hash_file(self.path / RECORDS)
        if model is not None:
            copy(model, self.model)
            self._files[MODEL] = result.files[MODEL]
        elif MODEL not in self._files and self.model.is_file():
            self._files[MODEL] = hash_file(self.model)
        self._write()

    def close(self, status: str, error: str | None = None) -> None:
        """Record how the run ended: "done", "interrupted" or "failed"."""
        self.status, self.error = status, error or ""
        self._record |= {"status": status, "error": error, "finished": _now()}
        computed = [stage for stage in self._record["stages"] if not stage["reused"]]
        self._record["seconds"] = sum(stage["seconds"] for stage in computed)
        self._record["reports"] = self._find_reports()
        self._write()

    def _find_reports(self) -> list[str]:
        """Names of the files that reporters have written since the start."""
        started = (self.path / RECIPE).stat().st_mtime_ns
        files = [p for p in self.path.iterdir() if p.is_file() and p.name[0] != "."]
        new = {p.name for p in files if p.stat().st_mtime_ns >= started}
        return sorted(new - {RECIPE, RUN, PLAN, MODEL, RECORDS})

    def _write(self) -> None:
        record = {**self._record, "files": self._files}
        write_json(self.path / RUN, {**record, "sha256": seal(record)})


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
        self.mark(done=False)
        if self.plan.swept:
            write_text(self.path / RECIPE, tomli_w.dumps(dict(self.plan.document)))
        return None

    def withdraw(self) -> None:
        """Remove what `prepare` has written, if no run has begun."""
        if {path.name for path in self.path.iterdir()} <= {PLAN, RECIPE}:
            shutil.rmtree(self.path, ignore_errors=True)

    def find_changed(self, *, done: bool) -> list[Path]:
        """Files of its runs that are lost or not what the runs wrote; unless the plan is done, only
        what they cannot be written over."""
        find = partial(find_changed, done=True) if done else find_blocking
        labels = [run.label for run in self.plan.runs] if self.plan.swept else ["."]
        folders = [self.path / label for label in labels]
        return [folder / name for folder in folders for name in find(folder)]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the folder. Raises `UserError` if another process is running in it."""
        make_folder(self.path, self.elsewhere)
        refuse_link(self.path / RUN_LOCK)
        try:
            # Not 0: who looks whether it is held holds it for a moment.
            held = filelock.FileLock(self.path / RUN_LOCK).acquire(timeout=0.2)
        except filelock.Timeout:
            raise UserError(
                f"another process is running in {relative(self.path)}; wait for it, or "
                f"{self.elsewhere}"
            ) from None
        with held:
            for part in find_partial(self.path):
                part.unlink()
            yield

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
        if (self.path / RUN_LOCK).exists():
            with self.alone():
                pass
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


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _find_commit(folder: Path) -> str | None:
    """The git commit of a folder.

    Whether files differ from it is not asked: git would run programs that the configuration of
    somebody else's repository names.
    """
    command = ["git", "-c", "core.fsmonitor=false", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
