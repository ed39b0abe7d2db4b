"""The contract test: what every component must do, built-in or third-party.

# tests/test_contract.py of a plugin
from prunekit.testing import check_component, find_components

def test_contract():
    for component in find_components("my_plugin"):
        check_component(component)
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunekit.catalog.component import Component, Threatened, Use
from prunekit.catalog.kinds import KINDS
from prunekit.catalog.registry import Entry, Registry, list_declared, load_registry
from prunekit.checks.components import CHECKS
from prunekit.checks.examples import (
    SHAPE,
    example_context,
    example_events,
    tiny_batches,
    tiny_network,
)
from prunekit.contracts import Threat
from prunekit.errors import Place, RecipeError
from prunekit.recipe.describing import field_types
from prunekit.recipe.reduction import reduce_options
from prunekit.recipe.resolver import Resolver
from prunekit.recipe.toml.sections import ArchitectureOptions, DataOptions

__all__ = [
    "check_component",
    "check_declaration",
    "example_context",
    "example_events",
    "find_components",
    "resolve",
    "tiny_batches",
    "tiny_network",
]

TAKEN = {
    "dataset": {f.name for f in dataclasses.fields(DataOptions)},
    "architecture": {f.name for f in dataclasses.fields(ArchitectureOptions)},
    "evaluator": {"name"},
}
"""Keys of a component's table that belong to the core."""


def find_components(module: str) -> list[Component]:
    """All components that a plugin's module declares."""
    found = list_declared(importlib.import_module(module), module)
    assert found, f"{module} declares no component"
    return found


def check_component(
    component: Component,
    options: Mapping[str, Any] | None = None,
    *,
    shape: tuple[int, int, int] = SHAPE,
    folder: Path | None = None,
) -> None:
    """Check that a component keeps the contract of its kind.

    `options` is its table in a recipe (required options must be there), `shape` the images that an
    architecture is tried with, `folder` where relative paths start. Attack steps and the like are
    cut to what `option(smoke=)` says.

    Raises `AssertionError` that says which promise is broken. A data set whose files are not there
    is checked as far as its declaration goes.
    """
    check_declaration(component)
    use = resolve(component, options or {}, folder or Path.cwd())
    kind, check = CHECKS[component.kind]
    images = {"shape": shape} if component.kind == "architecture" else {}
    context = example_context(kind, folder=folder or Path.cwd(), **images)
    try:
        check(dataclasses.replace(use, options=reduce_options(use.options)), context)
    except AssertionError as broken:
        raise AssertionError(f"{component.name}: {broken}") from None
    except Exception as error:
        raise AssertionError(f"{component.name} raises {type(error).__name__}: {error}") from error


def check_declaration(component: Component) -> None:
    """Check the declaration alone: names, options, the function that builds it."""
    name = component.name
    kinds = ", ".join(declaration.__name__ for declaration in KINDS.values())
    assert isinstance(component, tuple(KINDS.values())), f"{name}: declare it as one of {kinds}"
    taken = TAKEN.get(component.kind, ())
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name), f"{name!r} is not kebab-case"
    assert component.summary, f"{name}: no summary"
    assert "\n" not in component.summary, f"{name}: the summary is more than one line"
    assert dataclasses.is_dataclass(component.options), f"{name}: options are no dataclass"
    parameters = vars(component.options)["__dataclass_params__"]
    assert parameters.frozen, f"{name}: options are not frozen"
    keys = field_types(component.options).keys()
    threatened = issubclass(component.options, Threatened) or not keys >= {"eps", "norm"}
    assert threatened, f"{name}: options with eps and norm derive from prunekit.Threatened"
    for field in dataclasses.fields(component.options):
        assert field.metadata.get("help"), f"{name}.{field.name}: declare it with option(help=...)"
        assert field.name not in taken, f"{name}.{field.name} is a key of the core"
    for package in component.sources:
        assert "." not in package, f"{name}: sources names top-level packages, got {package!r}"
        assert importlib.util.find_spec(package), f"{name}: there is no package {package!r}"
    module, colon, function = component.build.partition(":")
    assert colon, f'{name}: build is "module:function", got {component.build!r}'
    build = getattr(importlib.import_module(module), function, None)
    assert callable(build), f"{name}: there is no function {component.build}"
    try:
        inspect.signature(build).bind(None, None)
    except TypeError:
        raise AssertionError(f"{name}: build is called as build(options, context)") from None


def resolve(component: Component, options: Mapping[str, Any], folder: Path) -> Use[Any]:
    """The component with options from a recipe's table, resolved as the core does it."""
    kind = component.kind
    others = [
        e for e in load_registry().entries if e.kind != kind or e.component.name != component.name
    ]
    registry = Registry((*others, Entry(component, "under test", "")))
    resolver = Resolver(
        registry, folder, lambda path: Place(".".join(map(str, path))), Threat("linf", 0.1)
    )
    use = resolver.use(kind, {"use": component.name, **options}, (kind,))
    if use is None:
        raise RecipeError(resolver.problems)
    return use
