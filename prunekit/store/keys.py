"""The key of a stage: a hash of everything that decides its result."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

DECIDING = (
    "contexts.py",
    "contracts.py",
    "data/",
    "engine/engine.py",
    "engine/evaluating.py",
    "engine/others.py",
    "engine/stages.py",
    "engine/validating.py",
    "engine/watched.py",
    "engine/work.py",
    "evaluation.py",
    "graph/",
    "judging.py",
    "models/building.py",
    "pruning/",
    "recipe/stages.py",
    "steps.py",
    "store/tensors/checkpoint.py",
    "store/tensors/pieces.py",
    "store/tensors/states.py",
    "store/tensors/weights.py",
    "training/",
)
"""Folders and files of the core that decide what a stage computes: their source is in its key.

The others parse, store or show, and what a recipe resolves to is in the key anyway. The test of
this list names them, so that a new file cannot be forgotten.
"""


def hash_stage(
    upstream: str, description: Mapping[str, Any], plugins: set[str], environment: Mapping[str, Any]
) -> str:
    """The key of a stage, 32 hexadecimal digits.

    `upstream` is the key of the stage before it. `plugins` are import names of packages, whose
    source is in the key like that of the core.
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
    """SHA-256 of the Python files of a package or module; "unknown" if there is none.

    The version would not do: it stays the same while an editable install changes.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        return "unknown"
    digest = hashlib.sha256()
    # A package has folders (without __init__.py it has no origin), a module is a file.
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [(f, folder) for folder in folders for f in sorted(folder.rglob("*.py"))]
    if not folders and spec.origin is not None:
        files = [(Path(spec.origin), Path(spec.origin).parent)]
    for file, folder in files:
        name = file.relative_to(folder).as_posix()
        # An `__init__` of the core holds only a docstring.
        if package == "prunekit" and (file.stem == "__init__" or not name.startswith(DECIDING)):
            continue
        digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def version_of(name: str) -> str:
    """Installed version of the distribution with this import name; "unknown" if there is none.

    Nothing is imported. A package that lies before the installed one on the path is unknown too.
    """
    spec = importlib.util.find_spec(name)
    for known in importlib.metadata.packages_distributions().get(name, [name]):
        try:
            distribution = importlib.metadata.distribution(known)
        except importlib.metadata.PackageNotFoundError:
            continue
        place = Path(str(distribution.locate_file(name)))
        origin = Path(spec.origin) if spec and spec.origin else place
        if not place.exists() or origin.is_relative_to(place):
            return distribution.version
    return "unknown"


def used_version(name: str) -> str:
    """What an imported package calls its version, otherwise `version_of`."""
    return str(getattr(sys.modules.get(name), "__version__", None) or version_of(name))


def find_versions() -> dict[str, str]:
    """Versions of Python and of the main packages, to be recorded with a result."""
    names = ("prunekit", "torch", "torchvision", "timm", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **versions}
