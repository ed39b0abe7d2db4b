"""Writing so that nothing is ever half there: beside, to the disk, then renamed."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prunekit.errors import RunError, UserError, relative


def write_bytes(path: Path, content: bytes) -> None:
    """Write the file or leave what was there. Raises `RunError` where the disk refuses."""
    with _replacing(path) as part, open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Arrays by name, compressed."""
    import numpy as np

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def read_json(path: Path) -> Any:
    """Read a file of ours. Raises `UserError` where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{relative(path)} is damaged ({error}); remove it") from None


def copy(source: Path, target: Path) -> None:
    """Copy a file in one step. No link: who changes the copy must not change the source."""
    with _replacing(target) as part:
        shutil.copyfile(source, part)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    part = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        part = Path(name)
        yield part
        # mkstemp makes files for the owner alone; ours are as any other.
        umask = os.umask(0)
        os.umask(umask)
        with suppress(OSError):
            part.chmod(0o666 & ~umask)
        part.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"no space left on the disk for {relative(path)}; what was there before is kept: "
                "free some and run the same command again"
            ) from error
        raise RunError(f"cannot write {relative(path)}: {error.strerror}") from error
    finally:
        if part is not None:
            with suppress(OSError):
                part.unlink()


def make_folder(path: Path) -> None:
    """Make a folder that a user named. Raises `UserError` where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to {relative(path)}: {error.strerror}; choose another folder with --out"
        ) from None
