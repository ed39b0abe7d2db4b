"""Networks and data of one's own: from a Python file, or handed over by a Python program."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit import Component, find_imports, hookimpl, option

DETAILS = """\
This is the only place where a recipe runs code: that of the file. `build` names a function, or a
class, in it; it is called with the arguments among these that it takes,
  shape     (C, H, W) of an image
  classes   the number of classes
and with all of kwargs, and gives an nn.Module from pixels (B, C, H, W) in [0, 1] to logits (B, K).
A normalisation belongs inside. An attribute `leave_dense` of the module lists names of weights
that prune stages leave dense.

Part of a stage's hash are the file and what it imports from its own folder, modules and packages,
at any depth; of what is installed elsewhere nothing is."""


@dataclass(frozen=True)
class PythonOptions:
    file: Path = option(help="the Python file", exists=True)
    build: str = option("make", help="the function or class in it that makes the network")
    kwargs: dict[str, Any] = option({}, help="more arguments for it")


@dataclass(frozen=True)
class GivenModelOptions:
    """Written by `prunekit.run`, not by hand."""

    name: str = option("", help="its class")
    content: str = option("", help="hash of its weights, source and values")
    unique: str | None = option(None, help="why the hash cannot be that of another call")


def find_files(options: PythonOptions) -> list[Path]:
    """The file and what it imports from its folder."""
    return find_imports(options.file)


@hookimpl
def prunekit_architectures() -> Iterable[Component]:
    yield Component(
        name="python",
        summary="A network of your own: a function or class in a Python file",
        build="prunekit_python.loading:build_python",
        options=PythonOptions,
        details=DETAILS,
        files=find_files,
    )
    yield Component(
        name="given",
        summary="What Python gives to prunekit.run(model=)",
        build="prunekit_python.handed_over:build_model",
        sources=("prunekit_arrays",),
        options=GivenModelOptions,
    )


@hookimpl
def prunekit_datasets() -> Iterable[Component]:
    yield Component(
        name="given",
        summary="What Python gives to prunekit.run(data=)",
        build="prunekit_python.handed_over:build_data",
        sources=("prunekit_arrays",),
    )
