"""What a stranger's file may make run: nothing, unless it is trusted or was run before."""

from __future__ import annotations

import ast
import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.catalog.component import Use
from prunekit.catalog.containment import ask
from prunekit.errors import UserError
from prunekit.reading import hash_file
from prunekit.recipe.describing import describe

LOADERS = {
    *("importlib", "import_module", "__import__", "__path__", "imp", "pkgutil", "runpy", "site"),
    *("zipimport", "ctypes", "cffi", "exec", "hub", "cpp_extension", "load_library"),
    *("meta_path", "path_hooks"),
}
"""Names in Python code that may run files which none of its import statements names."""


@dataclass(frozen=True)
class Guard:
    """Stands before a component that runs a file's code, or fetches what a recipe names.

    `source` is the run folder's recipe or the model file that names the component. It is None where
    the user named it, and "" where the user said that the source is trusted.
    """

    source: str | None = None

    def __call__(self, use: Use[Any]) -> None:
        """Raise `UserError` unless the component may be built; remember what the user named."""
        if self.source == "" or not (risk := ask(use, "risks")):
            return
        mark = _identify(use)
        if self.source is None:
            _remember(mark)
        elif not mark or mark not in _read():
            raise UserError(
                f"{self.source} {risk}, which may do anything with your rights; if you trust "
                "it, give --trust (from Python: trust=True)"
            )


def _identify(use: Use[Any]) -> str:
    """A hash of what would run: of the files' content and names, and of the options.

    Names are relative to the folder of the first file, wherever that is. "" if the files may run
    others: those, which nobody knows before, may be different ones beside the same files.
    """
    named = [use.kind, use.component.build, describe(use.options, _hash)]
    files = ask(use, "files")
    if any(map(_loads_others, files)):
        return ""
    content = [named, [[os.path.relpath(file, files[0].parent), _hash(file)] for file in files]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _loads_others(file: Path) -> bool:
    """Whether Python code names a loader, or what may be `sys.path`."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes() if file.is_file() else b"")))
    except (SyntaxError, ValueError, RecursionError, OSError):
        return False  # no Python code that could run
    named, paths = set(), False
    for node in nodes:
        if isinstance(node, ast.alias):
            named |= {*node.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            named |= {*(node.module or "").split(".")}
            paths |= node.module == "sys"
        elif isinstance(node, ast.Name):
            named.add(node.id)
        elif isinstance(node, ast.Attribute):
            named.add(node.attr)
            paths |= node.attr == "path" and ast.unparse(node.value) != "os"
    return bool(LOADERS & named) or (paths and "sys" in named)


def _hash(file: Path) -> str:
    return hash_file(file) if file.is_file() else ""  # a pipe or a device may have no end


def _file() -> Path:
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return folder / "prunekit" / "ran"


def _read() -> set[str]:
    """Hashes of what recipes of this user ran."""
    # RuntimeError: this user has no home.
    with suppress(OSError, RuntimeError, ValueError):
        return set(_file().read_text(encoding="ascii").split())
    return set()


def _remember(mark: str) -> None:
    if not mark or mark in _read():
        return
    with suppress(OSError, RuntimeError):  # then the user is asked
        _file().parent.mkdir(parents=True, exist_ok=True)
        with open(_file(), "a", encoding="ascii") as file:
            file.write(f"{mark}\n")
