"""The folder of a run: what a plan writes of it."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import tomli_w

from prunekit.errors import UserError
from prunekit.reading import hash_file
from prunekit.recipe.plan import Plan, Run
from prunekit.recipe.stages import Stage
from prunekit.store.files import (
    copy,
    find_partial,
    make_folder,
    make_inner,
    refuse_link,
    seal,
    write_json,
    write_npz,
    write_text,
)
from prunekit.store.keys import find_versions
from prunekit.store.layout import MODEL, PLAN, RECIPE, RECORDS, RUN, RUN_FORMAT, RUN_LOCK
from prunekit.store.metrics import write_metrics
from prunekit.store.records import read_record
from prunekit.store.stages import StageResult


@contextmanager
def claim(folder: Path, timeout: float = 0.2) -> Iterator[bool]:
    """Hold the lock of a folder; False if another process holds it for so long (seconds).

    Not 0: who looks whether it is held holds it for a moment.
    """
    refuse_link(folder / RUN_LOCK)
    try:
        held = filelock.FileLock(folder / RUN_LOCK).acquire(timeout=timeout)
    except filelock.Timeout:
        yield False
        return
    with held:
        yield True


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
    _arrays: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """What evaluators recorded of each image: name of a stage -> "evaluator.record" -> array."""
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

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Lock the folder; False if another process is running in it.

        That of the only run of a plan is the folder that `OutFolder.alone` locks.
        """
        if not self.plan.swept:
            yield True
            return
        make_inner(self.path)
        with claim(self.path) as mine:
            yield mine

    @property
    def stamp(self) -> tuple[int, int] | None:
        """What changes whenever its record is written; None without one."""
        with suppress(OSError):
            found = (self.path / RUN).stat()
            return found.st_mtime_ns, found.st_ino
        return None

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
        """Record a finished stage, in its place; copy its model, or write its records of images."""
        metrics = {k: v for k, v in result.metrics.items() if k != "counts"}
        place = {s.name: number for number, s in enumerate((stage, *self.run.stages))}
        stages = self._record["stages"]
        stages.append(
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
        stages.sort(key=lambda told: place[told["name"]])
        if stages[-1]["name"] == stage.name:
            self._record["sparsity"] = result.metrics["counts"]
        self.metrics[stage.name] = metrics
        if records is not None:
            self._arrays[stage.name] = records
            done = sorted(self._arrays, key=place.__getitem__)
            arrays = {f"{name}/{k}": v for name in done for k, v in self._arrays[name].items()}
            write_npz(self.path / RECORDS, arrays)
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
