"""Single values of a recipe, checked against the type and the limits of their option."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from prunekit.catalog.component import Radius
from prunekit.errors import Place, shorten_value, suggest
from prunekit.reading import name_type
from prunekit.recipe.toml.lines import KeyPath

NAME = r"[\w+-]{1,100}"
"""Names of stages and evaluators, which are parts of paths and of the names of metrics."""
NAME_RULE = "must consist of at most 100 letters, digits, '-', '_' and '+'"

WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
EXAMPLES: dict[Any, str] = {
    bool: "true",
    int: "10",
    float: "0.5",
    Path: '"my-file"',
    Radius: '"8/255"',
}
LIMITS = {
    "low": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "high": ("at most", operator.le),
    "below": ("below", operator.lt),
}
"""Limits that `option` declares: how a message calls each, and how it is checked."""


class Mistake(Exception):
    """A value that is not allowed. `path` says where it stands, the message what to write."""

    def __init__(self, path: KeyPath, message: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class Slot:
    """The option that a value is for. `norm` is that of its threat model; it limits radii."""

    path: KeyPath
    field: dataclasses.Field[Any]
    owner: str
    norm: Any

    @property
    def name(self) -> str:
        """The option and its owner: "betas of optimizer 'adam'", "betas[1] of ..."."""
        return f"{last_key(self.path)} of {self.owner}"

    def item(self, index: int) -> Slot:
        """The slot of an item of a list."""
        return dataclasses.replace(self, path=(*self.path, index))

    def wrong_type(self, wanted: str, value: Any, advice: str = "") -> Mistake:
        """The mistake of a value that does not have the right type."""
        return Mistake(
            self.path, f"{self.name} must be {wanted}, got {shorten_value(repr(value))}{advice}"
        )


def last_key(path: KeyPath) -> str:
    """The end of a path as a message shows it: "betas", or "betas[1]" for an item of a list."""
    key = path[-1]
    return key if isinstance(key, str) else f"{path[-2]}[{key}]"


def example_of(hint: Any) -> str:
    """An example, in TOML, of a value for an option of this type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f'"{arguments[0]}"' if isinstance(arguments[0], str) else str(arguments[0])
    if origin is tuple:
        items = arguments[:1] if arguments[-1] is Ellipsis else arguments
        return f"[{', '.join(map(example_of, items))}]"
    if origin is None:
        return EXAMPLES.get(hint, '"..."')
    return "{}" if origin is dict else example_of(arguments[0])


def read_radius(value: Any, slot: Slot) -> Radius:
    """A radius in pixel units from a number, or from a fraction written as "8/255".

    Raises `Mistake` for anything else, and above 1 in the linf norm.
    """
    number = value
    if isinstance(value, str):
        top, slash, bottom = value.partition("/")
        try:
            number = float(top) / float(bottom) if slash else float(top)
        except (ValueError, ZeroDivisionError):
            number = None
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise slot.wrong_type('a radius such as 0.03 or "8/255"', value)
    if not 0 <= number < float("inf") or (number > 1 and slot.norm == "linf"):
        advice = f'; write "{number:g}/255"' if 1 < number <= 255 else ""
        if number < 0 and isinstance(value, str):
            advice = f'; write "{value.strip().removeprefix("-")}"'
        name = last_key(slot.path)
        message = f"{name} is a radius in [0, 1] pixel units, got {value}{advice}"
        raise Mistake(slot.path, message)
    check_limits(number, slot)
    return Radius(number)


def read_choice(value: Any, choices: tuple[Any, ...], slot: Slot) -> Any:
    """One of the choices. Raises `Mistake` for anything else: 1 is not true, as it is in Python."""
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        advice = suggest(str(value), map(str, choices))
        raise Mistake(slot.path, f"{slot.name} cannot be {value!r}; {advice}")
    return value


def read_path(value: Any, slot: Slot, place: Place, folder: Path) -> Path:
    """The file or folder that a string written at `place` names; `folder` is the recipe's.

    Raises `Mistake` for one that is neither, and if it has to exist, for one that does not.
    """
    if isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise slot.wrong_type("a path", value)
    start = "the folder of the recipe"
    if place.line:
        # A recipe that is extended may be in another folder than the one that extends it.
        folder = Path(place.file).parent
    elif place.file.startswith("--set"):
        folder, start = Path(), "the current folder"
    try:
        file = folder.absolute() / Path(value).expanduser()
        found = name_type(file)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of a user who does not exist
        found = ""
        if slot.field.metadata.get("exists") or isinstance(error, RuntimeError):
            gone = isinstance(error, FileNotFoundError)
            reason = getattr(error, "strerror", None) or error
            message = f"there is no {file}" if gone else f"cannot read {value}: {reason}"
            message = f"{slot.name}: {message}; relative paths start at {start}"
            raise Mistake(slot.path, message) from None
    # Reading anything else may never end.
    if found not in ("", "a folder"):
        raise Mistake(slot.path, f"{slot.name}: {file} is {found}, not a file")
    return file


def read_plain(hint: Any, value: Any, slot: Slot) -> Any:
    """A number, string or boolean. An integer is taken for a float, and 3.0 for an integer.

    Raises `Mistake` for a value of another type or outside the option's limits.
    """
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        advice = _read_number(hint, value) if hint in (int, float) else ""
        raise slot.wrong_type(WANTED.get(hint, hint.__name__), value, advice)
    if isinstance(value, int | float) and not isinstance(value, bool):
        check_limits(value, slot)
    return value


def _read_number(hint: type, value: Any) -> str:
    """What to write for a text such as "90%", "0,9" or "3" that was meant as a number."""
    text = value.strip() if isinstance(value, str) else ""
    try:
        number = float(text.removesuffix("%").replace(",", "."))
    except ValueError:
        return ""
    number = number / 100 if text.endswith("%") else number
    if not math.isfinite(number) or (hint is int and not number.is_integer()):
        return ""
    return f"; write {int(number) if number.is_integer() else f'{number:.12g}'}"


def check_limits(value: float, slot: Slot) -> None:
    """Raise `Mistake` for NaN, infinity, and a number outside the limits of its option."""
    bounds = {k: slot.field.metadata[k] for k in LIMITS if slot.field.metadata.get(k) is not None}
    if math.isfinite(value) and all(LIMITS[k][1](value, bound) for k, bound in bounds.items()):
        return
    is_fraction = bounds.get("high", bounds.get("below")) == 1
    advice = f"; write {value / 100:g} for {value:g} %" if is_fraction and 2 <= value < 100 else ""
    allowed = limits(slot.field) or "a number"
    raise Mistake(slot.path, f"{slot.name} must be {allowed}, got {value:g}{advice}")


def limits(field: dataclasses.Field[Any]) -> str:
    """The limits of an option in words, such as "above 0 and at most 1"; "" if it has none."""
    bounds = ((words, field.metadata.get(key)) for key, (words, _) in LIMITS.items())
    return " and ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None)


def write_value(value: Any) -> str:
    """The value as TOML writes it.

    >>> write_value((True, 0.5, "x")), write_value({"use": "sgd"})
    ('[true, 0.5, "x"]', '{ use = "sgd" }')
    """
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{k} = {write_value(v)}' for k, v in value.items())} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(write_value, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else str(value)
