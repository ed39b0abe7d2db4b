"""Results of stages on disk, each under its key."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from prunekit.errors import UserError, relative
from prunekit.report import Stop, Tell
from prunekit.store.files import make_folder, read_json, write_json, write_npz
from prunekit.store.layout import (
    MODEL,
    PROGRESS,
    RECORDS,
    RESULT,
    SCRATCH,
    STAGE_LOCK,
    STORE,
    STORE_FORMAT,
)
from prunekit.store.metrics import read_metrics, write_metrics


@dataclass(frozen=True)
class StageResult:
    """What a stage found: metrics, a row of history for each epoch, and how long it took."""

    metrics: Mapping[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the packages that the stage's components need."""


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage in the store. Its result is written last, and marks it as done."""

    path: Path

    @property
    def model(self) -> Path:
        """The file of the network after the stage."""
        return self.path / MODEL

    @property
    def records(self) -> Path:
        """The file of what evaluators record of each image."""
        return self.path / RECORDS

    @property
    def progress(self) -> Path:
        """The checkpoint of a stage that is being computed."""
        return self.path / PROGRESS

    def scratch(self) -> Path:
        """A folder for intermediate results, deleted when the stage is done."""
        folder = self.path / SCRATCH
        make_folder(folder)
        return folder

    @property
    def done(self) -> bool:
        """Whether the result, and all files that belong to it, are complete."""
        with suppress(OSError, UserError):
            self.read()
            return True
        return False

    def read(self) -> StageResult:
        """The result. Raises `UserError` if it, or a file that belongs to it, is incomplete."""
        content = read_json(self.path / RESULT)
        names = [field.name for field in dataclasses.fields(StageResult)]
        if not isinstance(content, dict) or not content.keys() >= {*names, "sizes"}:
            raise UserError(f"{relative(self.path)} holds no result")
        if content["sizes"] != self._measure():
            raise UserError(f"{relative(self.path)} holds files that are cut off")
        result = {name: content[name] for name in names}
        return StageResult(**{**result, "metrics": read_metrics(result["metrics"])})

    def _measure(self) -> dict[str, int]:
        """Bytes of the files that belong to the result."""
        files = (self.model, self.records)
        return {file.name: file.stat().st_size for file in files if file.is_file()}

    def finish(self, result: StageResult, description: Mapping[str, Any]) -> None:
        """Write the result, which marks the stage as done, and delete its checkpoint."""
        told = {**vars(result), "metrics": write_metrics(result.metrics)}
        content = {**told, "stage": description, "sizes": self._measure()}
        write_json(self.path / RESULT, content)
        self.progress.unlink(missing_ok=True)
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)

    def write_records(self, records: Mapping[str, Any]) -> None:
        """Write what evaluators record of each image: arrays by name."""
        write_npz(self.records, records)


@dataclass(frozen=True)
class Store:
    """All stage results below one folder; processes that share it wait for each other."""

    root: Path

    @property
    def stages(self) -> Path:
        """The folder of the stages of this format."""
        return self.root / f"v{STORE_FORMAT}"

    def prepare(self, tell: Tell) -> None:
        """Make the folders; tells once if there are stages of an older format."""
        if (old := self._find_old()) and not self.stages.exists():
            where = relative(self.root)
            way = relative(self.root.parent) if self.root.name == STORE else f"--store {where}"
            tell(
                f"stages stored by an older prunekit ({len(old)} in {where}) cannot be used again; "
                f"runs and model files stay readable; free the space: prunekit clean {way}"
            )
        make_folder(self.stages)

    def folder(self, key: str) -> StageFolder:
        """The folder of the stage with this key, whether it exists or not."""
        return StageFolder(self.stages / key)

    def is_done(self, key: str) -> bool:
        """Whether the stage with this key has a complete result."""
        return self.folder(key).done

    @contextmanager
    def locked(
        self, key: str, tell: Callable[[], None], stop: Stop | None = None
    ) -> Iterator[StageFolder]:
        """Lock the folder of a stage; `tell` is called if that means waiting for another process.

        Raises `Interrupted` if a stop is requested meanwhile.
        """
        folder = self.folder(key)
        make_folder(folder.path)
        lock = filelock.FileLock(folder.path / STAGE_LOCK)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            tell()
        while not lock.is_locked:
            if stop is not None:
                stop.check()
            with suppress(filelock.Timeout):
                lock.acquire(timeout=1)
        try:
            for partial in folder.path.glob(".*.*"):  # what a killed process was writing
                partial.unlink()
            yield folder
        finally:
            lock.release()

    def remove_unused(self, used: set[str], *, keep: bool = False) -> list[tuple[str, int]]:
        """Delete the stages whose keys are not in `used`; returns (key, bytes) of each.

        Stages of an older format are deleted in any case, and stages that a process is computing
        are kept. With `keep`, nothing is deleted.
        """
        freed = []
        unused = [path for path in _list_folders(self.stages) if path.name not in used]
        for path in (*self._find_old(), *unused):
            with suppress(filelock.Timeout), filelock.FileLock(path / STAGE_LOCK, timeout=0):
                size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                if not keep:
                    shutil.rmtree(path)
                freed.append((path.name, size))
        return freed

    def _find_old(self) -> list[Path]:
        """Folders of stages of older formats; the first format kept them in the root."""
        older = (self.root, *(self.root / f"v{n}" for n in range(1, STORE_FORMAT)))
        found = [path for folder in older for path in _list_folders(folder)]
        return [path for path in found if re.fullmatch(r"[0-9a-f]{32}", path.name)]


def _list_folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
