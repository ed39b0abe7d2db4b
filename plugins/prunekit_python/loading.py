"""Runs a Python file and calls its function that makes the network; errors name file and line."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
)
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import nn

from prunekit import suggest
from prunekit.contexts import ArchitectureContext
from prunekit.errors import UserError, explain_briefly, relative
from prunekit.evaluation import eval_mode
from prunekit_python import PythonOptions, find_files


def build_python(options: PythonOptions, context: ArchitectureContext) -> nn.Module:
    """The network that the file makes; it is called once, while it can import its modules.

    Raises `UserError` with file and line if it cannot be made, is not a module, or does not take
    images.
    """
    with _importing(options), _explaining(options.file):
        make = find_function(run_file(options.file), options)
        given = {"shape": context.shape, "classes": context.classes}
        known = {k: v for k, v in given.items() if _takes(make, k)}
        try:
            inspect.signature(make).bind(**known, **options.kwargs)
        except TypeError as error:
            arguments = ", ".join({**known, **options.kwargs}) or "no arguments"
            raise UserError(
                f"{_locate(options)}: {options.build} is called with {arguments}: {error}"
            ) from None
        model = make(**known, **options.kwargs)
        if not isinstance(model, nn.Module):
            raise UserError(
                f"{_locate(options)}: {options.build} has to return an nn.Module, but it returns a "
                f"value of type {type(model).__name__}"
            )
        with eval_mode(model), torch.no_grad():
            model(torch.zeros(2, *context.shape))
    return model


def run_file(file: Path) -> ModuleType:
    """Run the file again, as a module whose name cannot clash with that of another module."""
    module = ModuleType(f"prunekit_python_file_{file.stem}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses look up their annotations there
    exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
    return module


def find_function(module: ModuleType, options: PythonOptions) -> Callable[..., Any]:
    """The function or class that `build` names.

    Raises `UserError` with the names that exist if it is not there.
    """
    made: Callable[..., Any] | None = getattr(module, options.build, None)
    if callable(made):
        return made
    own = [
        name
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]
    raise UserError(
        f"{relative(options.file)} has no function or class {options.build!r}; "
        f"{suggest(options.build, own) if own else 'it defines none'}"
    )


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether the function accepts a keyword argument of this name, other than by `**kwargs`."""
    parameter = inspect.signature(function).parameters.get(name)
    allowed = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return parameter is not None and parameter.kind in allowed


class _Source(SourceFileLoader):
    """Compiles the source: compiled files beside it may hold anything."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


@dataclass(frozen=True)
class _Finder:
    """Finds modules and packages of these names in a folder, and what is in the packages."""

    folder: Path
    names: set[str]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in self.names:
            return None
        loaders = (ExtensionFileLoader, EXTENSION_SUFFIXES), (_Source, SOURCE_SUFFIXES)
        for folder in [self.folder] if path is None else path:
            if found := FileFinder(str(folder), *loaders).find_spec(name):
                return found
        return None


@contextmanager
def _importing(options: PythonOptions) -> Iterator[None]:
    """Inside, the modules that `find_files` found can be imported, and are run again when they are.

    An earlier import is not reused: the modules may have changed, or belong to another folder. The
    folder is not put on `sys.path`: what else lies in it would be run in place of modules that
    torch imports late, although no hash covers it.
    """
    folder = options.file.parent
    own = {f.relative_to(folder).parts[0].partition(".")[0] for f in find_files(options)[1:]}
    for name in [n for n in sys.modules if n.partition(".")[0] in own]:
        del sys.modules[name]
    importlib.invalidate_caches()
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    finder: Any = _Finder(folder, own)
    sys.meta_path.insert(0, finder)
    try:
        # What the file prints must not end up among prunekit's results on stdout.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.meta_path.remove(finder)
        sys.dont_write_bytecode = written


@contextmanager
def _explaining(file: Path) -> Iterator[None]:
    """Turns exceptions of the file's code into `UserError`, with file and line."""
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        where = relative(Path(error.filename)) if error.filename else relative(file)
        raise UserError(f"{where}:{error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        place = _find_line(error, file.parent) or relative(file)
        raise UserError(f"{place}: {explain_briefly(error)}") from error


def _find_line(error: BaseException, folder: Path) -> str:
    """The innermost frame in the folder as "FILE:LINE", or "" if there is none."""
    places = [
        f"{relative(Path(frame.f_code.co_filename))}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if Path(frame.f_code.co_filename).is_relative_to(folder)
    ]
    return places[-1] if places else ""


def _locate(options: PythonOptions) -> str:
    """The place of the function or class that `build` names, as "FILE:LINE"."""
    for node in ast.parse(options.file.read_bytes()).body:
        imported = [alias.asname or alias.name for alias in getattr(node, "names", [])]
        assigned = [getattr(target, "id", "") for target in getattr(node, "targets", [])]
        if options.build in (getattr(node, "name", ""), *imported, *assigned):
            return f"{relative(options.file)}:{node.lineno}"
    return relative(options.file)
