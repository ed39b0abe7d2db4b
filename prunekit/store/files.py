"""Files that are never half-written: written beside the old one, synced, then renamed."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from prunekit.errors import RunError, UserError, explain_briefly, relative
from prunekit.reading import LARGEST_JSON, parse_json, read_arrays, read_bytes

T = TypeVar("T")


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file, or leave the old one as it is. Raises `RunError` if it cannot be written."""
    with _replacing(path) as part, open(part, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, content: str) -> None:
    """Write a text file in UTF-8. Raises `RunError` as `write_bytes` does."""
    try:
        write_bytes(path, content.encode())
    except UnicodeEncodeError as error:
        raise RunError(
            f"cannot write {relative(path)}: it names a file whose name is not UTF-8; rename that"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file. Raises `ValueError` for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def seal(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object without its own key "sha256", where it is kept."""
    told = {k: v for k, v in content.items() if k != "sha256"}
    # Once through JSON: keys that are numbers are sorted as text afterwards.
    text = json.dumps(json.loads(json.dumps(told)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays by name, compressed."""
    import numpy as np

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def read_npz(path: Path) -> dict[str, Any]:
    """Read arrays by name; pickled ones are refused. Raises `UserError` if one cannot be read."""
    try:
        return dict(read_arrays(path))
    except ValueError as error:
        raise UserError(f"{relative(path)} cannot be read as an .npz file ({error})") from None


def read_json(path: Path, advice: str = "remove it") -> Any:
    """Read a JSON file. Raises `UserError` with the advice if it is missing or damaged."""
    try:
        return parse_json(read_bytes(path, LARGEST_JSON))
    except ValueError as error:
        raise UserError(f"{relative(path)} cannot be read ({error}); {advice}") from None
    except UserError as error:
        raise UserError(f"{error}; {advice}") from None


def read_kept(path: Path, make: Callable[[Any], T]) -> T | None:
    """What `make` makes of a file of intermediate results: of JSON, or the arrays of an `.npz`.

    None if there is none, and, with a warning, if it is damaged or `make` raises: what was kept
    has to be computed again then.
    """
    if not path.exists():
        return None
    try:
        if path.suffix == ".npz":
            return make(read_arrays(path))
        return make(parse_json(read_bytes(path, LARGEST_JSON)))
    except Exception as error:  # `make` may raise anything, given garbage
        reason = f"{path.name} is damaged ({explain_briefly(error)})"
        warnings.warn(f"{reason}: what was kept there is computed again", stacklevel=2)
        return None


def copy(source: Path, target: Path) -> None:
    """Copy a file in one step. It is not linked: a change of the copy must not reach the source."""
    with _replacing(target) as part:
        shutil.copyfile(source, part)


def find_partial(folder: Path) -> list[Path]:
    """Files that a killed process was writing in a folder."""
    # As `tempfile` names them in `_replacing`.
    return [p for p in folder.glob(".*.*") if re.fullmatch(r"\..+\.[a-z0-9_]{8}", p.name)]


def is_held(lock: Path) -> bool | None:
    """Whether a process holds the lock of this file; None where that cannot be known."""
    try:
        import fcntl
    except ImportError:  # on Windows
        return None
    try:
        handle = os.open(lock, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


def set_aside(path: Path) -> Path:
    """Rename what is damaged; its new path, which ends with ".damaged1" or the next free number.

    Raises `RunError` if that is impossible.
    """
    target = next_free(path, ".damaged")
    try:
        path.rename(target)
    except OSError as error:
        raise RunError(
            f"{relative(path)} is damaged and cannot be moved aside: {error.strerror}"
        ) from None
    return target


def next_free(path: Path, ending: str) -> Path:
    """The path with the ending and the first number that is not taken."""
    names = (path.with_name(f"{path.name}{ending}{n}") for n in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    part = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        part = Path(name)
        yield part
        # mkstemp makes files that only their owner can read.
        umask = os.umask(0)
        os.umask(umask)
        with suppress(OSError):
            part.chmod(0o666 & ~umask)
        part.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"no space left on the disk for {relative(path)}; what was there before is kept: "
                "free some space and run the same command again"
            ) from error
        raise RunError(f"cannot write {relative(path)}: {error.strerror}") from error
    finally:
        if part is not None:
            with suppress(OSError):
                part.unlink()


OTHER_FOLDER = "choose another folder with --out"
OTHER_STORE = "choose another folder with --store"


def make_inner(path: Path, advice: str = OTHER_FOLDER) -> None:
    """Make a folder in one of prunekit's. Raises `UserError` if it is a link: it may lead anywhere,
    and what lies there would be overwritten."""
    refuse_link(path)
    make_folder(path, advice)


def refuse_link(path: Path) -> None:
    """Raise `UserError` if a path that prunekit is about to write to is a link."""
    if path.is_symlink():
        raise UserError(f"{relative_link(path)} is a link, which is not written through; remove it")


def relative_link(path: Path) -> str:
    """`relative`, without following the path's last part."""
    return str(Path(relative(path.parent)) / path.name)


def make_folder(path: Path, advice: str = OTHER_FOLDER) -> None:
    """Make a folder that a user named. Raises `UserError` with the advice if no files can be
    written to it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {relative(path)}: {error.strerror}; {advice}") from None
