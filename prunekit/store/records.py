"""What the `run.json` of a run says."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from prunekit.errors import UserError, printable, relative
from prunekit.reading import hash_file
from prunekit.recipe.toml.addresses import TOP_KEYS
from prunekit.recipe.toml.document import Recipe, load_recipe
from prunekit.report import Tell
from prunekit.store.files import is_held, read_json, relative_link, seal
from prunekit.store.layout import MODEL, PLAN, RECIPE, RECORDS, RUN, RUN_FORMAT, RUN_LOCK
from prunekit.store.metrics import read_metrics

T = TypeVar("T")


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run; `key` is the hash under which its result is stored."""

    name: str
    kind: str
    key: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """A run; `settings` maps addresses such as "prune.sparsity" to values."""

    folder: Path
    name: str
    status: str
    smoke: bool
    seed: int
    settings: Mapping[str, Any]
    stages: tuple[StageRecord, ...]
    error: str = ""
    number: int = 0
    """Its position in the recipe's sweep."""
    keys: tuple[str, ...] = ()
    """Keys of all its stages, also of those that have not been computed."""
    layers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Weight -> how many are "kept" of its "weights"."""
    sparse: str = "off"
    """`sparse` of [compute]."""


def open_recipe(path: Path, settings: Sequence[str] = (), *, trust: bool = False) -> Recipe:
    """`load_recipe`; that of a run folder runs nothing that this user did not run or `trust`."""
    recipe = load_recipe(path, settings)
    folders = {path.absolute().parent, path.resolve().parent}
    if any((folder / name).exists() for folder in folders for name in (RUN, PLAN)):
        # Every key: a sweep may bring those that the data lacks.
        recipe.foreign = dict.fromkeys(TOP_KEYS, "" if trust else relative(path))
    return recipe


def find_runs(folder: Path, tell: Tell | None = None) -> list[RunRecord]:
    """All runs in a folder and below, without hidden folders; those of a sweep in its order.

    A `run.json` that cannot be read is told, and its run left out. Raises `UserError` where nothing
    is left, where there is no `tell`, and if there is no such folder. With `tell`, also if there
    are no runs.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {relative(folder)}")
    runs, failures = [], []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if RUN in (*files, *folders):
            try:
                runs.append(read_run(Path(parent)))
            except UserError as error:
                if tell is None:
                    raise
                failures.append(error)
    if failures and not runs:
        raise failures[0]
    if tell is not None:
        if not runs:
            raise UserError(
                f"there are no runs in {relative(folder)}; name a folder that holds some"
            )
        for failure in failures:
            tell(f"left out: {printable(str(failure), keep='')}")
    return sorted(runs, key=lambda run: (run.folder.parent, run.number, run.folder))


def _read_sparse(compute: Any) -> str:
    """The setting `sparse` of [compute] that a run was made with."""
    told = compute.get("sparse") if isinstance(compute, dict) else None
    mode = str(told).partition(" ")[0]
    return mode if mode in ("auto", "on") else "off"


def read_run(folder: Path) -> RunRecord:
    """The run of a folder. Raises `UserError` if its `run.json` cannot be read."""
    advice = "run the recipe again"
    told = read_record(folder / RUN, advice)
    try:
        return RunRecord(
            folder=folder,
            name=_take(told, "name", str),
            status=_find_status(folder, _take(told, "status", str)),
            smoke=_take(told, "smoke", bool),
            seed=_take(told, "seed", int),
            settings=_take(told, "settings", dict),
            stages=tuple(
                StageRecord(
                    _take(s, "name", str),
                    _take(s, "kind", str),
                    _take(s, "key", str),
                    read_metrics(_take({"metrics": s.get("metrics") or {}}, "metrics", dict)),
                )
                for s in _take(told, "stages", list)
            ),
            error=(told.get("error") and _take(told, "error", str)) or "",
            number=_take({"number": 0, **told}, "number", int),
            keys=tuple(map(str, _take({"keys": [], **told}, "keys", list))),
            layers=_read_layers(told.get("sparsity") or {}),
            sparse=_read_sparse(told.get("compute")),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"is damaged ({error})"
        raise UserError(f"{relative(folder / RUN)} {reason}; {advice}") from error


def _find_status(folder: Path, told: str) -> str:
    """What a record says of its run; a process that was killed has left "running" in it."""
    if told != "running":
        return told
    return {True: told, False: "stopped", None: "running or stopped"}[is_held(folder / RUN_LOCK)]


def find_changed(folder: Path, *, done: bool = False) -> list[str]:
    """Names of files in a run's folder that are lost, or not what the run wrote.

    Nothing is known of a run that has not ended, or whose record has no hashes or cannot be read;
    of one that is known to be `done`, the record itself is damaged then.
    """
    try:
        told = read_record(folder / RUN, "")
        if done and read_run(folder).status != "done":
            return [RUN]
    except UserError:
        return [RUN] if done else []
    files = told.get("files")
    if told.get("status") == "running" or not isinstance(files, dict):
        return []
    paths = [folder / name for name in (MODEL, RECORDS, RECIPE) if name in files]
    changed = [p.name for p in paths if not p.is_file() or hash_file(p) != files[p.name]]
    reports = told.get("reports")
    names = [n for n in reports if isinstance(n, str)] if isinstance(reports, list) else []
    # What somebody else's record may name is in its folder.
    lost = [n for n in names if Path(n).name == n and not os.path.lexists(folder / n)]
    return [*changed, *lost, *([RUN] if told.get("sha256") != seal(told) else [])]


def find_blocking(folder: Path) -> list[str]:
    """Names of what stands in the place of a run's files and is no file: a folder, a pipe, ..."""
    paths = [folder / name for name in (RUN, MODEL, RECORDS, RECIPE)]
    return [p.name for p in paths if os.path.lexists(p) and not p.is_file()]


def tell_changed(folder: Path) -> list[str]:
    """A warning for each file of `find_changed`."""
    return [
        f"{relative_link(folder / name)} "
        + ("is not what the run wrote" if os.path.lexists(folder / name) else "is missing")
        for name in find_changed(folder)
    ]


def _take(table: Mapping[str, Any], key: str, wanted: type[T]) -> T:
    """A value of this type. Raises `KeyError`, or `TypeError` for one of another type."""
    value = table[key]
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise TypeError(f"{key} is {value!r}")
    return value


def _read_layers(sparsity: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    layers = _take({"layers": {}} | dict(sparsity), "layers", dict)
    return {
        name: {key: _take(counts, key, int) for key in ("kept", "weights")}
        for name, counts in layers.items()
    }


def read_record(path: Path, advice: str) -> dict[str, Any]:
    """The content of a `run.json` or `plan.json`.

    Raises `UserError`, which ends with the advice, if it is missing, damaged or of another format.
    """
    told = read_json(path, advice)
    if not isinstance(told, dict) or type(told.get("format")) is not int:
        raise UserError(f"{relative(path)} was not written by prunekit; {advice}")
    if told["format"] != RUN_FORMAT:
        way = "use the version that wrote it"
        way = f"run the recipe again, or {way}" if told["format"] < RUN_FORMAT else way
        raise UserError(
            f"{relative(path)} has format {told['format']}, and this prunekit reads "
            f"{RUN_FORMAT}; {way}"
        )
    return told
