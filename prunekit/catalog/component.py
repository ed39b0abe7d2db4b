"""What a plugin declares. Data only: nothing here or in a declaration imports torch."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import pluggy

if TYPE_CHECKING:
    from prunekit.contracts import Context, Norm, Threat

API_VERSION = 2
"""Version of the plugin API: declarations, hooks and contracts together.

A plugin's module says which one it was written for, `PRUNEKIT_API = 2`; another one is listed as
broken. Without it a plugin is taken to fit.
"""

hookimpl = pluggy.HookimplMarker("prunekit")
"""Marks a function of a plugin's module as the answer to one of the hooks of `hookspecs`."""

KINDS = (
    "objective",
    "pruner",
    "architecture",
    "dataset",
    "evaluator",
    "optimizer",
    "schedule",
    "reporter",
)
"""The kinds that plugins can add to; each has a hook `prunekit_<kind>s`."""


@dataclass(frozen=True)
class NoOptions:
    """A component without options."""


@dataclass(frozen=True)
class Facts:
    """What is known of a data set before a file is touched.

    `shape` is (C, H, W) of an image, `train` and `test` are numbers of images, and `augment` names
    the augmentations that suit the data: "crop" (zero padding of an eighth, random crop), "flip".
    """

    shape: tuple[int, int, int]
    classes: int
    train: int
    test: int
    augment: tuple[str, ...] = ()


def once(options: Any) -> int:
    """The default of `Component.forward_passes`: one forward pass."""
    return 1


def no_files(options: Any) -> tuple[Path, ...]:
    """The default of `Component.files`: none."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Component:
    """The declaration of one component: what a recipe calls it, its options, how to build it.

    >>> Component(name="lwm", summary="Least weight magnitude", build="my_package.lwm:build").name
    'lwm'
    """

    name: str
    """What a recipe writes after `use =`; kebab-case."""
    summary: str
    """One line in `prunekit list`."""
    build: str
    """"module:function", imported when first used; called as `function(options, context)`."""
    options: type = NoOptions
    """Frozen dataclass; its fields (see `option`) are the recipe's keys."""
    needs: tuple[str, ...] = ()
    """Import names that must be there; looked for, never imported, by `prunekit list`."""
    sources: tuple[str, ...] = ()
    """Import names of further packages whose source decides the result, such as another plugin's.

    A stored result is found again by its own package's source, these packages' and the core's, and
    by the versions of what it `needs`.
    """
    install: str = ""
    """The command that brings what is missing of `needs`; default: pip install and the names."""
    loads: str = ""
    """"module:function" that imports and returns what it `needs`, where a plain import would fail.

    `prunekit doctor` calls it.
    """
    paper: str = ""
    """The source: authors, venue, identifier."""
    details: str = ""
    """What `prunekit show` says beyond the summary, in paragraphs."""
    files: Callable[[Any], Iterable[Path]] = no_files
    """options -> files that results depend on and that are no option themselves: what a file
    imports, the content of a folder. By their content they are part of a stage's hash."""
    catalog: str = ""
    """"module:function" -> names that the option `model` takes, for `prunekit list --match`."""
    exports: Mapping[str, str] = field(default_factory=dict)
    """Architectures: format of `prunekit export` -> "module:function" that writes it, called as
    `function(model, options, header, out)`; the header is that of the model file."""
    forward_passes: Callable[[Any], int] = once
    """options -> forward passes an image takes, in a training step or in an evaluation."""
    replays: Callable[[Any], int] = once
    """Objectives: options -> optimiser steps on each batch. A recipe's epochs are divided by it."""
    select: str = "accuracy"
    """Objectives: the validation metric that chooses the best epoch."""
    learns: bool = False
    """Pruners: scores are trained, so the stage needs `epochs` and an `optimizer`."""
    facts: Callable[[Any], Facts] | None = None
    """Data sets: options -> Facts; None where only the files tell."""
    judges: Literal["", "attack", "proof"] = ""
    """Evaluators: what a record of an image says of its robustness under the threat.

    An "attack" records `correct`: it did not fool the network there. A "proof" records `verified`:
    no attack can. The core warns where the two contradict each other.
    """
    beats: tuple[str, ...] = ()
    """Evaluators: names of attacks that leave more images standing than this one should."""

    @property
    def package(self) -> str:
        """The import name of the top-level package that implements it."""
        return self.build.partition(":")[0].partition(".")[0]


class Radius(float):
    """A radius in pixel units of [0, 1]; recipes may write it as a fraction: "8/255"."""


Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Use(Generic[Kind]):
    """A component that a recipe chose, with its options.

    An options field that names another component is typed `Use[Pruner]` (one of the Protocols of
    `prunekit.contracts`), or `tuple[Use[Evaluator], ...]`; the core resolves it.
    """

    kind: str
    component: Component
    options: Any
    plugin: str = ""
    """The plugin and its distribution, for messages: "adversarial (prunekit 0.1.0)"."""
    name: str = ""
    """What results are called in this recipe; the component's name where it gives none."""
    threat: Threat | None = None
    """The recipe's threat for components whose options have `norm` and `eps`, which override it."""
    reference: str = ""
    """What a recipe writes after `use =`, where that is more than the component's name."""
    value: Any = None
    """What a Python program hands over in its place; the implementation finds it in its context."""

    def build(self, context: Context) -> Kind:
        """Import the implementation and build it; errors name the plugin."""
        from prunekit.errors import PluginError

        module, _, function = self.component.build.partition(":")
        owner = f"{self.kind} '{self.component.name}' of plugin {self.plugin}"
        try:
            build = getattr(importlib.import_module(module), function)
        # Its module may raise anything at import, SystemExit included.
        except (Exception, SystemExit) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise PluginError(f"{owner} cannot be loaded: {reason}") from error
        if not _takes(build, 2):
            raise PluginError(
                f"{owner} cannot be built: {self.component.build} is to be a function that is "
                "called as build(options, context)"
            )
        built = build(
            self.options, dataclasses.replace(context, threat=self.threat, value=self.value)
        )
        if self.kind in ("objective", "pruner", "evaluator", "reporter") and not callable(built):
            raise PluginError(f"{owner} is built as {built!r}, which cannot be called")
        return built


def _takes(function: Any, arguments: int) -> bool:
    """Whether it can be called with so many positional arguments."""
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError:
        return False
    except ValueError:  # written in C, without a signature
        return callable(function)
    return True


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    smoke: Any = None,
    exists: bool = False,
    norm: Norm | None = None,
) -> Any:
    """A field of an options dataclass, with what `show` prints and `check` holds it against.

    `low` and `high` are allowed values, `above` and `below` are not; `smoke` is the most that
    `--smoke` uses (attack steps, samples); a path that must be there says `exists=True`, a radius
    that is always of one `norm` says which. Without `default` the recipe has to give a value.

    >>> @dataclass(frozen=True)
    ... class Options:
    ...     steps: int = option(10, help="steps of the attack", low=1, smoke=2)
    >>> Options().steps
    10
    """
    limits = {"low": low, "high": high, "above": above, "below": below}
    metadata = {"help": help, "unit": unit, "smoke": smoke, "exists": exists, "norm": norm}
    metadata |= limits
    if isinstance(default, dict):  # a component with options; dataclasses want a factory for it
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """What an option is without a value from the recipe; `dataclasses.MISSING` where required."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
