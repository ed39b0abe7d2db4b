"""Networks and data of the user's: from a Python file, or passed in by a Python program."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES
from pathlib import Path
from typing import Any

from prunekit import ArchitectureComponent, DatasetComponent, hookimpl, option
from prunekit.errors import OptionError, UserError, relative

DETAILS = """\
This is the only component with which a recipe runs code: the code in the file. `build` names a
function or class in it. It is called with those of the following arguments that it accepts,
  shape     (C, H, W) of an image
  classes   the number of classes
and with all of kwargs. It returns an nn.Module from pixels (B, C, H, W) in [0, 1] to logits (B, K);
any normalization belongs inside the module. The module may have an attribute `leave_dense`, a list
of names of weights that prune stages leave dense.

A stage's hash includes the file and all modules and whole packages that it imports from its own
folder, directly or indirectly. It does not include packages installed elsewhere. Other modules in
the folder cannot be imported: write `import NAME` where the file has to see them.

A run folder or a model file that names a Python file runs it only if a recipe of yours ran the same
code before, or with --trust."""


@dataclass(frozen=True)
class GivenDataOptions:
    """Options of the data set `given`."""

    classes: int | None = option(
        None, help="number of classes; default: outputs of the given network", low=2
    )


CODE = (*EXTENSION_SUFFIXES, *SOURCE_SUFFIXES)
"""Endings of the files that can be imported."""

MOST_FOLDERS = 20_000
"""Most folders of a package; links among a few could lead to endless others."""


@dataclass(frozen=True)
class PythonOptions:
    """Options of the architecture `python`."""

    file: Path = option(help="the Python file", exists=True)
    build: str = option("make", help="function or class in the file that makes the network")
    kwargs: dict[str, Any] = option({}, help="further arguments of this function or class")

    def __post_init__(self) -> None:
        if self.file.is_dir():
            message = f"{relative(self.file)} is a folder; write the Python file in it"
            raise OptionError("file", message)


@dataclass(frozen=True)
class GivenModelOptions:
    """Options of the architecture `given`, which `prunekit.run` writes, not the user."""

    name: str = option("", help="class of the network")
    content: str = option("", help="hash of the network's weights, source and values")
    unique: str | None = option(None, help="reason why no other call can have the same hash")


def find_imports(file: Path) -> list[Path]:
    """A Python file and the files it imports from its own folder, at any depth; nothing is run.

    Of a package these are all its files: which of them it imports may be decided when it runs. A
    file that is not valid Python is returned alone, a missing one not at all.
    """
    if not file.is_file():
        return []
    found, todo = {file}, [file]
    while todo:
        fresh = set(_find_beside(file.parent, _list_imports(todo.pop()))) - found
        found |= fresh
        todo += fresh
    return [file, *sorted(found - {file})]


def _list_imports(file: Path) -> set[str]:
    """First parts of the names that a file imports; "" for what lies beside it."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError, RecursionError, OSError):
        return set()
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    named = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    names = [*plain, *("" if node.level else str(node.module) for node in named)]
    return {name.partition(".")[0] for name in names}


def _find_beside(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """The files of modules and packages of these names in a folder."""
    for name in names:
        if not name:  # a relative import outside a package: it may be any file beside it
            yield from folder.glob("*.py")
            continue
        yield from (f for suffix in CODE if (f := folder / f"{name}{suffix}").is_file())
        package = folder / name
        whole = any((package / f"__init__{suffix}").is_file() for suffix in CODE)
        if whole or (package.is_dir() and not _is_installed(name)):
            yield from (f for f in _walk(package) if f.name.endswith(CODE) and f.is_file())


def _walk(package: Path) -> Iterator[Path]:
    """All that is below a folder, as an import finds it: through links too.

    A link back to a folder that it is in is followed once: deeper, everything has been listed.
    Raises `UserError` for more folders than a package has.
    """
    todo: list[tuple[Path, frozenset[str]]] = [(package, frozenset())]
    for folder, above in todo:
        if len(todo) > MOST_FOLDERS:
            told = f"{relative(package)} holds over {MOST_FOLDERS:,} folders, through links perhaps"
            raise UserError(f"{told}; a package that a Python file imports may not")
        real = os.path.realpath(folder)
        with suppress(OSError):  # what cannot be listed, or may be endless, cannot be imported
            for path in folder.iterdir():
                yield path
                if path.is_dir() and real not in above:
                    todo.append((path, above | {real}))


def _is_installed(name: str) -> bool:
    """Whether there is a module or package that stands before a folder without `__init__.py`."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # "__main__"
        return True
    return spec is not None and spec.origin is not None


def find_files(options: PythonOptions) -> list[Path]:
    """The file, and the files that it imports from its folder."""
    return find_imports(options.file)


def tell_risk(options: PythonOptions) -> str:
    """What a stranger's file must not cause."""
    return f"would run the Python file {relative(options.file)}"


@hookimpl
def prunekit_architectures() -> Iterable[ArchitectureComponent]:
    """Declare the architectures `python` and `given`."""
    yield ArchitectureComponent(
        name="python",
        summary="A network of your own: a function or class in a Python file",
        build="prunekit_python.loading:build_python",
        options=PythonOptions,
        details=DETAILS,
        files=find_files,
        risks=tell_risk,
    )
    yield ArchitectureComponent(
        name="given",
        summary="The network passed to prunekit.run(model=...) in Python",
        build="prunekit_python.handed_over:build_model",
        identify="prunekit_python.identity:identify",
        sources=("prunekit_arrays",),
        options=GivenModelOptions,
    )


@hookimpl
def prunekit_datasets() -> Iterable[DatasetComponent]:
    """Declare the data set `given`."""
    yield DatasetComponent(
        name="given",
        summary="The images and labels passed to prunekit.run(data=...) in Python",
        build="prunekit_python.handed_over:build_data",
        sources=("prunekit_arrays",),
        options=GivenDataOptions,
        missing=lambda options: "images of a Python program can only be used there: prunekit.run",
    )
