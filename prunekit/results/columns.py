"""What tells runs apart: the settings in which they differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunekit.results.settings import Settings, read_settings
from prunekit.store.layout import EVALUATIONS, PLAN
from prunekit.store.records import RunRecord


def freeze(value: Any) -> str:
    """The value as text that is the same for equal values; `json.loads` undoes it."""
    return json.dumps(value, sort_keys=True, default=str)


def gather_settings(runs: Sequence[RunRecord]) -> list[Settings]:
    """The settings of each run; an evaluation has those of the run whose network it judged."""
    own = {run.folder: read_settings(run.folder, run.settings) for run in runs}
    found = []
    for run in runs:
        above = run.folder.parent
        judged = own.get(above.parent) if above.name == EVALUATIONS else None
        found.append(_inherit(own[run.folder], judged))
    shared = all(map(_shares_objective, found))
    return [_lift(settings) if shared else settings for settings in found]


def _inherit(own: Settings, judged: Settings | None) -> Settings:
    if judged is None:
        return own
    general = dict(judged.general)
    if own.general.get("dataset") != general.get("dataset"):
        general = {a: v for a, v in general.items() if a.partition(".")[0] != "dataset"}
    # Of the network, an evaluation says no more than its file.
    told = own.general.items()
    general |= {a: v for a, v in told if a.partition(".")[0] in ("dataset", "threat")}
    before = dict.fromkeys(own.judging, len(judged.training))
    others = {address for judging in judged.judging.values() for address in judging}
    swept = {a: v for a, v in judged.swept.items() if a not in others} | dict(own.swept)
    names = {**own.names, **judged.names}
    return Settings(general, own.judging, swept, names, judged.training, before)


def _shares_objective(settings: Settings) -> bool:
    """Whether all training stages that have an objective have the same."""
    by_stage: dict[str, dict[str, Any]] = {}
    for address, value in settings.general.items():
        stage, _, rest = address.partition(".")
        if stage in settings.training and (rest + ".").startswith("objective."):
            by_stage.setdefault(stage, {})[rest] = value
    return len(set(map(freeze, by_stage.values()))) <= 1


def _lift(settings: Settings) -> Settings:
    """Settings with the objective that all stages share at one address."""

    def rename(address: str) -> str:
        stage, _, rest = address.partition(".")
        lifts = stage in settings.training and (rest + ".").startswith("objective.")
        return rest if lifts else address

    return replace(
        settings,
        general={rename(address): value for address, value in settings.general.items()},
        swept={rename(address): value for address, value in settings.swept.items()},
        names={written: rename(address) for written, address in settings.names.items()},
    )


def find_plan(run: RunRecord) -> Path:
    """The folder of the plan that a run is of: for a run of a sweep, that around its own."""
    swept = (run.folder.parent / PLAN).is_file() and not (run.folder / PLAN).is_file()
    return run.folder.parent if swept else run.folder


def find_columns(runs: Sequence[RunRecord], told: Sequence[Settings]) -> list[str]:
    """The addresses in which runs differ, "name" first, then those that a sweep gives.

    What only follows from another difference is left out: a one-shot pruner has no epochs, another
    optimizer has another default rate in every run of a sweep. The columns still determine all
    settings.
    """
    seen = list(_observe(runs, told))
    swept = dict.fromkeys(("name", *(address for settings in told for address in settings.swept)))
    others = (address for one in seen for address in one.values)
    columns: list[str] = []
    rest: list[str] = []
    for address in dict.fromkeys((*swept, *others)):
        by_stage: dict[str, set[str | None]] = {}
        for one in seen:
            by_stage.setdefault(one.stage, set()).add(one.values.get(address))
        differ = any(len(found - {None}) > 1 for found in by_stage.values())
        lacking = any(len(found) > 1 for found in by_stage.values())
        # An evaluator that only some runs have is seen from its metrics.
        evaluators = {None, freeze(address)}
        if differ and (address in swept or not _follows(address, seen)):
            columns.append(address)
        elif differ or (lacking and not any(found == evaluators for found in by_stage.values())):
            if not differ and (owner := _find_owner(address, seen)):
                rest += [address] * (not _is_told(address, [owner], seen))
            else:
                (columns if address in swept else rest).append(address)
    for address in rest:
        if not _is_told(address, columns, seen):
            columns.append(address)
    return columns


@dataclass(frozen=True)
class _Seen:
    """The frozen settings of a run, or of one of its evaluate stages."""

    plan: Path
    stage: str
    values: Mapping[str, str]


def _observe(runs: Sequence[RunRecord], told: Sequence[Settings]) -> Iterator[_Seen]:
    for run, settings in zip(runs, told, strict=True):
        plan = find_plan(run)
        general = {"name": run.name, **settings.swept, **settings.general}
        frozen = {address: freeze(value) for address, value in general.items()}
        yield _Seen(plan, "", frozen)
        for stage, judging in settings.judging.items():
            own = {address: freeze(value) for address, value in judging.items()}
            yield _Seen(plan, stage, {**frozen, **own})


def _follows(address: str, seen: Sequence[_Seen]) -> bool:
    """Whether values differ within a sweep, which then brings the difference about."""
    by_plan: dict[tuple[str, Path], set[str]] = {}
    for one in seen:
        if address in one.values:
            by_plan.setdefault((one.stage, one.plan), set()).add(one.values[address])
    return any(len(found) > 1 for found in by_plan.values())


def _find_owner(address: str, seen: Sequence[_Seen]) -> str:
    """The component that an address is an option of; "" if it is of none."""
    owner = address.rpartition(".")[0]
    while owner and not any(owner in one.values for one in seen):
        owner = owner.rpartition(".")[0]
    return owner


def _is_told(address: str, columns: Sequence[str], seen: Sequence[_Seen]) -> bool:
    """Whether the columns determine the value at an address."""
    known: dict[tuple[str | None, ...], str | None] = {}
    for one in seen:
        key = (one.stage, *map(one.values.get, columns))
        value = one.values.get(address)
        if known.setdefault(key, value) != value:
            return False
    return True
