"""Stage results on disk, by the hash of everything that decides them."""

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
    STORE_FORMAT,
)


@dataclass(frozen=True)
class StageResult:
    """What a stage found: metrics, a row for each epoch, and how long it took."""

    metrics: Mapping[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of what the stage's components need."""


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage in the store. `result.json` is written last and says it is done."""

    path: Path

    @property
    def model(self) -> Path:
        return self.path / MODEL

    @property
    def records(self) -> Path:
        return self.path / RECORDS

    @property
    def progress(self) -> Path:
        return self.path / PROGRESS

    def scratch(self, name: str) -> Path:
        """A folder for one evaluator; it goes when the stage is done."""
        folder = self.path / SCRATCH / name
        make_folder(folder)
        return folder

    @property
    def done(self) -> bool:
        return self._content() is not None

    def read(self) -> StageResult:
        content = self._content()
        if content is None:
            raise UserError(f"{relative(self.path)} holds no result")
        return StageResult(**{f.name: content[f.name] for f in dataclasses.fields(StageResult)})

    def _content(self) -> dict[str, Any] | None:
        """Of `result.json`; None where it or a file beside it is missing or cut off.

        The stage is then not done.
        """
        with suppress(OSError, UserError):
            content = read_json(self.path / RESULT)
            if isinstance(content, dict) and all(
                f.name in content for f in dataclasses.fields(StageResult)
            ):
                return content if content.get("sizes") == self._measure() else None
        return None

    def _measure(self) -> dict[str, int]:
        """Bytes of the files that belong to the result."""
        files = (self.model, self.records)
        return {file.name: file.stat().st_size for file in files if file.is_file()}

    def finish(self, result: StageResult, description: Mapping[str, Any]) -> None:
        """Mark the stage as done; its checkpoint has served."""
        content = {**vars(result), "stage": description, "sizes": self._measure()}
        write_json(self.path / RESULT, content)
        self.progress.unlink(missing_ok=True)
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)

    def write_records(self, records: Mapping[str, Any]) -> None:
        """Per-image records as npz."""
        write_npz(self.records, records)


@dataclass(frozen=True)
class Store:
    """All stage results below one folder; processes that share it wait for each other."""

    root: Path

    @property
    def stages(self) -> Path:
        """Where stages of this format lie."""
        return self.root / f"v{STORE_FORMAT}"

    def prepare(self, tell: Tell) -> None:
        """Make the folders; says once that there are stages of an older format."""
        if (old := self._find_old()) and not self.stages.exists():
            stages = "1 stored stage" if len(old) == 1 else f"{len(old)} stored stages"
            tell(
                f"{stages} in {relative(self.root)} were written by an older prunekit and cannot "
                "be used again; runs and model files stay readable; free the space: prunekit clean"
            )
        make_folder(self.stages)

    def folder(self, key: str) -> StageFolder:
        return StageFolder(self.stages / key)

    def is_done(self, key: str) -> bool:
        return self.folder(key).done

    @contextmanager
    def locked(
        self, key: str, tell: Callable[[], None], stop: Stop | None = None
    ) -> Iterator[StageFolder]:
        """The stage's folder, this process alone in it; `tell()` is called before waiting for it.

        Raises `Interrupted` where a stop is asked for meanwhile.
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
            for half in folder.path.glob(".*.*"):  # what a killed process was writing
                half.unlink()
            yield folder
        finally:
            lock.release()

    def remove_unused(self, used: set[str], *, keep: bool = False) -> list[tuple[str, int]]:
        """Delete the stages that are not in `used`; (key, bytes) of each. `keep` only looks.

        Stages of an older format go whoever refers to them. What a process is computing just now
        stays.
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
        """Folders of stages of older formats; the first one had them at the top."""
        found = _list_folders(self.root)
        old = [path for path in found if re.fullmatch(r"[0-9a-f]{32}", path.name)]
        for path in found:
            version = re.fullmatch(r"v(\d+)", path.name)
            if version and int(version[1]) < STORE_FORMAT:
                old += _list_folders(path)
        return old


def _list_folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
