"""Which run of a sweep comes next, where several go side by side and share results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

from prunekit.catalog.containment import held
from prunekit.engine.engine import Engine
from prunekit.engine.keys import make_keys
from prunekit.recipe.plan import Run


def choose(
    waiting: Mapping[str, Sequence[str]],
    owed: Iterable[str],
    is_held: Callable[[str], bool] = lambda key: False,
) -> str | None:
    """The run to begin, of those `waiting` (label -> keys of the results it lacks, in order).

    It is the one whose first result most of the others lack; the first of several, and last those
    whose first result `is_held` by somebody else. None if each would wait for a result that is
    `owed` by a run that has begun.

    >>> waiting = {"a": ["own", "x"], "b": ["shared", "y"], "c": ["shared", "z"]}
    >>> choose(waiting, []), choose({"c": ["shared", "z"]}, ["shared", "y"])
    ('b', None)
    """
    owed = set(owed)
    wanted = Counter(key for keys in waiting.values() for key in keys)
    first = {label: keys[0] if keys else "" for label, keys in waiting.items()}
    free = [label for label, key in first.items() if key not in owed]
    return max(free, key=lambda f: (not is_held(first[f]), wanted[first[f]]), default=None)


class Schedule:
    """What the runs lack, by their keys; results that are broken or cannot be named are nothing."""

    def __init__(self, engine: Engine, runs: Sequence[Run], broken: Iterable[str]) -> None:
        self.is_held = engine.store.is_held
        self.waiting = {run.label: run for run in runs}
        self.parts: dict[str, dict[str, tuple[str, ...]]] = {name: {} for name in self.waiting}
        for label in self.waiting.keys() - set(broken):
            # What is wrong with it is told where it is executed.
            with suppress(Exception), held():
                run = self.waiting[label]
                keys = make_keys(run, engine.inputs.load(run), engine.compute)
                pairs = zip(keys, run.stages, strict=True)
                # A run goes on without an evaluation that another one computes.
                ordered = sorted(pairs, key=lambda pair: pair[1].kind == "evaluate")
                self.parts[label] = {key.key: key.parts for key, _ in ordered}
        known = {part for parts in self.parts.values() for ps in parts.values() for part in ps}
        self.stored = {part for part in known if engine.store.folder(part).done}

    def _find_lacking(self, label: str) -> list[str]:
        parts = (part for parts in self.parts[label].values() for part in parts)
        return [part for part in parts if part not in self.stored]

    def take(self, begun: Iterable[str]) -> Run | None:
        """The run to begin beside those that have; None if it has to wait for one of them."""
        owed = (part for label in begun for part in self._find_lacking(label))
        waiting = {label: self._find_lacking(label) for label in self.waiting}
        label = choose(waiting, owed, self.is_held)
        return None if label is None else self.waiting.pop(label)

    def note(self, label: str, key: str) -> None:
        """A stage of a run is stored."""
        self.stored.update(self.parts[label].get(key, ()))
