"""A recipe with a sweep -> one recipe for each combination, and a name for it."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from typing import Any

from prunekit.errors import Problem
from prunekit.options import KeyPath
from prunekit.recipe import Recipe, flatten


def unroll(recipe: Recipe, problems: list[Problem]) -> Iterator[tuple[dict[str, Any], Recipe]]:
    """Every combination of the sweep: its settings, and the recipe with them applied."""
    sweep = recipe.data.get("sweep", {})
    if not isinstance(sweep, dict):
        problems.append(Problem(recipe.locate(("sweep",)), "write [sweep] with lists of values"))
        return
    cases = sweep.get("case", [{}])
    axes: dict[str, list[Any]] = {}
    for address, values in flatten({k: v for k, v in sweep.items() if k != "case"}):
        place = recipe.locate(("sweep", address))
        if not isinstance(values, list) or not values:
            example = f"write a list of the values to try, such as [{values!r}]"
            problems.append(
                Problem(
                    place, f"{address} has no values; {example if values != [] else 'list some'}"
                )
            )
            continue
        axes[address] = values
    if not isinstance(cases, list) or not all(isinstance(c, dict) for c in cases):
        problems.append(Problem(recipe.locate(("sweep", "case")), "write [[sweep.case]] tables"))
        return
    plain = copy.deepcopy({k: v for k, v in recipe.data.items() if k != "sweep"})
    for number, case in enumerate(cases):
        for values in itertools.product(*axes.values()):
            settings = {**dict(zip(axes, values, strict=True)), **dict(flatten(case))}
            variant = Recipe(recipe.path, copy.deepcopy(plain), dict(recipe.places))
            good = True
            for address, value in settings.items():
                inner: KeyPath = ("sweep", "case", number) if address in case else ("sweep",)
                place = recipe.locate((*inner, address))
                message = variant.assign(address, value, place)
                if message:
                    problems.append(Problem(place, message))
                    good = False
            if good:
                yield settings, variant


def label(combinations: list[dict[str, Any]]) -> list[str]:
    """A short name for each combination, fit for a folder: "pruner=score,sparsity=0.9"."""
    addresses = {address for settings in combinations for address in settings}
    tails = [a.split(".")[-1] for a in addresses]
    labels: list[str] = []
    for settings in combinations:
        parts = []
        for address, value in settings.items():
            tail = address.split(".")[-1]
            parts.append(f"{tail if tails.count(tail) == 1 else address}={_word(value)}")
        label = re.sub(r"[^\w.=,+-]", "_", ",".join(parts)) or "run"
        while label in labels:
            label += "+"
        labels.append(label)
    return labels


def _word(value: Any) -> str:
    if isinstance(value, dict):
        rest = [f"{k}={_word(v)}" for k, v in value.items() if k != "use"]
        return "+".join([str(value.get("use", "")), *rest])
    if isinstance(value, list):
        return "+".join(map(_word, value))
    return str(value)
