"""Stage results on disk, by the hash of everything that decides them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import filelock

from prunekit.errors import UserError, relative
from prunekit.files import make_folder, read_json, write_json, write_npz
from prunekit.stop import Stop

STORE = ".stages"
"""Name of the store's folder, beside the run folders that share it."""

PRESENTATION = {
    "__main__", "api", "choosing", "cli", "cli_group", "cli_models", "cli_support",
    "completion", "curves", "doctor", "errors", "exporting", "failures", "hookspecs",
    "identity", "importing", "imports", "inspecting", "judging", "loading", "metric_names",
    "options", "plan", "probe", "recipe", "registry", "report", "requirements", "results",
    "runfolder", "running", "scaffold", "showing", "source", "stop", "sweep", "tables",
    "testing", "values",
}  # fmt: skip
"""Modules of the core that decide no result: what a recipe resolves to is in the key."""


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
        return self.path / "model.safetensors"

    @property
    def records(self) -> Path:
        return self.path / "records.npz"

    @property
    def progress(self) -> Path:
        return self.path / "progress.safetensors"

    def scratch(self, name: str) -> Path:
        """A folder for one evaluator; it goes when the stage is done."""
        folder = self.path / "scratch" / name
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
            content = read_json(self.path / "result.json")
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
        write_json(self.path / "result.json", content)
        self.progress.unlink(missing_ok=True)
        shutil.rmtree(self.path / "scratch", ignore_errors=True)

    def write_records(self, records: Mapping[str, Any]) -> None:
        """Per-image records as npz."""
        write_npz(self.records, records)


@dataclass(frozen=True)
class Store:
    """All stage results below one folder; processes that share it wait for each other."""

    root: Path

    def folder(self, key: str) -> StageFolder:
        return StageFolder(self.root / key)

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
        lock = filelock.FileLock(folder.path / "lock")
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

        What a process is computing just now stays.
        """
        freed = []
        for path in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            if not path.is_dir() or path.name in used:
                continue
            with suppress(filelock.Timeout), filelock.FileLock(path / "lock", timeout=0):
                size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                if not keep:
                    shutil.rmtree(path)
                freed.append((path.name, size))
        return freed


def hash_stage(
    upstream: str, description: Mapping[str, Any], plugins: set[str], environment: Mapping[str, Any]
) -> str:
    """The key of a stage: 32 hexadecimal digits over all that decides its result.

    `plugins` are import names of packages, hashed by their source; so is the core.
    """
    content = {
        "upstream": upstream,
        "stage": description,
        "source": {name: hash_source(name) for name in sorted({"prunekit", *plugins})},
        "environment": environment,
    }
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@cache
def hash_source(package: str) -> str:
    """SHA-256 of a package's (or module's) Python files: an editable install has no version."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return "unknown"
    digest = hashlib.sha256()
    # A package has folders (one without __init__.py has no origin), a module is a file.
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [(f, folder) for folder in folders for f in sorted(folder.rglob("*.py"))]
    if not folders and spec.origin is not None:
        files = [(Path(spec.origin), Path(spec.origin).parent)]
    for file, folder in files:
        name = file.relative_to(folder).as_posix()
        if package == "prunekit" and file.stem in PRESENTATION:
            continue
        digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def version_of(name: str) -> str:
    """Installed version of the distribution that has this import name."""
    for distribution in importlib.metadata.packages_distributions().get(name, [name]):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def find_versions() -> dict[str, str]:
    """Versions worth recording with a result."""
    names = ("prunekit", "torch", "torchvision", "timm", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names if _has(name)}
    return {"python": platform.python_version(), **versions}


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
