"""Results of stages on disk, each under its key."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import filelock

from prunekit.errors import UserError, relative
from prunekit.report import Stop, Tell
from prunekit.store.files import (
    OTHER_STORE,
    find_partial,
    is_held,
    make_folder,
    make_inner,
    refuse_link,
    relative_link,
    set_aside,
)
from prunekit.store.layout import STAGE_LOCK, STORE, STORE_FORMAT
from prunekit.store.stage_folder import StageFolder as StageFolder
from prunekit.store.stage_folder import StageResult as StageResult


@dataclass(frozen=True)
class Store:
    """All stage results below one folder; processes that share it wait for each other."""

    root: Path

    @property
    def stages(self) -> Path:
        """The folder of the stages of this format."""
        return self.root / f"v{STORE_FORMAT}"

    def prepare(self, tell: Tell) -> None:
        """Make the folders; tells once if there are stages of an older format.

        Raises `UserError` for links that lead to another store, and if nothing can be written.
        """
        self._refuse_links()
        if (old := self._find_old()) and not self.stages.exists():
            where = relative(self.root)
            way = relative(self.root.parent) if self.root.name == STORE else f"--store {where}"
            tell(
                f"stages stored by an older prunekit ({len(old)} in {where}) cannot be used again; "
                f"model files stay readable; free the space: prunekit clean {way}"
            )
        if not _is_read_only(self.stages):
            make_folder(self.stages, OTHER_STORE)

    def folder(self, key: str) -> StageFolder:
        """The folder of the stage with this key, whether it exists or not."""
        return StageFolder(self.stages / key)

    def is_held(self, key: str) -> bool:
        """Whether a process is computing the stage with this key."""
        return bool(is_held(self.folder(key).path / STAGE_LOCK))

    @contextmanager
    def locked(
        self, key: str, tell: Callable[[], None], stop: Stop | None = None
    ) -> Iterator[StageFolder]:
        """Lock the folder of a stage; `tell` is called if that means waiting for another process.

        A result that is complete in a folder that cannot be written to needs no lock. Raises
        `Interrupted` if a stop is requested meanwhile.
        """
        folder = self.folder(key)
        if _is_read_only(folder.path) and folder.done:
            yield folder
            return
        for path in (folder.path, folder.path / STAGE_LOCK):
            if os.path.lexists(path) and path.is_dir() != (path == folder.path):
                set_aside(path)
        make_inner(folder.path, OTHER_STORE)
        refuse_link(folder.path / STAGE_LOCK)
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
            for partial in find_partial(folder.path):
                partial.unlink()
            yield folder
        finally:
            lock.release()

    def remove_unused(self, used: set[str], *, keep: bool = False) -> list[tuple[str, int]]:
        """Delete the stages whose keys are not in `used`; returns (key, bytes) of each.

        Stages of an older format are deleted in any case, and stages that a process is computing
        are kept. With `keep`, nothing is deleted. Raises `UserError` for links that lead elsewhere.
        """
        self._refuse_links()
        freed = []
        unused = [path for path in _list_folders(self.stages) if path.name not in used]
        if self.stages.is_dir():  # a file or link that was moved aside
            for path in sorted(p for p in self.stages.glob("*.damaged*") if not _is_folder(p)):
                freed.append((path.name, path.lstat().st_size))
                if not keep:
                    path.unlink()
        for path in (*self._find_old(), *unused):
            refuse_link(path / STAGE_LOCK)
            with suppress(filelock.Timeout), filelock.FileLock(path / STAGE_LOCK, timeout=0):
                size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                if not keep:
                    shutil.rmtree(path)
                freed.append((path.name, size))
        return freed

    def _refuse_links(self) -> None:
        """A folder from somebody else may hold a link to any store; a store that a user named by
        another name than the default one may be a link."""
        own = (self.root,) if self.root.name == STORE else ()
        for path in (*own, *(self.root / f"v{n}" for n in range(1, STORE_FORMAT + 1))):
            if path.is_symlink():
                raise UserError(
                    f"{relative_link(path)} is a link, which is not followed; remove it, and name "
                    "the store with --store"
                )

    def _find_old(self) -> list[Path]:
        """Folders of stages of older formats; the first format kept them in the root."""
        older = (self.root, *(self.root / f"v{n}" for n in range(1, STORE_FORMAT)))
        found = [path for folder in older for path in _list_folders(folder)]
        return [path for path in found if re.fullmatch(r"[0-9a-f]{32}", path.name)]


def _is_read_only(folder: Path) -> bool:
    """Whether nothing can be locked in a folder that is there."""
    lock = folder / STAGE_LOCK
    return any(path.exists() and not os.access(path, os.W_OK) for path in (folder, lock))


def _list_folders(path: Path) -> list[Path]:
    return sorted(filter(_is_folder, path.iterdir())) if path.is_dir() else []


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
