"""The methods that a component may have: those of the contracts of its kind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from prunekit.catalog.component import Use
from prunekit.contexts import Context
from prunekit.errors import suggest


def build(use: Use[Any], context: Context) -> Any:
    """Build a component, and check its methods."""
    built = use.build(context)
    if use.kind != "architecture":  # networks have many of their own
        check_methods(built, use.component.builds, *use.component.abilities)
    return built


def check_methods(built: object, *contracts: type) -> None:
    """Check that every public method belongs to one of the contracts, which are Protocols.

    One that no contract knows may be a misspelt one, and would never be called. Of methods that go
    together, such as `state_dict` and `load_state_dict`, none may be missing.

    Raises `AssertionError`.
    """
    known = {c: [name for name in vars(c) if not name.startswith("_")] for c in contracts}
    names = [name for several in known.values() for name in several]
    for cls, name in _own_methods(type(built)):
        assert name in names, (
            f"prunekit does not call {name}() of {cls.__name__}; {suggest(name, names)}; names of "
            "your own methods start with _"
        )
    for contract, several in known.items():
        missing = [name for name in several if not hasattr(built, name)]
        assert len(missing) in (0, len(several)), (
            f"{type(built).__name__} is only a part of {contract.__name__}: add {missing[0]}()"
        )


def _own_methods(cls: type) -> Iterator[tuple[type, str]]:
    """(class, name) of the public methods that classes of plugins define, not their fields."""
    libraries = {"torch", "prunekit", *sys.stdlib_module_names}
    for part in cls.__mro__:
        if part.__module__.partition(".")[0] not in libraries:
            fields = getattr(part, "__dataclass_fields__", {})
            for name, value in vars(part).items():
                is_method = isinstance(value, FunctionType | staticmethod | classmethod)
                if is_method and not name.startswith("_") and name not in fields:
                    yield part, name
