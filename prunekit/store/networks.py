"""What is known of a stored network: its file, its header, and the folder of its run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.errors import UserError, relative
from prunekit.recipe.toml.lines import read_toml
from prunekit.store.layout import EVALUATIONS, MODEL, RECIPE, RUN, STORE
from prunekit.store.tensors.checkpoint import read_header


@dataclass(frozen=True)
class Network:
    """A model file, and what is known of it."""

    file: Path
    run: Path | None
    """The folder of its run."""
    header: Mapping[str, Any]
    sections: dict[str, Any]
    """[dataset], [architecture] and [threat] of its recipe, as far as they are known."""

    @property
    def source(self) -> str:
        """What names its components."""
        return relative(self.run / RECIPE if self.run else self.file)

    @property
    def evaluations(self) -> Path:
        """The folder for results of `prunekit eval`."""
        return (self.run or self.file.parent) / EVALUATIONS

    @property
    def store(self) -> Path:
        """The store of its run; a file without a run has one among its evaluations."""
        if self.run is None:
            return self.evaluations / STORE
        above = [self.run.parent / STORE, self.run.parent.parent / STORE]
        return next((folder for folder in above if folder.is_dir()), above[0])


def find_model(path: Path) -> Path:
    """The model file of a run folder, or the file itself. Raises `UserError` if there is none."""
    if path.is_dir():
        file = path / MODEL
        if not file.is_file():
            runs = sorted(p.parent for p in path.glob(f"*/{MODEL}"))
            advice = f"; choose one of its runs, such as {relative(runs[0])}" if runs else ""
            raise UserError(f"there is no {MODEL} in {relative(path)}{advice}")
        return file
    if not path.exists():
        raise UserError(f"there is no run folder or file {relative(path)}")
    return path


def read_network(path: Path) -> Network:
    """What is known of the network in a run folder or file.

    Raises `UserError` if there is none, or if prunekit cannot read it.
    """
    file = find_model(path).absolute()
    if file.suffix != ".safetensors":
        raise UserError(
            f"{relative(file)} is not a model file of prunekit; make a run of it with: "
            "prunekit import"
        )
    header = read_header(file)
    known, run = header, None
    if file.name == MODEL and (file.parent / RUN).is_file():
        run = file.parent
        known = {**header, **read_toml(run / RECIPE)[0]}
    sections = {k: known[k] for k in ("dataset", "architecture", "threat") if known.get(k)}
    for key, value in sections.items():
        if not isinstance(value, dict) and not (isinstance(value, str) and key != "threat"):
            raise UserError(f"{relative((run or file.parent) / RECIPE)}: its {key} is {value!r}")
    return Network(file, run, header, sections)
