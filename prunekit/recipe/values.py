"""One value of a recipe: is it what its option wants? Raises `Mistake` with the way out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from prunekit.catalog.component import Radius
from prunekit.errors import suggest as suggest

KeyPath = tuple[str | int, ...]
WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}

EXAMPLES: dict[Any, str] = {
    bool: "true", int: "10", float: "0.5", str: '"..."', Path: '"my-file"', Radius: '"8/255"',
}  # fmt: skip


class Mistake(Exception):
    """A value that cannot be, and where it stands."""

    def __init__(self, path: KeyPath, message: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class Slot:
    """What a value is for: the option (or an item of its list), where it stands, whose it is."""

    path: KeyPath
    field: dataclasses.Field[Any]
    owner: str
    norm: Any

    @property
    def name(self) -> str:
        """The option as a message calls it: "betas of optimizer 'adam'", "betas[1] of ..."."""
        return f"{self.key} of {self.owner}"

    @property
    def key(self) -> str:
        """The option alone: "betas", "betas[1]"."""
        key = self.path[-1]
        return key if isinstance(key, str) else f"{self.path[-2]}[{key}]"

    def item(self, index: int) -> Slot:
        return dataclasses.replace(self, path=(*self.path, index))

    def wants(self, wanted: str, value: Any) -> Mistake:
        """The mistake of a value that is not even of the type."""
        return Mistake(self.path, f"{self.name} is {wanted}, got {value!r}")


def example_of(hint: Any) -> str:
    """What a recipe could write for an option of this type."""
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
    """A number, or a fraction as text: "8/255"."""
    number = value
    if isinstance(value, str):
        top, slash, bottom = value.partition("/")
        try:
            number = float(top) / float(bottom) if slash else float(top)
        except (ValueError, ZeroDivisionError):
            number = None
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise slot.wants('a radius such as 0.03 or "8/255"', value)
    if not 0 <= number < float("inf") or (number > 1 and slot.norm == "linf"):
        way = f'; write "{number:g}/255"' if 1 < number <= 255 else ""
        message = f"{slot.key} is a radius in [0, 1] pixel units, got {value}{way}"
        raise Mistake(slot.path, message)
    check_limits(number, slot)
    return Radius(number)


def read_plain(hint: Any, value: Any, slot: Slot) -> Any:
    """A number, text or truth value; whole numbers serve as numbers, 3.0 as a whole number."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise slot.wants(WANTED.get(hint, hint.__name__), value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        check_limits(value, slot)
    return value


def check_limits(value: float, slot: Slot) -> None:
    """Hold a number against what `option` allows."""
    bounds = slot.field.metadata
    low, high, above, below = (bounds.get(k) for k in ("low", "high", "above", "below"))
    if (
        value == value  # not NaN
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    ):
        return
    top = high if high is not None else below
    way = f"; write {value / 100:g} for {value:g} %" if top == 1 and 2 <= value < 100 else ""
    words = limits(slot.field) or "a number"
    raise Mistake(slot.path, f"{slot.name} must be {words}, got {value:g}{way}")


def limits(f: dataclasses.Field[Any]) -> str:
    """The allowed values of a field in words; empty where there is no limit."""
    words = (("low", "at least"), ("above", "above"), ("high", "at most"), ("below", "below"))
    return " and ".join(
        f"{word} {f.metadata[key]:g}" for key, word in words if f.metadata.get(key) is not None
    )
