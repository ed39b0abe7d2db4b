"""Networks and data of the user's: from a Python file, or passed in by a Python program."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from prunekit import ArchitectureComponent, DatasetComponent, hookimpl, option

DETAILS = """\
This is the only component with which a recipe runs code: the code in the file. `build` names a
function or class in it. It is called with those of the following arguments that it accepts,
  shape     (C, H, W) of an image
  classes   the number of classes
and with all of kwargs. It returns an nn.Module from pixels (B, C, H, W) in [0, 1] to logits (B, K);
any normalization belongs inside the module. The module may have an attribute `leave_dense`, a list
of names of weights that prune stages leave dense.

A stage's hash includes the file and all modules and packages that it imports from its own folder,
directly or indirectly. It does not include packages installed elsewhere."""


@dataclass(frozen=True)
class PythonOptions:
    """Options of the architecture `python`."""

    file: Path = option(help="the Python file", exists=True)
    build: str = option("make", help="function or class in the file that makes the network")
    kwargs: dict[str, Any] = option({}, help="further arguments of this function or class")


@dataclass(frozen=True)
class GivenModelOptions:
    """Options of the architecture `given`, which `prunekit.run` writes, not the user."""

    name: str = option("", help="class of the network")
    content: str = option("", help="hash of the network's weights, source and values")
    unique: str | None = option(None, help="reason why no other call can have the same hash")


def find_imports(file: Path) -> list[Path]:
    """A Python file and the files it imports from its own folder, at any depth; nothing is run.

    A file that is not valid Python is returned alone, a missing one not at all.
    """
    if not file.is_file():
        return []
    finder = ModuleFinder(path=[str(file.parent)])
    try:
        finder.run_script(str(file))
    except (SyntaxError, ValueError):
        return [file]
    except ImportError:  # a relative import outside a package: it may be any file beside it
        return [file, *sorted(set(file.parent.glob("*.py")) - {file})]
    files = (getattr(module, "__file__", None) for module in finder.modules.values())
    found = {Path(name) for name in files if name}
    return [file, *sorted(found - {file})]


def find_files(options: PythonOptions) -> list[Path]:
    """The file, and the files that it imports from its folder."""
    return find_imports(options.file)


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
        missing=lambda options: "images of a Python program can only be used there: prunekit.run",
    )
