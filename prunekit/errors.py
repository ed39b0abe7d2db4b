"""What can go wrong, told in one line each; `cli` turns these into messages and exit codes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class UserError(Exception):
    """Something the user can mend. The message says what is wrong and what to do instead.

    `code` is the exit status: 2 for usage, recipe and name errors, 1 for a run that failed.
    """

    code = 2


class RunError(UserError):
    """A run failed although its recipe was right."""

    code = 1


class PluginError(RunError):
    """A plugin is broken: what it declares cannot be loaded or built."""


class DataMissingError(UserError):
    """The files of a data set are not there and cannot be fetched (`--smoke` then goes without)."""


class OptionError(ValueError):
    """Raised by an options dataclass in `__post_init__`: this field has a value that cannot be."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class Interrupted(Exception):
    """The user stopped the run; everything up to here is saved."""


@dataclass(frozen=True, order=True)
class Place:
    """Where a recipe says something: a file and its line, or a command-line option."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, order=True)
class Problem:
    """One mistake in a recipe."""

    place: Place
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


class RecipeError(UserError):
    """All mistakes of a recipe at once, in the order of the file."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(dict.fromkeys(problems))
        super().__init__("\n".join(map(str, self.problems)))


def relative(path: Path) -> str:
    """The path as a user would write it from here: relative where that is shorter."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    # Elsewhere, or behind a folder that may not be looked into.
    except (ValueError, OSError):
        return str(path)
