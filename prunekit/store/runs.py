"""The folder of a run: everything a reader needs, and nothing half-written."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import tomli_w

from prunekit.errors import UserError, relative
from prunekit.recipe.plan import Plan, Run, Stage
from prunekit.report import Tell
from prunekit.store.files import copy, make_folder, read_json, write_json, write_npz, write_text
from prunekit.store.keys import find_versions
from prunekit.store.layout import MODEL, PLAN, RECIPE, RECORDS, RUN, RUN_FORMAT, RUN_LOCK
from prunekit.store.stages import StageFolder, StageResult


@dataclass
class RunFolder:
    """`recipe.toml`, `run.json`, `model.safetensors`, `records.npz`; reporters add theirs."""

    path: Path
    plan: Plan
    run: Run
    status: str = "running"
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    cause: BaseException | None = None
    """The exception that stopped the run, for `--debug`."""
    _record: dict[str, Any] = field(default_factory=dict)
    _records: dict[str, Path] = field(default_factory=dict)

    def start(self, device: Any) -> None:
        make_folder(self.path)
        write_text(self.path / RECIPE, tomli_w.dumps(self.plan.describe(self.run)))
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
            "device": str(device),
            "versions": find_versions(),
            "git": _find_commit(self.plan.path.parent),
            **self._known(),
            "error": None,
        }
        self._write()

    def _known(self) -> dict[str, Any]:
        """What an earlier process found here; it stays until the stages are told again."""
        empty: dict[str, Any] = {"keys": [], "stages": [], "sparsity": None}
        with suppress(OSError, UserError):
            known = read_json(self.path / RUN)
            return {key: known.get(key, value) for key, value in empty.items()}
        return empty

    def expect(self, keys: Sequence[str]) -> None:
        """Note the stages to come: `clean` spares their checkpoints when the run is stopped."""
        self._record |= {"keys": list(keys), "stages": [], "sparsity": None}
        self._write()

    def add(
        self, stage: Stage, key: str, result: StageResult, stored: StageFolder, reused: bool
    ) -> None:
        """Take over a finished stage: its metrics, and its model or records."""
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
                "metrics": metrics,
            }
        )
        self.metrics[stage.name] = metrics
        if stage.kind == "evaluate":
            self._records[stage.name] = stored.records
            self._write_records()
        else:
            copy(stored.model, self.path / MODEL)
        self._write()

    def close(self, status: str, error: str | None = None) -> None:
        self.status, self.error = status, error or ""
        self._record |= {"status": status, "error": error, "finished": _now()}
        self._record["seconds"] = sum(
            s["seconds"] for s in self._record["stages"] if not s["reused"]
        )
        self._write()

    def _write(self) -> None:
        write_json(self.path / RUN, self._record)

    def _write_records(self) -> None:
        """Arrays of all evaluate stages, named "stage/evaluator.record"."""
        import numpy as np

        arrays: dict[str, Any] = {}
        for name, path in self._records.items():
            with np.load(path, allow_pickle=False) as stored:
                arrays |= {f"{name}/{key}": stored[key] for key in stored.files}
        write_npz(self.path / RECORDS, arrays)


@dataclass(frozen=True)
class OutFolder:
    """Where a plan writes: the run folder, or for a sweep the folder of its run folders.

    `plan.json` says which plan it belongs to, so that another one cannot overwrite it.
    """

    path: Path
    plan: Plan

    @property
    def _marker(self) -> Path:
        return self.path / PLAN

    def prepare(self, tell: Tell, *, force: bool) -> list[str] | None:
        """Make the folder ours. The inputs of this very plan where it is done there already.

        With `force`, what is there is moved aside, and told. Raises `UserError` where another
        plan's runs, or files of somebody else, are in the way.
        """
        if self.path.is_file():
            raise UserError(f"{relative(self.path)} is a file; choose another --out")
        here = self.path.resolve()
        if force and here in (Path.cwd(), *self.plan.path.resolve().parents):
            raise UserError(
                f"{relative(self.path) or '.'} holds the recipe or is the present folder, and is "
                "not moved aside; name a folder for the results with --out"
            )
        if force and self.path.exists():
            if (self.path / RUN_LOCK).exists():
                with self.alone():
                    pass
            self._move_aside(tell)
        if self._marker.is_file():
            content = read_json(self._marker)
            if not isinstance(content, dict) or content.get("format") != RUN_FORMAT:
                raise UserError(f"{relative(self._marker)} is none of ours; choose another --out")
            if content.get("plan") != digest(self.plan):
                raise UserError(
                    f"{relative(self.path)} holds the runs of another recipe "
                    f"({content.get('recipe', '?')}); choose another folder with --out, or move it "
                    "aside with --force"
                )
            return content.get("inputs", []) if content.get("done") else None
        if self.path.is_dir() and any(p for p in self.path.iterdir() if p.name != RUN_LOCK):
            raise UserError(
                f"{relative(self.path)} holds files that are no run of prunekit; choose another "
                "folder with --out, or move it aside with --force"
            )
        make_folder(self.path)
        self.mark(done=False)
        if self.plan.swept:
            write_text(self.path / RECIPE, tomli_w.dumps(dict(self.plan.document)))
        return None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process runs in this folder meanwhile; `UserError` where one does already."""
        lock = filelock.FileLock(self.path / RUN_LOCK)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(
                f"another process is running in {relative(self.path)}; wait for it, or choose "
                "another --out"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def mark(self, *, done: bool, inputs: Sequence[str] = ()) -> None:
        """Say whose folder it is, and with `done` what was read for its results."""
        write_json(
            self._marker,
            {
                "format": RUN_FORMAT,
                "recipe": relative(self.plan.path),
                "plan": digest(self.plan),
                "runs": [run.label for run in self.plan.runs],
                "done": done,
                "inputs": list(inputs),
            },
        )

    def _move_aside(self, tell: Tell) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old{number}")).exists():
            number += 1
        try:
            shutil.move(self.path, aside)
            tell(f"{relative(self.path)} is moved to {relative(aside)}")
        except OSError as error:
            raise UserError(f"cannot move {relative(self.path)} aside: {error.strerror}") from None


def digest(plan: Plan) -> str:
    """What makes a plan this plan: its runs as resolved, reduced or not."""
    content = [plan.name, plan.smoke, [[run.label, run.describe()] for run in plan.runs]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _find_commit(folder: Path) -> str | None:
    """The git commit of the recipe's folder.

    Not whether files differ from it: to find that out git runs programs that a foreign
    repository's configuration names.
    """
    command = ["git", "-c", "core.fsmonitor=false", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
