"""What decides the key of a stage, and the versions behind a result."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Mapping
from functools import cache
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

DECIDING = (
    "contracts.py",
    "data/",
    "engine/engine.py",
    "engine/evaluating.py",
    "engine/stages.py",
    "engine/work.py",
    "evaluation.py",
    "models/building.py",
    "pruning/",
    "recipe/stages.py",
    "store/checkpoint.py",
    "training/",
)
"""Folders and files of the core that decide what a stage computes: their source is in its key."""

SHOWING = (
    "__init__.py",
    "__main__.py",
    "api.py",
    "catalog/",
    "cli/",
    "engine/contract.py",
    "engine/eval_plan.py",
    "engine/handed_over.py",
    "engine/preview.py",
    "engine/running.py",
    "errors.py",
    "models/exporting.py",
    "models/failures.py",
    "models/identity.py",
    "models/importing.py",
    "models/stored.py",
    "recipe/document.py",
    "recipe/plan.py",
    "recipe/reduction.py",
    "recipe/resolver.py",
    "recipe/sections.py",
    "recipe/sweep.py",
    "recipe/toml_lines.py",
    "recipe/values.py",
    "report.py",
    "results/",
    "store/files.py",
    "store/keys.py",
    "store/layout.py",
    "store/networks.py",
    "store/records.py",
    "store/runs.py",
    "store/stages.py",
    "testing.py",
)
"""All others: they parse, store or show, and what a recipe resolves to is in the key by itself."""


def is_listed(file: str, parts: tuple[str, ...]) -> bool:
    """Whether a file of the core, or its folder, is among the parts.

    >>> is_listed("pruning/masks.py", ("pruning/",)), is_listed("api.py", ("pruning/",))
    (True, False)
    """
    return file in parts or f"{file.rpartition('/')[0]}/" in parts


def hash_stage(
    upstream: str, description: Mapping[str, Any], plugins: set[str], environment: Mapping[str, Any]
) -> str:
    """The key of a stage: 32 hexadecimal digits over all that decides its result.

    `plugins` are import names of packages, hashed by their source; so is the core.
    """
    content = {
        "upstream": upstream,
        "stage": description,
        "source": {name: hash_source(name) for name in sorted({"prunekit", *plugins})},
        "environment": environment,
    }
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@cache
def hash_source(package: str) -> str:
    """SHA-256 of a package's (or module's) Python files: an editable install has no version."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return "unknown"
    digest = hashlib.sha256()
    # A package has folders (one without __init__.py has no origin), a module is a file.
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [(f, folder) for folder in folders for f in sorted(folder.rglob("*.py"))]
    if not folders and spec.origin is not None:
        files = [(Path(spec.origin), Path(spec.origin).parent)]
    for file, folder in files:
        name = file.relative_to(folder).as_posix()
        # The `__init__` of a folder is a sentence.
        if package == "prunekit" and (file.stem == "__init__" or not is_listed(name, DECIDING)):
            continue
        digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def find_imports(file: Path) -> list[Path]:
    """A Python file, and what it imports from its own folder, at any depth; nothing is run.

    A file that is no Python is alone; whoever runs it says so. One that is missing gives nothing.
    """
    if not file.is_file():
        return []
    finder = ModuleFinder(path=[str(file.parent)])
    try:
        finder.run_script(str(file))
    except (SyntaxError, ValueError):
        return [file]
    except ImportError:  # from a package that it is not part of: then it may be any of them
        return [file, *sorted(set(file.parent.glob("*.py")) - {file})]
    files = (getattr(module, "__file__", None) for module in finder.modules.values())
    found = {Path(name) for name in files if name}
    return [file, *sorted(found - {file})]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def version_of(name: str) -> str:
    """Installed version of the distribution that has this import name."""
    for distribution in importlib.metadata.packages_distributions().get(name, [name]):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def find_versions() -> dict[str, str]:
    """Versions worth recording with a result."""
    names = ("prunekit", "torch", "torchvision", "timm", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names if _has(name)}
    return {"python": platform.python_version(), **versions}


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
