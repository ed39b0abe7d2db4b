"""A recipe with a sweep -> one recipe for each combination, and a name for it."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from typing import Any

from prunekit.errors import Problem
from prunekit.recipe.document import Recipe, Setting, flatten
from prunekit.recipe.values import KeyPath

LONGEST = 120
"""Characters of a label; a file system takes 255."""


def unroll(recipe: Recipe, problems: list[Problem]) -> Iterator[tuple[dict[str, Any], Recipe]]:
    """Every combination of the sweep: its settings, and the recipe with them applied."""
    plain = {k: v for k, v in recipe.data.items() if k != "sweep"}
    seen: list[dict[str, Any]] = []
    for combination in _combine(recipe, problems):
        settings = {s.address: s.value for s in combination}
        if settings in seen:
            continue
        seen.append(settings)
        variant = Recipe(recipe.path, copy.deepcopy(plain), dict(recipe.places))
        # A component comes before its options, whatever the order they are written in.
        ordered = sorted(combination, key=lambda s: s.address.removesuffix(".use").count("."))
        wrong = [p for s in (*ordered, *recipe.overrides) for p in variant.assign(s)]
        problems += wrong
        if not wrong:
            yield settings, variant


def _combine(recipe: Recipe, problems: list[Problem]) -> Iterator[list[Setting]]:
    """The settings of every combination: one value of each list, with every case."""
    if "sweep" not in recipe.data:
        yield []
        return
    sweep = recipe.data["sweep"]
    if not isinstance(sweep, dict) or not flatten(sweep):
        message = '[sweep] lists nothing to try; write "prune.sparsity" = [0.9, 0.95]'
        problems.append(Problem(recipe.locate(("sweep",)), message))
        return
    axes = []
    for path, values in flatten({k: v for k, v in sweep.items() if k != "case"}, ("sweep",)):
        address = ".".join(map(str, path[1:]))
        if isinstance(values, list) and values:
            axes.append(
                [Setting(address, v, recipe.locate((*path, i))) for i, v in enumerate(values)]
            )
            continue
        message = f"{address} is no list of values to try; write [{values!r}, ...]"
        if values == []:
            message = f"{address} lists no values to try; write some, or remove it"
        problems.append(Problem(recipe.locate(path), message))
    cases = sweep.get("case", [{}])
    if not isinstance(cases, list) or not all(isinstance(c, dict) for c in cases):
        message = "a case is a table of its own; write [[sweep.case]]"
        problems.append(Problem(recipe.locate(("sweep", "case")), message))
        return
    for number, case in enumerate(cases):
        where: KeyPath = ("sweep", "case", number)
        together = {s.address: s for s in recipe.settings(case, where)}
        for values in itertools.product(*axes):
            yield list(({s.address: s for s in values} | together).values())


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
        label = re.sub(r"[^A-Za-z0-9_.=,+-]", "_", ",".join(parts))[:LONGEST] or "run"
        while label in labels:
            label += "+"
        labels.append(label)
    return labels


def _word(value: Any) -> str:
    if isinstance(value, dict):
        rest = [f"{k}={_word(v)}" for k, v in value.items() if k != "use"]
        return "+".join([*([str(value["use"])] if "use" in value else []), *rest])
    if isinstance(value, list):
        return "+".join(map(_word, value))
    return str(value)
