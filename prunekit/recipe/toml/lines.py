"""A TOML file: its data, and the line of every key path."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.errors import Place, Problem, RecipeError, UserError, nearest, relative
from prunekit.reading import DEEPEST, LARGEST_TEXT, find_fault, name_type, read_bytes

KeyPath = tuple[str | int, ...]
"""Where a value stands in a recipe's data: ("stage", 0, "epochs")."""

HINTS = {
    "Invalid value": 'strings need quotes: use = "trades"',
    "Cannot overwrite": "this key exists already; remove one of the two",
    "Cannot declare": "this table exists already; remove one of the two",
}
"""How a message of tomllib starts, and what that usually means in a recipe."""

WRITTEN = {
    r"=\s*[\d.]+\s*/\s*[\d.]+": 'fractions need quotes: eps = "8/255"',
    r"^\s*\[+\s*stage\s*\]+": "stages are a list; write [[stage]], with two brackets, for each",
    r"^\s*\[+\s*sweep\.case\s*\]+": "cases are a list; write [[sweep.case]] for each",
    r"=\s*(True|False|None)\b": "write true or false, and leave out what there is not",
    r"^[^=#]*:": "write key = value, with =",
}
"""What the line of a mistake looks like, and what that usually means in a recipe."""

OTHERS = {
    ".safetensors": "a model file, not a recipe; to judge it, write prunekit eval",
    ".py": 'Python code, not a recipe; name it in one: [architecture] with use = "python"',
    ".json": "a record, not a recipe; that of a run is the recipe.toml beside it",
    **dict.fromkeys((".pt", ".pth"), "a checkpoint, not a recipe; write prunekit import"),
}
"""Ending of a file that is no recipe -> what it is, and what to do with it."""

SINGLE = r"\s*\[\s*stage\s*\]"
"""A header of a stage that should have had two brackets."""

LONGEST_NUMBER = 400
"""Most characters of a number; 64 bits need 20, and a float at most 325 before its point."""

# Every alternative takes what it began, closed or not: the whole is linear in the length.
TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+|\#[^\n]*)
    | (?P<line>\n)
    | (?P<quoted>
        \"\"\"(?:[^"\\]|\\[\s\S]|"(?!""))*+(?:"{3,5})?
      | '''(?:[^']|'(?!''))*+(?:'{3,5})?
      | "(?:[^"\\\n]|\\.)*+"?
      | '[^'\n]*+'?)
    | (?P<mark>[\[\]{},=.])
    | (?P<bare>[^ \t\r\n\[\]{},=."'\#]+)""",
    re.VERBOSE,
)


class Unfit(Exception):
    """What is wrong with a text before it is known to be TOML, and its line."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def read_toml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, Place]]:
    """The data of a TOML file, and the place in it of every key path.

    Raises `UserError` if the file cannot be read, and `RecipeError` if it is not TOML.
    """
    file = nearest(path)
    check_recipe(path)
    content = read_bytes(path, LARGEST_TEXT)
    try:
        text = content.decode("utf-8-sig")
        lines = find_lines(text)
        data = tomllib.loads(text)
    except UnicodeDecodeError as error:
        place = Place(file, error.object[: error.start].count(b"\n") + 1)
        raise RecipeError([Problem(place, "is not UTF-8; save the file as UTF-8")]) from None
    except Unfit as error:
        raise RecipeError([Problem(Place(file, error.line), str(error))]) from None
    except ValueError as error:
        message, line = _explain(error, text)
        problem = Problem(Place(file, line), f"is not TOML: {message}")
        raise RecipeError([problem]) from None
    places = {path: Place(file, line) for path, line in lines.items()}
    if fault := find_fault(data):
        wrong, message = fault
        place = next(
            (places[wrong[:n]] for n in range(len(wrong), 0, -1) if wrong[:n] in places),
            Place(file, 1),
        )
        message += '; write norm = "linf"' if wrong[-1] == "norm" else ""
        raise RecipeError([Problem(place, f"{'.'.join(map(str, wrong))} {message}")])
    return data, places


def check_recipe(path: Path) -> None:
    """Raise `UserError` unless there is a regular file at the path."""
    try:
        found = name_type(path)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        raise UserError(f"there is no recipe {relative(path)}") from None
    if found:
        inner = path / "recipe.toml"
        advice = f"; write {relative(inner)}" if os.path.isfile(inner) else ""
        raise UserError(f"{relative(path)} is {found}, not a recipe{advice}")
    if kind := OTHERS.get(path.suffix):
        raise UserError(f"{relative(path)} is {kind}")


def _explain(error: ValueError, text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(.*) \(at line (\d+), column \d+\)", str(error), re.DOTALL)
    if not found:
        line = text.rstrip().count("\n") + 1
        reason = str(error).removesuffix(" (at end of document)")
        if reason.startswith("Cannot"):
            return _add_hint(reason), line
        return "the file ends in the middle of a value; close the bracket or the quote", line
    lines, line = text.split("\n"), int(found[2])
    if found[1].startswith("Cannot declare") and re.match(SINGLE, lines[line - 1]):
        # The first is where the mistake begins.
        line = next(n for n, known in enumerate(lines, start=1) if re.match(SINGLE, known))
    return _add_hint(found[1], lines[line - 1]), line


def _add_hint(reason: str, line: str = "") -> str:
    hints = [hint for pattern, hint in WRITTEN.items() if re.search(pattern, line)]
    hints += [hint for start, hint in HINTS.items() if reason.startswith(start)]
    return "; ".join([reason, *hints[:1]])


def find_lines(text: str) -> dict[KeyPath, int]:
    """Key path -> the line, counted from 1, that mentions it first; tomllib gives none.

    Of a text that is not TOML, the paths mean nothing. Raises `Unfit` for one that tomllib could
    not read either: too deep, or with endless numbers.
    """
    scanner = _Scanner()
    for match in TOKEN.finditer(text):
        scanner.take(str(match.lastgroup), match[0])
    return scanner.found


@dataclass
class _Scanner:
    """Follows the tokens of a TOML text: which table they are in, and which list or value."""

    found: dict[KeyPath, int] = field(default_factory=dict)
    line: int = 1
    table: KeyPath = ()
    """The table that the last header opened."""
    header: int = 0
    """Brackets of the header that is being read: 1 for a table, 2 for one of a list."""
    keys: list[str] = field(default_factory=list)
    """The dotted key that is being read."""
    path: KeyPath = ()
    """Where the value that is expected stands."""
    expects: str = "key"
    """"key", "value" or, after either, "end"."""
    lists: dict[KeyPath, int] = field(default_factory=dict)
    """Path of a list of tables -> how many have been opened."""
    inside: list[tuple[str, KeyPath, int]] = field(default_factory=list)
    """Open brackets of the value: the bracket, the path, and the number of the item."""

    def take(self, kind: str, token: str) -> None:
        """Go on by a token."""
        if kind == "mark":
            self._mark(token)
        elif kind in ("quoted", "bare"):
            self._word(kind, token)
        elif kind == "line" and not self.inside:
            self.keys, self.header, self.expects = [], 0, "key"
        self.line += token.count("\n")

    def _word(self, kind: str, token: str) -> None:
        if kind == "bare" and self.expects != "key" and len(token) > LONGEST_NUMBER:
            raise Unfit(self.line, f"has a value of {len(token):,} characters without quotes")
        if self.expects == "key":
            self.keys.append(token if kind == "bare" else _unquote(token))
        elif self.expects == "value":
            self._note(self.path)
            self.expects = "end"

    def _mark(self, mark: str) -> None:
        bracket, path, number = self.inside[-1] if self.inside else ("", self.table, 0)
        if self.expects == "value" and mark in "[{":
            self._note(self.path)
            self.inside.append((mark, self.path, 0))
            self.path = (*self.path, 0)
            self.expects = "value" if mark == "[" else "key"
        elif self.inside and mark == ("]" if bracket == "[" else "}"):
            self.inside.pop()
            self.expects, self.keys = "end", []
        elif self.inside and mark == ",":
            self.inside[-1] = (bracket, path, number + 1)
            self.path, self.keys = (*path, number + 1), []
            self.expects = "value" if bracket == "[" else "key"
        elif self.expects == "key" and mark == "=":
            self.path, self.expects = self._open(path, self.keys), "value"
            self.keys = []
        elif self.expects == "key" and mark == "[":
            self.header += 1
        elif self.header and mark == "]":
            self.table, self.expects = self._open_header(), "end"
            self.header = 0

    def _open(self, path: KeyPath, keys: list[str]) -> KeyPath:
        for key in keys:
            path = (*path, key)
            self._note(path)
        return path

    def _open_header(self) -> KeyPath:
        path: KeyPath = ()
        for n, key in enumerate(self.keys, start=1):
            path = self._open(path, [key])
            if self.header == 2 and n == len(self.keys):
                self.lists[path] = self.lists.get(path, 0) + 1
            if path in self.lists:
                path = (*path, self.lists[path] - 1)
                self._note(path)
        return path

    def _note(self, path: KeyPath) -> None:
        if len(path) > DEEPEST:
            raise Unfit(self.line, f"is nested more than {DEEPEST} levels deep")
        self.found.setdefault(path, self.line)


def _unquote(token: str) -> str:
    if "\\" not in token and token[:3] not in ('"""', "'''"):
        return token[1:-1]
    try:
        return str(tomllib.loads(f"key = {token}")["key"])
    except (tomllib.TOMLDecodeError, KeyError):
        return token
