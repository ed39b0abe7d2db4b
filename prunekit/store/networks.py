"""What is known of a stored network: its file, its header, and the run folder it lies in."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.errors import UserError, relative
from prunekit.store.checkpoint import read_checkpoint
from prunekit.store.layout import EVALUATIONS, MODEL, RECIPE, RUN, STORE


@dataclass(frozen=True)
class Network:
    """A model file, and what is known of it."""

    file: Path
    run: Path | None
    """The run folder it belongs to."""
    header: Mapping[str, Any]
    sections: dict[str, Any]
    """[dataset], [architecture] and [threat] of a recipe for it."""

    @property
    def evaluations(self) -> Path:
        return (self.run or self.file.parent) / EVALUATIONS

    @property
    def store(self) -> Path:
        """Of the run, or for a lone file one of its own."""
        if self.run is None:
            return self.evaluations / STORE
        above = [self.run.parent / STORE, self.run.parent.parent / STORE]
        return next((folder for folder in above if folder.is_dir()), above[0])


def find_model(path: Path) -> Path:
    """The model file of a run folder, or the file itself. Raises `UserError` without one."""
    if path.is_dir():
        file = path / MODEL
        if not file.is_file():
            runs = sorted(p.parent for p in path.glob(f"*/{MODEL}"))
            way = f"; choose one of its runs, such as {relative(runs[0])}" if runs else ""
            raise UserError(f"there is no {MODEL} in {relative(path)}{way}")
        return file
    if not path.exists():
        raise UserError(f"there is no run folder or file {relative(path)}")
    return path


def read_network(path: Path) -> Network:
    """Read what is known of a run folder's network, or of a file's; raises `UserError`."""
    file = find_model(path).absolute()
    if file.suffix != ".safetensors":
        raise UserError(
            f"{relative(file)} is no model file of prunekit; make a run of it: prunekit import"
        )
    header = read_checkpoint(file)[1]
    run = file.parent if file.name == MODEL and (file.parent / RUN).is_file() else None
    sections: dict[str, Any] = {key: header[key] for key in ("dataset", "architecture", "threat")
                                if header.get(key)}  # fmt: skip
    if run is not None:
        recipe = tomllib.loads((run / RECIPE).read_text(encoding="utf-8"))
        sections |= {key: recipe[key] for key in ("dataset", "architecture", "threat")
                     if key in recipe}  # fmt: skip
    return Network(file, run, header, sections)
