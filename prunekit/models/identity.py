"""A text for everything that decides what an nn.Module of a Python program does, and its hash."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import sys
import sysconfig
import uuid
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.models.imports import find_imports
from prunekit.store.keys import hash_file, version_of

SKIPPED = {"training", "_parameters", "_buffers", "_modules"}
"""What a module holds that decides nothing, or is described by itself."""


def identify(model: nn.Module) -> dict[str, Any]:
    """Options of the component "given": the network's class, and a hash of all that decides it.

    That is its weights and buffers, the values and hooks that its modules hold, the source of its
    classes and functions with what their files import from their own folder, and the versions of
    installed packages. Where something cannot be read the hash is never the same again, so that no
    stored stage is taken for another network's; `unique` says why.
    """
    digest = hashlib.sha256()
    unique = None
    try:
        for text in _describe_network(model):
            digest.update(f"{text}\n".encode())
    except _Unreadable as error:
        unique = str(error)
    if unique is not None:
        digest.update(uuid.uuid4().bytes)
    found = {"name": type(model).__qualname__, "content": digest.hexdigest()[:32]}
    return found if unique is None else {**found, "unique": unique}


class _Unreadable(Exception):
    """Something has no text that stands for it in every process."""


Inside = frozenset[int]
"""Identities of the values that hold the one that is described: none may hold itself."""


def _describe_network(model: nn.Module, inside: Inside = frozenset()) -> Iterator[str]:
    inside = _enter(model, inside)
    first: dict[Any, str] = {}
    classes: dict[type, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if (known := first.setdefault(module, name)) != name:
            yield f"{name} is {known}"
            continue
        cls = type(module)
        if cls not in classes:
            classes[cls] = _describe_class(cls, inside)
        yield f"{name} {classes[cls]}"
        for key, value in sorted(vars(module).items()):
            if key not in SKIPPED:
                yield f"{key}={_describe(value, f'{name}.{key}', inside)}"
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            path = f"{name}.{key}"
            known = path if tensor is None else first.setdefault(tensor, path)
            yield f"{path} is {known if known != path else _describe(tensor, path, inside)}"


def _enter(value: Any, inside: Inside) -> Inside:
    """Raises `_Unreadable` for a value that, through others, holds itself."""
    if id(value) in inside:
        raise _Unreadable("values of its modules contain each other")
    return inside | {id(value)}


def _describe(value: Any, path: str, inside: Inside) -> str:
    """A text that is the same for the same value, in any process. Raises `_Unreadable`."""
    plain = str | int | float | complex | bytes | Enum | torch.dtype | torch.device
    if value is None or isinstance(value, plain | torch.memory_format | torch.layout):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, Tensor):
        bits = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(bits).hexdigest()}"
    if isinstance(value, nn.Module):  # one that is no child: held in a list, say
        return "; ".join(_describe_network(value, inside))
    if isinstance(value, type):
        return _describe_class(value, inside)
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return _describe_function(value, inside)
    inside = _enter(value, inside)
    if isinstance(value, partial):
        return f"partial {_describe((value.func, value.args, value.keywords), path, inside)}"
    if isinstance(value, MethodType):
        owner = _describe_class(type(value.__self__), inside)
        return f"{owner} {_describe_function(value.__func__, inside)}"
    if isinstance(value, Mapping):
        # Hooks are keyed by a counter of the process.
        items = value.values() if "_hooks" in path else value.items()
        return f"{{{', '.join(_describe(item, path, inside) for item in items)}}}"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(_describe(item, path, inside) for item in value))}}}"
    if isinstance(value, list | tuple):
        return f"({', '.join(_describe(item, path, inside) for item in value)})"
    if dataclasses.is_dataclass(value):
        return f"{_describe_class(type(value), inside)} {_describe(vars(value), path, inside)}"
    raise _Unreadable(f"{path.strip('.')} is a {type(value).__name__}")


def _describe_class(cls: type, inside: Inside) -> str:
    texts = []
    for base in cls.__mro__:
        if base.__module__ != "builtins":
            texts.append(f"{base.__module__}.{base.__qualname__} {_describe_source(base)}")
        if not _is_installed(sys.modules.get(base.__module__)):
            # Beyond the source: what a factory bound, what a program set.
            for key, value in vars(base).items():
                value = getattr(value, "__func__", getattr(value, "fget", value))
                if isinstance(value, FunctionType):
                    texts.append(f"{key}={_describe_function(value, inside)}")
                elif isinstance(value, str | int | float) and not key.startswith("__"):
                    texts.append(f"{key}={value!r}")
    return ", ".join(texts)


def _describe_function(value: Any, inside: Inside) -> str:
    inside = _enter(value, inside)
    code = getattr(value, "__code__", None)
    # Functions without a name of their own are told apart by where they stand.
    name = f"{value.__module__}.{value.__qualname__}:{code.co_firstlineno if code else 0}"
    held: list[Any] = [getattr(value, "__defaults__", None), getattr(value, "__kwdefaults__", None)]
    if code is not None:
        bound = zip(code.co_freevars, value.__closure__ or (), strict=True)
        held += [cell.cell_contents for variable, cell in bound if variable != "__class__"]
    return f"{name} {_describe_source(value)} {_describe(held, name, inside)}"


def _describe_source(value: Any) -> str:
    """The version of the package, or a hash of the source. Raises `_Unreadable` without either."""
    module = value.__module__ or "builtins"
    package = module.partition(".")[0]
    if package in sys.stdlib_module_names and package != "__main__":
        return sys.version
    if _is_installed(sys.modules.get(package)):
        return version_of(package)
    try:
        file = Path(inspect.getfile(value))
    except (TypeError, OSError):
        file = Path()
    if not file.is_file():
        # A notebook: what the cell says is known, what it calls is not.
        raise _Unreadable(f"the source of {value.__qualname__} is not in a file")
    return hashlib.sha256("".join(map(hash_file, find_imports(file))).encode()).hexdigest()


def _is_installed(module: Any) -> bool:
    """Whether a module is of an installed package, or of Python itself: its version tells it."""
    file = getattr(module, "__file__", None)
    if file is None:
        return module is not None and module.__name__ in sys.builtin_module_names
    folders = (sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))
    return any(Path(file).is_relative_to(folder) for folder in folders)
