"""prunekit prunes adversarially robust neural networks.

What is here, and in the modules `contracts`, `errors`, `evaluation`, `report` and `testing` beside
it, is what programs and plugins may import; everything deeper may change.
"""

import importlib
from typing import TYPE_CHECKING, Any

from prunekit.catalog.component import (
    API_VERSION,
    Component,
    NoOptions,
    Radius,
    Threatened,
    Use,
    hookimpl,
    option,
)
from prunekit.catalog.kinds import (
    ArchitectureComponent,
    BackendComponent,
    BudgetComponent,
    DatasetComponent,
    EvaluatorComponent,
    Facts,
    ObjectiveComponent,
    OptimizerComponent,
    PrunerComponent,
    ReporterComponent,
    RewirerComponent,
    ScheduleComponent,
    SparsityScheduleComponent,
    WrapperComponent,
)
from prunekit.errors import DataMissingError, OptionError, RunError, UserError, suggest

if TYPE_CHECKING:
    from prunekit.api import Judgement, RunResult, evaluate, load, make_masks, run, run_sweep
    from prunekit.data.batches import Arrays
    from prunekit.data.seeds import derive_seed
    from prunekit.engine.evaluating import judge_batches
    from prunekit.models.building import find_fragile, normalize_inputs
    from prunekit.pruning.budgets import count_kept, exact, share_out, uniform
    from prunekit.pruning.learning import copy_plain, effective_parameters
    from prunekit.pruning.masks import apply_masks
    from prunekit.pruning.selection import count_units, select_masks
    from prunekit.pruning.straight_through import straight_through
    from prunekit.reading import hash_file
    from prunekit.results.metrics import format_metric, format_setting, is_fraction, is_main
    from prunekit.store.files import read_json, read_kept, write_json
    from prunekit.store.keys import version_of
    from prunekit.training.learned_weights import LearnedWeights
    from prunekit.training.masking import LearnedScores

__all__ = [
    "API_VERSION", "ArchitectureComponent", "Arrays", "BackendComponent", "BudgetComponent",
    "Component",
    "DataMissingError", "DatasetComponent", "EvaluatorComponent", "Facts", "Judgement",
    "LearnedScores", "LearnedWeights", "NoOptions", "ObjectiveComponent", "OptimizerComponent",
    "OptionError", "PrunerComponent", "Radius", "ReporterComponent", "RewirerComponent",
    "RunError", "RunResult", "ScheduleComponent", "SparsityScheduleComponent", "Threatened",
    "Use", "UserError", "WrapperComponent", "apply_masks", "copy_plain", "count_kept",
    "count_units", "derive_seed", "effective_parameters", "evaluate", "exact", "find_fragile",
    "format_metric", "format_setting", "hash_file", "hookimpl", "is_fraction", "is_main",
    "judge_batches", "load", "make_masks", "normalize_inputs", "option", "read_json",
    "read_kept", "run", "run_sweep", "select_masks", "share_out", "straight_through", "suggest",
    "uniform", "version_of", "write_json",
]  # fmt: skip
__version__ = "0.1.0"

_HOMES = {
    "prunekit.api": (
        "Judgement",
        "RunResult",
        "evaluate",
        "load",
        "make_masks",
        "run",
        "run_sweep",
    ),
    "prunekit.data.batches": ("Arrays",),
    "prunekit.data.seeds": ("derive_seed",),
    "prunekit.engine.evaluating": ("judge_batches",),
    "prunekit.models.building": ("find_fragile", "normalize_inputs"),
    "prunekit.store.keys": ("version_of",),
    "prunekit.pruning.budgets": ("count_kept", "exact", "share_out", "uniform"),
    "prunekit.pruning.learning": ("copy_plain", "effective_parameters"),
    "prunekit.pruning.masks": ("apply_masks",),
    "prunekit.pruning.selection": ("count_units", "select_masks"),
    "prunekit.pruning.straight_through": ("straight_through",),
    "prunekit.training.learned_weights": ("LearnedWeights",),
    "prunekit.training.masking": ("LearnedScores",),
    "prunekit.reading": ("hash_file",),
    "prunekit.results.metrics": ("format_metric", "format_setting", "is_fraction", "is_main"),
    "prunekit.store.files": ("read_json", "read_kept", "write_json"),
}
"""Module -> what is imported from it when it is first used, since torch takes seconds to import."""

_LATER = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
