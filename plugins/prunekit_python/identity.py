"""The identity of a network from a Python program: a hash of all that decides what it does."""

from __future__ import annotations

import hashlib
import inspect
import io
import pickle
import sys
import sysconfig
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn, uint8

from prunekit import hash_file, version_of
from prunekit_python import find_imports


def identify(model: nn.Module) -> dict[str, Any]:
    """Options of the component "given": the network's class, and a hash of all that decides it.

    The hash covers weights, buffers, hooks and other values of its modules, the source of its
    classes and functions with what their files import from their own folder, and the versions of
    installed packages. If something cannot be read, the hash is random, so that the network never
    gets stored stages of another one; `unique` then says why.
    """
    found = {"name": type(model).__qualname__}
    text = io.BytesIO()
    try:
        _Describer(text).dump(model)
    # Methods of the pickled values may raise anything.
    except Exception as error:
        found["unique"] = " ".join(str(error).split())
        text = io.BytesIO(uuid.uuid4().bytes)
    return {**found, "content": hashlib.sha256(text.getvalue()).hexdigest()[:32]}


FAULTS = "pruning_faults"
"""What pruning notes of a layer that it looked at."""


class _Describer(pickle.Pickler):
    """Pickles a network with code represented by its source, so that every process agrees."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        # No memo: which equal values are the same object differs between processes.
        self.fast = True
        self._seen: dict[Any, int] = {}

    def persistent_id(self, value: Any) -> Any:
        """What represents a value that pickle would write by name or more than once."""
        # A class or function that its own closure names ends here too.
        if isinstance(value, Tensor | nn.Module | type | FunctionType):
            if value in self._seen:
                return self._seen[value]
            self._seen[value] = len(self._seen)
        if isinstance(value, Tensor):
            bits = value.detach().cpu().contiguous().flatten().view(uint8).numpy().tobytes()
            trained = isinstance(value, nn.Parameter) and value.requires_grad
            return str(value.dtype), tuple(value.shape), trained, hashlib.sha256(bits).digest()
        if isinstance(value, set | frozenset):
            return "set", sorted(value, key=repr)
        if isinstance(value, MethodType):
            return "method", value.__func__, value.__self__
        if isinstance(value, FunctionType):
            bound = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            held = [cell.cell_contents for name, cell in bound if name != "__class__"]
            # They tell lambdas apart that stand on one line.
            code = value.__code__.co_code, list(value.__code__.co_positions())
            return (*_describe(value), code, value.__defaults__, value.__kwdefaults__, held)
        if isinstance(value, BuiltinFunctionType):
            owner = value.__self__
            return (*_describe(value), None if isinstance(owner, ModuleType) else owner)
        if isinstance(value, type):
            bases = [base for base in value.__mro__ if not _is_installed(base.__module__)]
            return (*map(_describe, value.__mro__), *map(_list_attributes, bases))
        return None

    def reducer_override(self, value: Any) -> Any:
        """The values of a module, without its mode, and without the counters that key hooks."""
        if not isinstance(value, nn.Module):
            custom = {"__getstate__", "__reduce__", "__reduce_ex__", "__getnewargs_ex__"}
            for base in type(value).__mro__:
                if custom & vars(base).keys() and not _is_installed(base.__module__):
                    raise ValueError(f"a {type(value).__name__} hides its state from pickle")
            if callable(value) and isinstance(value.__reduce_ex__(5), str):
                return object, _describe(value)  # one that pickle would write by name
            return NotImplemented
        held = {k: v for k, v in vars(value).items() if k not in ("training", FAULTS)}
        for name, hooks in held.items():
            if "_hooks" in name and isinstance(hooks, Mapping):
                held[name] = list(hooks.values())
        return object, (type(value), held)


def _describe(code: Any) -> tuple[str, ...]:
    """Name, and version or hash of the source. Raises `ValueError` if there is neither."""
    module = code.__module__ or "builtins"
    if _is_installed(module):
        return module, code.__qualname__, version_of(module.partition(".")[0]), sys.version
    try:
        file = Path(inspect.getfile(inspect.unwrap(code)))
    except (TypeError, OSError):
        file = Path()
    if not file.is_file():
        # In a notebook, the source of a cell is known, but not that of what it calls.
        raise ValueError(f"the source of {code.__qualname__} is not in a file")
    return module, code.__qualname__, *map(hash_file, find_imports(file))


def _list_attributes(cls: type) -> list[Any]:
    """Attributes that the source of a class may not show, because a program set them."""
    values = {k: getattr(v, "__func__", getattr(v, "fget", v)) for k, v in vars(cls).items()}
    plain = FunctionType | str | int | float
    return [(k, v) for k, v in values.items() if isinstance(v, plain) and k != "__firstlineno__"]


def _is_installed(module: str) -> bool:
    """Whether a module is of Python or an installed package, and so identified by its version."""
    name = module.partition(".")[0]
    if name in sys.stdlib_module_names:
        return name != "__main__"
    # Modules inside an extension (torch._C._nn) have no file of their own.
    files = [getattr(sys.modules.get(known), "__file__", None) for known in (module, name)]
    file = files[0] or files[1]
    folders = (sysconfig.get_path(name) for name in ("purelib", "platlib"))
    return file is not None and any(Path(file).is_relative_to(folder) for folder in folders)
