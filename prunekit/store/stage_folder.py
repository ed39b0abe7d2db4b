"""The folder of one stage's result: written, read, and checked against what was written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.errors import RunError, UserError, explain_briefly, relative
from prunekit.reading import hash_file
from prunekit.report import Tell
from prunekit.store.files import (
    make_inner,
    next_free,
    read_json,
    seal,
    write_json,
)
from prunekit.store.layout import MODEL, PROGRESS, RECORDS, RESULT, SCRATCH, STAGE_LOCK
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
    compute: Mapping[str, Any] = field(default_factory=dict)
    """The device and the threads that it was computed with."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Name -> SHA-256 of the files that belong to the result."""


TYPES = {"metrics": dict, "history": list, "seconds": float, "notes": list, "versions": dict,
         "compute": dict, "files": dict}  # fmt: skip


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage in the store, called by its key. Its result is written last, and
    marks it as done."""

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

    def _find_beside(self) -> list[Path]:
        """What `training/progress` keeps beside the checkpoint."""
        return list(self.path.glob(f"{self.progress.stem}-*{self.progress.suffix}"))

    def scratch(self) -> Path:
        """A folder for intermediate results, deleted when the stage is done."""
        folder = self.path / SCRATCH
        make_inner(folder)
        return folder

    @property
    def done(self) -> bool:
        """Whether the result, and all files that belong to it, are there and what was stored."""
        with suppress(Exception):  # whatever garbage makes its readers raise
            self.read()
            return True
        return False

    def read(self, asked: Mapping[str, Any] | None = None) -> StageResult:
        """The result; what is `asked` for is what the header of its model says: its "stage", ...

        Raises `UserError` if it, or a file that belongs to it, is not what was stored, or of
        another stage.
        """
        content = read_json(self.path / RESULT)
        if not isinstance(content, dict) or "sha256" not in content:
            raise UserError(f"{RESULT} holds no result")
        if content["sha256"] != seal(content):
            raise UserError(f"{RESULT} has changed since it was written")
        stage = content.get("stage")
        told = {} if asked is None else json.loads(json.dumps(asked))
        if (content.get("key"), stage) != (self.path.name, told.get("stage", stage)):
            raise UserError("it holds the result of another stage")
        if not all(isinstance(content.get(name), kind) for name, kind in TYPES.items()):
            raise UserError(f"{RESULT} holds something else than a result")
        if (found := self._hash()) != content["files"]:
            names = [n for n, told in content["files"].items() if told != found.get(n)]
            what = names[0] if names else "a file"
            raise UserError(f"{what} is not what was stored")
        if told and MODEL in found:
            from prunekit.store.tensors.checkpoint import read_header  # torch takes seconds

            header = read_header(self.model)
            if wrong := [name for name, value in told.items() if header.get(name) != value]:
                raise UserError(f"{MODEL} names another {wrong[0]}")
        result = StageResult(**{name: content[name] for name in TYPES})
        return dataclasses.replace(result, metrics=read_metrics(result.metrics))

    def _hash(self) -> dict[str, str]:
        """SHA-256 of the files that belong to the result."""
        return {f.name: hash_file(f) for f in (self.model, self.records) if f.is_file()}

    def repair(self, tell: Tell, asked: Mapping[str, Any] | None = None) -> StageResult | None:
        """The result as of `read`, or None if it has to be computed, from what is there of it.

        What is damaged is told, and moved aside into a folder of its own.
        """
        try:
            if os.path.lexists(self.path / RESULT):
                return self.read(asked)
            self._check_unfinished()
        # Whatever garbage makes its readers raise.
        except Exception as error:
            reason = str(error) if isinstance(error, UserError) else explain_briefly(error)
            tell(
                f"the stored stage {relative(self.path)} is damaged ({reason}): it is computed "
                f"again, and what was there is now in {relative(self._empty())}"
            )
        return None

    def _empty(self) -> Path:
        """Move all but the lock into another folder, which is returned."""
        aside = next_free(self.path, ".damaged")
        try:
            aside.mkdir()
            for path in [p for p in self.path.iterdir() if p.name != STAGE_LOCK]:
                path.rename(aside / path.name)
        except OSError as error:
            where = relative(self.path)
            raise RunError(f"cannot move what is in {where} aside: {error.strerror}") from None
        return aside

    def _check_unfinished(self) -> None:
        """Raise if what stands in the place of what a computation would go on from is no file.

        Who reads such a file looks at its content.
        """
        for path in (self.model, self.records, self.progress, *self._find_beside()):
            if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
                raise UserError(f"{path.name} is not a file")
        scratch = self.path / SCRATCH
        if os.path.lexists(scratch) and (scratch.is_symlink() or not scratch.is_dir()):
            raise UserError(f"{SCRATCH} is not a folder")
        for path in scratch.rglob("*"):
            if path.is_symlink():
                raise UserError(f"{path.name} is a link")
            if not path.is_dir() and not path.is_file():
                raise UserError(f"{path.name} is not a file")

    def finish(self, result: StageResult, description: Mapping[str, Any]) -> StageResult:
        """Write the result, which marks the stage as done, and delete its checkpoint.

        Returns it with the hashes of its files.
        """
        result = dataclasses.replace(result, files=self._hash())
        told = {**vars(result), "metrics": write_metrics(result.metrics)}
        content = {**told, "stage": description, "key": self.path.name}
        write_json(self.path / RESULT, {**content, "sha256": seal(content)})
        for path in (self.progress, *self._find_beside()):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)
        return result
