"""What a plugin declares. Data only: nothing here or in a declaration imports torch."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import pluggy

from prunekit.catalog.containment import contained
from prunekit.contexts import NetworkContext
from prunekit.contracts import Norm
from prunekit.errors import PluginError, explain_briefly

if TYPE_CHECKING:
    from prunekit.contexts import Context
    from prunekit.contracts import Threat

API_VERSION = 3
"""Version of the plugin API: declarations, hooks and contracts together.

A plugin's module states the version that it was written for, `PRUNEKIT_API = 3`. A plugin for
another version is listed as broken; one that states none is assumed to fit.
"""

hookimpl = pluggy.HookimplMarker("prunekit")
"""Marks a function of a plugin's module as an implementation of a hook in `hookspecs`."""


@dataclass(frozen=True)
class NoOptions:
    """A component without options."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """What the declarations of all kinds share: the component's name, its options, how to build it.

    Each kind has a class of its own in `kinds`.
    """

    kind: ClassVar[str]
    """What `Use`, the hook `prunekit_<kind>s` and messages call the kind."""
    builds: ClassVar[type]
    """The contract of what `build` returns; options name the kind by it: `Use[Pruner]`."""
    abilities: ClassVar[tuple[type, ...]] = ()
    """Further contracts that it may satisfy, by having their methods."""

    name: str
    """What a recipe writes after `use =`; kebab-case."""
    summary: str
    """One line in `prunekit list`."""
    build: str
    """"module:function", imported when first used; called as `function(options, context)`."""
    options: type = NoOptions
    """Frozen dataclass; its fields (see `option`) are the recipe's keys."""
    needs: tuple[str, ...] = ()
    """Import names that must be installed; `prunekit list` looks for them without importing."""
    sources: tuple[str, ...] = ()
    """Import names of other packages whose source decides the result, such as another plugin's.

    A stored result is reused only if the source of the component's package, of these packages and
    of the core is the same, and the versions of what it `needs`.
    """
    install: str = ""
    """The command that installs what it `needs`; by default pip install with the names."""
    loads: str = ""
    """"module:function" that imports and returns what it `needs`, if a plain import would fail;
    called by `prunekit doctor`."""
    paper: str = ""
    """The source: authors, venue, identifier."""
    details: str = ""
    """What `prunekit show` says beyond the summary, in paragraphs."""
    cost: str = ""
    """What it costs over plain training, in a line: "a backward pass every `every` steps"."""
    files: Callable[[Any], Iterable[Path]] = lambda options: ()
    """options -> files that results depend on besides those that are options: what a file imports,
    the files of a folder. Their content is part of a stage's hash."""
    risks: Callable[[Any], str] = lambda options: ""
    """options -> what building it does that a stranger's file must not cause, as in "would run the
    Python file net.py" or "would fetch OWNER/NAME"; empty if it does not run code from a file or
    fetch what its options name. Where a run folder or a model file names it, the user is asked."""

    doubts: Callable[[Any], str] = lambda options: ""
    """options -> what may be a mistake in them, which `prunekit check` notes after the name of the
    component, as in "takes steps longer than the ball"; empty if nothing."""

    @property
    def package(self) -> str:
        """The import name of the top-level package that implements it."""
        return self.build.partition(":")[0].partition(".")[0]


class Radius(float):
    """A radius in pixel units of [0, 1]; a recipe may write it as a fraction: "8/255"."""


Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Use(Generic[Kind]):
    """A component that a recipe chose, with its options.

    An options field that names another component is typed `Use[Pruner]` (one of the Protocols of
    `prunekit.contracts`), or `tuple[Use[Evaluator], ...]`; the core resolves it.
    """

    component: Any
    """Its declaration, of the class of its kind."""
    options: Any
    plugin: str = ""
    """The plugin and its distribution, for messages: "adversarial (prunekit 0.1.0)"."""
    name: str = ""
    """What results are called in this recipe; by default the component's name."""
    threat: Threat | None = None
    """The threat model of a component whose options are `Threatened`."""
    reference: str = ""
    """What a recipe writes after `use =`, if that is more than the component's name."""
    value: Any = None
    """An object that a Python program passes instead; the implementation gets it in its context."""
    guard: Callable[[Use[Any]], None] | None = dataclasses.field(default=None, compare=False)
    """Raises `UserError` if a file of somebody else names it and it must not be built."""

    @property
    def kind(self) -> str:
        """The kind of the component."""
        return str(self.component.kind)

    def permit(self) -> None:
        """Raise `UserError` if it must not be built, because of what its `guard` says."""
        if self.guard is not None:
            self.guard(self)

    def build(self, context: Context) -> Kind:
        """Import the implementation and build it.

        Raises `PluginError`, which names the plugin, if that is impossible, and `UserError` as
        `permit` does.
        """
        self.permit()
        module, _, function = self.component.build.partition(":")
        owner = f"{self.kind} '{self.component.name}' of plugin {self.plugin}"
        context = dataclasses.replace(context, value=self.value)
        if isinstance(context, NetworkContext):
            context = dataclasses.replace(context, threat=self.threat)
        try:
            with contained():
                build = getattr(importlib.import_module(module), function)
        except Exception as error:
            raise PluginError(f"{owner} cannot be loaded: {explain_briefly(error)}") from error
        try:
            inspect.signature(build).bind(self.options, context)
        except TypeError:
            raise PluginError(
                f"{owner} cannot be built: {self.component.build} must be a function that can be "
                "called as build(options, context)"
            ) from None
        except ValueError:  # written in C, without a signature
            pass
        with contained():
            built: Kind = build(self.options, context)
        if "__call__" in vars(self.component.builds) and not callable(built):
            raise PluginError(f"{owner} is built as {built!r}, which cannot be called")
        return built


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    unit: str = "",
    delays: bool = False,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    smoke: Any = None,
    exists: bool = False,
    norm: Norm | None = None,
) -> Any:
    """A field of an options dataclass, with the facts that `show` prints and `check` enforces.

    `low` and `high` are inclusive limits, `above` and `below` exclusive ones; `smoke` is the most
    that `--smoke` uses (attack steps, samples); `exists` says that a path must exist, and `norm`
    that a radius is always of this norm. `delays` is for a number of epochs of a stage after which
    something holds: a stage that is over by then is told. Without `default` a recipe has to give a
    value.

    >>> @dataclass(frozen=True)
    ... class Options:
    ...     steps: int = option(10, help="steps of the attack", low=1, smoke=2)
    >>> Options().steps
    10
    """
    metadata = {"help": help, "unit": unit, "smoke": smoke, "exists": exists, "norm": norm}
    metadata |= {"low": low, "high": high, "above": above, "below": below, "delays": delays}
    if isinstance(default, dict):  # a component with options: mutable, so it needs a factory
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Threatened:
    """Options of a component that acts under a threat model: that of the recipe, or its own.

    The context then has the `threat`. An option `step_size` is the length of the attack's steps in
    pixels, and `prunekit check` tells where it is more than eps. A subclass that takes one norm
    only says so, and `check` refuses the others: `norms = ("linf",)`.
    """

    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2")
    """The norms that the component takes."""

    eps: Radius | None = option(None, help="radius of the attack; default: eps of [threat]")
    norm: Norm | None = option(None, help="norm of the attack; default: norm of [threat]")


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of an option; `dataclasses.MISSING` if the recipe has to give a value."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
