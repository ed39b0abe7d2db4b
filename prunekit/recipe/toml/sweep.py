"""A recipe with a sweep -> one recipe for each combination, and a name for it."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from prunekit.errors import Problem
from prunekit.recipe.toml.document import Recipe, Setting, flatten

LONGEST = 120
"""Most characters of a label; file systems allow 255 in a name."""
MOST_RUNS = 10_000
"""Most combinations of a sweep."""


def unroll(recipe: Recipe, problems: list[Problem]) -> Iterator[tuple[dict[str, Any], Recipe]]:
    """Every combination of the sweep: its settings, and the recipe with them applied.

    Mistakes are added to `problems`, and combinations that have some are left out.
    """
    plain = {k: v for k, v in recipe.data.items() if k != "sweep"}
    # The places of its values, of which there may be thousands, come with the settings.
    places = {path: place for path, place in recipe.places.items() if path[0] != "sweep"}
    seen: set[Any] = set()
    for combination in _combine(recipe, problems):
        settings = {s.address: s.value for s in combination}
        if (known := _freeze(settings)) in seen:
            continue
        seen.add(known)
        variant = replace(recipe, data=copy.deepcopy(plain), places=dict(places))
        # A component comes before its options, whatever the order they are written in, and whether
        # the sweep or `--set` says so.
        both = [*combination, *recipe.overrides]
        ordered = sorted(both, key=lambda s: s.address.removesuffix(".use").count("."))
        wrong = [p for s in ordered for p in variant.assign(s)]
        problems += wrong
        if not wrong:
            yield settings, variant


def _combine(recipe: Recipe, problems: list[Problem]) -> Iterator[list[Setting]]:
    """The settings of every combination: one value of each list, with each of the cases."""
    sweep = recipe.data.get("sweep")
    if "sweep" in recipe.data and not (isinstance(sweep, dict) and flatten(sweep)):
        message = '[sweep] lists no values; write "prune.sparsity" = [0.9, 0.95]'
        problems.append(Problem(recipe.locate(("sweep",)), message))
        return
    axes = dict(sweep or {})
    cases = axes.pop("case", [{}])
    lists = []
    for path, values in flatten(axes, ("sweep",)):
        address = ".".join(map(str, path[1:]))
        if isinstance(values, list) and values:
            places = (recipe.locate((*path, i)) for i in range(len(values)))
            lists.append([Setting(address, *pair) for pair in zip(values, places, strict=True)])
            continue
        message = f"{address} must be a list of values to try; write [{values!r}, ...]"
        if values == []:
            message = f"{address} lists no values to try; add some, or remove it"
        problems.append(Problem(recipe.locate(path), message))
    if not isinstance(cases, list) or not all(isinstance(c, dict) for c in cases):
        message = "each case of a sweep is a table of its own; write [[sweep.case]]"
        problems.append(Problem(recipe.locate(("sweep", "case")), message))
        return
    runs = math.prod(map(len, lists)) * len(cases)
    if runs > MOST_RUNS:
        message = f"[sweep] has {runs:,} combinations, and at most {MOST_RUNS:,} are taken; "
        problems.append(Problem(recipe.locate(("sweep",)), message + "split it into recipes"))
        return
    for number, case in enumerate(cases):
        together = list(recipe.settings(case, ("sweep", "case", number)))
        for values in itertools.product(*lists):
            yield list({s.address: s for s in (*values, *together)}.values())


def label(combinations: list[dict[str, Any]]) -> list[str]:
    """A short name for each combination that can be a folder's: "pruner=score,sparsity=0.9"."""
    addresses = {address for settings in combinations for address in settings}
    tails = [a.split(".")[-1] for a in addresses]
    labels: dict[str, None] = {}
    counts: Counter[str] = Counter()
    for settings in combinations:
        parts = []
        for address, value in settings.items():
            tail = address.split(".")[-1]
            parts.append(f"{tail if tails.count(tail) == 1 else address}={_word(value)}")
        short = re.sub(r"[^A-Za-z0-9_.=,+-]", "_", ",".join(parts))[:LONGEST] or "run"
        while (label := short + _number(counts[short])) in labels:
            counts[short] += 1
        labels[label] = None
    return list(labels)


def _number(n: int) -> str:
    """What is added to a label that is taken n times: "+", "++", and so on while that is short."""
    return "+" * n if n < 10 else f"+{n}"


def _freeze(value: Any) -> Any:
    """The same for equal values, and hashable."""
    if isinstance(value, dict):
        return frozenset((key, _freeze(inner)) for key, inner in value.items())
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def _word(value: Any) -> str:
    if isinstance(value, dict):
        rest = [f"{k}={_word(v)}" for k, v in value.items() if k != "use"]
        return "+".join([*([str(value["use"])] if "use" in value else []), *rest])
    if isinstance(value, list):
        return "+".join(map(_word, value))
    return str(value)
