"""Networks and data that a Python program hands over, in place of components that it names."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import sys
import sysconfig
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.builtin import GivenModelOptions
from prunekit.component import NoOptions, Use
from prunekit.contracts import Context, Data
from prunekit.errors import DataMissingError, UserError
from prunekit.imports import find_imports
from prunekit.npz import KEYS, Channels, to_data, to_split
from prunekit.store import hash_file, version_of


@dataclass(frozen=True)
class Given(Use[Any]):
    """The component "given", with what was given in its place."""

    value: Any = None

    def build(self, context: Context) -> Any:
        """The data; of a network a copy, so that the caller's own stays as it is."""
        return copy.deepcopy(self.value) if isinstance(self.value, nn.Module) else self.value


def replace(use: Use[Any], value: Any) -> Given:
    """What a recipe names as "given", with the value."""
    return Given(**{f.name: getattr(use, f.name) for f in dataclasses.fields(use)}, value=value)


def build_model(options: GivenModelOptions, context: Context) -> nn.Module:
    """Where nothing was given. Raises `UserError`."""
    raise UserError(
        f"the network ({options.name}) came from a Python program; call prunekit.run or "
        "prunekit.load there with model=..., or name another architecture"
    )


def build_data(options: NoOptions, context: Context) -> Data:
    """Where nothing was given. Raises `DataMissingError`."""
    raise DataMissingError(
        "the images came from a Python program; call prunekit.run there with data=..., or name "
        "another data set"
    )


# Data


def read_data(data: Any) -> Data:
    """A data set of arrays: (x_train, y_train, x_test, y_test), or a `Data` as it is.

    Images are (N, C, H, W) where they are tensors, (N, H, W) or (N, H, W, C) where they are numpy
    arrays; pixels are integers 0 to 255 or floats in [0, 1] that are multiples of 1/255.

    Raises `UserError` for anything else.
    """
    if isinstance(data, Data):
        return data
    if not isinstance(data, Sequence) or len(data) != len(KEYS):
        raise _wants(f"({', '.join(KEYS)})", data)
    arrays = dict(zip(KEYS, map(_to_array, data), strict=True))
    return to_data(arrays, "data", channels=_find_channels(data))


def read_images(data: Any, classes: int | None = None) -> Data:
    """The same where only some images are looked at: a pair (x, y) serves as well.

    `classes` is their number where a network tells; without it the largest label does. Raises
    `UserError` as `read_data` does, and for a label beyond the classes.
    """
    if isinstance(data, Data) or (isinstance(data, Sequence) and len(data) == len(KEYS)):
        found = read_data(data)
    elif isinstance(data, Sequence) and len(data) == 2:
        arrays = dict(zip("xy", map(_to_array, data), strict=True))
        part = to_split(arrays, ("x", "y"), "data", _find_channels(data))
        _, c, h, w = part.images.shape
        found = Data(part, part, (c, h, w), int(part.labels.max()) + 1)
    else:
        raise _wants(f"(x, y), or ({', '.join(KEYS)})", data)
    largest = int(found.test.labels.max())
    if classes is not None and largest >= classes:
        raise UserError(
            f"data: there is a label {largest}, and the network has {classes} classes: 0 to "
            f"{classes - 1}"
        )
    return found if classes is None else dataclasses.replace(found, classes=classes)


def _wants(wanted: str, data: Any) -> UserError:
    size = f" of {len(data)}" if isinstance(data, Sequence) else ""
    return UserError(
        f"data is {wanted}, or a prunekit.contracts.Data; got: {type(data).__name__}{size}"
    )


def _find_channels(data: Sequence[Any]) -> Channels:
    return "first" if isinstance(data[0], Tensor) else "last"


def _to_array(values: Any) -> Any:
    import numpy as np

    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


# Networks


def identify(model: nn.Module) -> dict[str, Any]:
    """Options of the component "given": the network's class, and a hash of all that decides it.

    That is its weights, the source of its classes and of what the files of these import from their
    own folder, the versions of installed packages, and the values that its modules hold. Where one
    of them cannot be read the hash is never the same again, so that no stored stage is taken for
    another network's; `unique` says why.
    """
    digest = hashlib.sha256()
    unique = ""
    try:
        for text in _describe_network(model):
            digest.update(f"{text}\n".encode())
    except _Unreadable as error:
        unique = str(error)
        digest.update(uuid.uuid4().bytes)
    return {"name": type(model).__qualname__, "content": digest.hexdigest()[:32]} | (
        {"unique": unique} if unique else {}
    )


SKIPPED = {"training", "_parameters", "_buffers", "_modules"}
"""What a module holds that decides nothing, or is hashed by itself."""


class _Unreadable(Exception):
    """Something has no text that stands for it in every process."""


def _describe_network(model: nn.Module) -> Iterator[str]:
    first: dict[Any, str] = {}
    classes: dict[type, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if (known := first.setdefault(module, name)) != name:
            yield f"{name} is {known}"
            continue
        cls = type(module)
        if cls not in classes:
            classes[cls] = _describe_class(cls)
        yield f"{name} {classes[cls]}"
        for key, value in sorted(vars(module).items()):
            if key not in SKIPPED:
                yield f"{key}={_describe(value, (name, key))}"
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            path = f"{name}.{key}"
            known = first.setdefault(tensor, path) if tensor is not None else path
            yield f"{path} is {known if known != path else _describe(tensor, (name, key))}"


def _describe(value: Any, path: tuple[str, ...]) -> str:
    """A text that is the same for the same value, in any process. Raises `_Unreadable`."""
    if value is None or isinstance(value, str | int | float | complex | bytes | Enum):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, torch.dtype | torch.device | torch.memory_format | torch.layout):
        return repr(value)
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        content = hashlib.sha256(plain.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        return f"{plain.dtype} {tuple(plain.shape)} {content}"
    if isinstance(value, nn.Module):  # one that is no child: held in a list, say
        return str(identify(value))
    if isinstance(value, type):
        return _describe_class(value)
    if isinstance(value, partial):
        return f"partial {_describe((value.func, value.args, value.keywords), path)}"
    if isinstance(value, MethodType):
        return f"method {value.__name__} of {_describe_class(type(value.__self__))}"
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return _describe_function(value, path)
    if isinstance(value, Mapping):
        # Hooks are keyed by a counter of the process.
        items = value.values() if "_hooks" in path[-1] else value.items()
        return f"{{{', '.join(_describe(i, path) for i in items)}}}"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(_describe(i, path) for i in value))}}}"
    if isinstance(value, list | tuple):
        return f"({', '.join(_describe(i, path) for i in value)})"
    if dataclasses.is_dataclass(value):
        return f"{_describe_class(type(value))} {_describe(vars(value), path)}"
    raise _Unreadable(f"{'.'.join(filter(None, path))} is a {type(value).__name__}")


def _describe_function(value: Any, path: tuple[str, ...]) -> str:
    held = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    held += [*(getattr(value, "__defaults__", None) or ())]
    code = getattr(value, "__code__", None)
    # Functions without a name of their own are told apart by where they stand.
    line = code.co_firstlineno if code is not None else 0
    name = f"{value.__module__}.{value.__qualname__}:{line}"
    return f"{name} {_describe_source(value)} {_describe(held, path)}"


def _describe_class(cls: type) -> str:
    bases = [c for c in cls.__mro__ if c.__module__ != "builtins"]
    return ", ".join(f"{c.__module__}.{c.__qualname__} {_describe_source(c)}" for c in bases)


def _describe_source(value: Any) -> str:
    """The version of the package, or a hash of the source. Raises `_Unreadable` without either."""
    module = value.__module__ or "builtins"
    package = module.partition(".")[0]
    if package in sys.stdlib_module_names and package != "__main__":
        return sys.version
    try:
        file = Path(inspect.getfile(value))
    except (TypeError, OSError):
        built = getattr(sys.modules.get(package), "__file__", None)
        if built and _is_installed(Path(built)):  # written in C
            return version_of(package)
        raise _Unreadable(f"the source of {value.__qualname__} is not in a file") from None
    if _is_installed(file):
        return version_of(package)
    if file.is_file():
        return hashlib.sha256("".join(map(hash_file, find_imports(file))).encode()).hexdigest()
    # A notebook: what the cell says is known, what it calls is not.
    raise _Unreadable(f"the source of {value.__qualname__} is not in a file")


def _is_installed(file: Path) -> bool:
    folders = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    return any(file.is_relative_to(folder) for folder in folders)
