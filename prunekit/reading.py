"""The reader of every file that a user can hand over: regular, of limited size, plain data.

A recipe, a record or a header may come from anybody. Nothing is read from a device or a pipe, which
may never end, and nothing that could not be written back: numbers are finite and of 64 bits, text
is Unicode, tables are at most `DEEPEST` levels deep.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.errors import UserError, relative

if TYPE_CHECKING:
    import numpy as np

DEEPEST = 32
"""Most levels of tables and lists within each other."""
LARGEST_TEXT = 2**20
"""Most bytes of what people write: recipes and Python files."""
LARGEST_JSON = 2**26
"""Most bytes of what programs write as JSON."""
LARGEST_ARRAYS = 2**28
"""Most bytes of the arrays in a file, however small the file is."""
MOST_INFLATED = 100
"""Most times that larger arrays may exceed their file; real images compress by less than 10."""
TYPES = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def name_type(path: Path) -> str:
    """What is at a path that is no regular file: "a folder", "a pipe", "a device", ...; or "".

    Raises `OSError` if there is nothing, or if it may not be looked at.
    """
    mode = os.stat(path).st_mode
    return "" if stat.S_ISREG(mode) else TYPES.get(stat.S_IFMT(mode), "no file")


def check_file(path: Path, largest: float = math.inf) -> None:
    """Raise `UserError` unless this is a regular file of at most `largest` bytes."""
    try:
        found = name_type(path)
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise UserError(f"there is no file {relative(path)}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {relative(path)}: {reason}") from None
    if found:
        advice = "; name a file in it" if found == TYPES[stat.S_IFDIR] else ", not a file"
        raise UserError(f"{relative(path)} is {found}{advice}")
    if size > largest:
        raise _too_large(path, largest)


def read_bytes(path: Path, largest: int) -> bytes:
    """The content of a file. Raises `UserError` as `check_file` does."""
    check_file(path, largest)
    try:
        with path.open("rb") as file:
            # Files of /proc say that they are empty.
            content = file.read(largest + 1)
    except OSError as error:
        raise UserError(f"cannot read {relative(path)}: {error.strerror}") from None
    if len(content) > largest:
        raise _too_large(path, largest)
    return content


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _too_large(path: Path, largest: float) -> UserError:
    return UserError(f"{relative(path)} is too large: at most {largest / 2**20:g} MB are read")


BRACKET = re.compile(r"""[\[\]{}]|"(?:[^"\\]|\\.)*+""")
"""What opens and closes lists and tables in JSON; strings are taken whole."""


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """Plain data from JSON. Raises `ValueError`, whose message says what is wrong and where.

    Without `finite`, it may hold NaN and infinity, as Python writes them.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    depth = 0
    # Counted first: how deep json's own recursion may go is not for it to say.
    for mark in BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark[0], 0)
        if depth > 10 * DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    value = json.loads(text, object_pairs_hook=_read_table)
    if fault := find_fault(value, finite=finite):
        path, message = fault
        raise ValueError(f"{'.'.join(map(str, path)) or 'it'} {message}")
    return value


def _read_table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key {twice!r} twice")
    return table


def find_fault(value: Any, *, finite: bool = True) -> tuple[tuple[str | int, ...], str] | None:
    """(key path, what is wrong there) of the first value that is no plain data; None if all is."""
    todo: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while todo:
        path, value = todo.pop()
        if len(path) > DEEPEST:
            return path[:4], f"is nested more than {DEEPEST} levels deep"
        if isinstance(value, dict):
            for key in value:
                if fault := _find_fault(key, finite):
                    return path, f"has the key {key!r}, which {fault}"
            todo += [((*path, key), inner) for key, inner in reversed(value.items())]
        elif isinstance(value, list):
            todo += [((*path, n), value[n]) for n in reversed(range(len(value)))]
        elif fault := _find_fault(value, finite):
            return path, fault
    return None


def _find_fault(value: Any, finite: bool) -> str:
    """What is wrong with a single value; "" if nothing is."""
    if isinstance(value, str):
        if "\0" in value:
            return "holds the character NUL"
        # Half of a pair of surrogates: text that cannot be written.
        surrogate = not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value)
        return "is not Unicode" if surrogate else ""
    if isinstance(value, float):
        return "" if math.isfinite(value) or not finite else f"is {value}, which is not finite"
    if isinstance(value, int):
        return "" if abs(value) < 2**64 else "is a number that does not fit into 64 bits"
    return "" if value is None else f"is a {type(value).__name__}; write it as text, in quotes"


class ObjectArrayError(ValueError):
    """An array of Python objects, which would have to be unpickled. The message is its name."""


def read_arrays(path: Path, wanted: Container[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file by name, or those that are wanted. Nothing is unpickled.

    What an array would take is looked up before it is read: the file may be a few kilobytes that
    inflate to all memory there is.

    Raises `UserError` as `check_file` does, and `ValueError`, which says why, for all else.
    """
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {e.filename.removesuffix(".npy"): e for e in archive.infolist()}
            entries = {k: e for k, e in entries.items() if wanted is None or k in wanted}
            _check_sizes(entries.values(), path.stat().st_size)
            return {name: _read_array(archive, entry, name) for name, entry in entries.items()}
    except ObjectArrayError:
        raise
    # What zipfile, zlib and numpy raise for files that are cut off, damaged, encrypted or forged.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, zipfile.BadZipFile):
            reason = "it is not a complete archive"
        raise ValueError(reason) from error


def _check_sizes(entries: Iterable[zipfile.ZipInfo], size: int) -> None:
    whole = sum(entry.file_size for entry in entries)
    if whole > max(LARGEST_ARRAYS, MOST_INFLATED * size):
        raise ValueError(
            f"its arrays would take {whole / 2**20:,.0f} MB, and at most {MOST_INFLATED} times the "
            f"size of the file is read, or {LARGEST_ARRAYS / 2**20:g} MB"
        )


def _read_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> np.ndarray:
    """An array that is as large as its header says; raises whatever is wrong with it."""
    from numpy.lib import format as npy

    with archive.open(entry) as file:
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        version = npy.read_magic(file)
        if version not in readers:
            raise ValueError(f"its {name} has an unknown format {version}")
        shape, _, dtype = readers[version](file)
        if dtype.hasobject:
            raise ObjectArrayError(name)
        if math.prod(shape) * dtype.itemsize != entry.file_size - file.tell():
            raise ValueError(f"its {name} is not as large as it says")
        file.seek(0)
        array: np.ndarray = npy.read_array(file, allow_pickle=False)
    return array
