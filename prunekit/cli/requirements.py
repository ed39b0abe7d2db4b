"""What distributions require of each other, as their metadata tell; nothing is imported."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from functools import cache


def read_requirements(distribution: str) -> list[tuple[str, str]]:
    """(name, ">=1.2" or the like) of what a distribution always requires."""
    found = []
    for line in importlib.metadata.requires(distribution) or ():
        text, _, marker = line.partition(";")
        match = re.match(r"\s*([\w.-]+)\s*(?:\[.*\])?\s*\(?([^)]*)\)?", text)
        if match and "extra" not in marker:
            found.append((match[1], match[2].strip()))
    return found


def normalize(distribution: str) -> str:
    """A distribution's name as all its spellings have it.

    >>> normalize("Tomli_W")
    'tomli-w'
    """
    return re.sub(r"[-_.]+", "-", distribution).lower()


@cache
def find_distributions() -> Mapping[str, list[str]]:
    """Import name -> the distributions that have it."""
    return importlib.metadata.packages_distributions()


def find_module(distribution: str) -> str:
    """The import name of a distribution, empty where it is not installed."""
    names = [
        name
        for name, owners in find_distributions().items()
        if normalize(distribution) in map(normalize, owners) and name.isidentifier()
    ]
    alike = normalize(distribution).replace("-", "_")
    return alike if alike in names else min(names, default="")


def is_within(version: str, wanted: str) -> bool:
    """Whether a version is what a requirement such as ">=2.6,<3" or "==2.15.0" wants.

    What is written otherwise ("~=2.1", "==2.13.*") is not judged.

    >>> is_within("2.13.0+cpu", ">=2.6"), is_within("2.13.0", "==2.15.0"), is_within("0.3", "<0.3")
    (True, False, False)
    """
    got = _numbers(version)
    for operator, text in re.findall(r"(>=|<=|==|<|>)\s*([\w.]+)(?![\w.*])", wanted):
        limit = _numbers(text)
        size = max(len(got), len(limit))
        a, b = (n + (0,) * (size - len(n)) for n in (got, limit))
        good = {">=": a >= b, "<=": a <= b, "==": a == b, "<": a < b, ">": a > b}[operator]
        if not good:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", re.split(r"[+a-z]", version)[0])))
