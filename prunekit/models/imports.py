"""Which Python files a file depends on, found without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def find_imports(file: Path) -> list[Path]:
    """The file, and all modules and packages in its own folder that it imports, at any depth.

    A file that is missing or no Python is alone; whoever runs it says so.
    """
    found: dict[Path, None] = {}
    waiting = [file]
    while waiting:
        here = waiting.pop()
        if here in found or not here.is_file():
            continue
        found[here] = None
        for name in _imported(here):
            module, package = file.parent / f"{name}.py", file.parent / name
            waiting += [module] if module.is_file() else sorted(package.rglob("*.py"))
    return list(found)


def _imported(file: Path) -> Iterator[str]:
    """First words of what a file imports."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
