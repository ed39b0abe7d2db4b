"""The hooks: one for each kind of component, all of one shape.

A plugin is a module that an entry point of the group `prunekit` names:

    [project.entry-points.prunekit]
    mine = "my_plugin"

Hooks only declare; the code of a component is imported when a recipe uses it. For each kind,
`prunekit new plugin my-plugin --kind KIND` writes a complete package with tests, which
docs/plugins.md shows and explains.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from prunekit.catalog.kinds import (
    ArchitectureComponent,
    BudgetComponent,
    DatasetComponent,
    EvaluatorComponent,
    ObjectiveComponent,
    OptimizerComponent,
    PrunerComponent,
    ReporterComponent,
    RewirerComponent,
    ScheduleComponent,
    SparsityScheduleComponent,
    WrapperComponent,
)

hookspec = pluggy.HookspecMarker("prunekit")


@hookspec
def prunekit_objectives() -> Iterable[ObjectiveComponent]:
    """Training losses. `build` returns an `Objective`."""
    raise NotImplementedError


@hookspec
def prunekit_pruners() -> Iterable[PrunerComponent]:
    """Scores of weights. `build` returns a `Pruner`; the core handles budgets and structures."""
    raise NotImplementedError


@hookspec
def prunekit_architectures() -> Iterable[ArchitectureComponent]:
    """Networks. `build` returns an `nn.Module` from pixels in [0, 1] to logits."""
    raise NotImplementedError


@hookspec
def prunekit_datasets() -> Iterable[DatasetComponent]:
    """Labeled images. `build` returns `Data`; `facts` gives the shape before any file is read."""
    raise NotImplementedError


@hookspec
def prunekit_evaluators() -> Iterable[EvaluatorComponent]:
    """Evaluations of a network. `build` returns an `Evaluator`."""
    raise NotImplementedError


@hookspec
def prunekit_budgets() -> Iterable[BudgetComponent]:
    """How layers share the sparsity. `build` returns a `Budget`."""
    raise NotImplementedError


@hookspec
def prunekit_sparsity_schedules() -> Iterable[SparsityScheduleComponent]:
    """How the sparsity grows during a stage. `build` returns a `SparsitySchedule`."""
    raise NotImplementedError


@hookspec
def prunekit_rewirers() -> Iterable[RewirerComponent]:
    """Masks that change while weights train. `build` returns a `Rewirer`."""
    raise NotImplementedError


@hookspec
def prunekit_wrappers() -> Iterable[WrapperComponent]:
    """What goes around training steps or follows them. `build` returns a `Wrapper`."""
    raise NotImplementedError


@hookspec
def prunekit_reporters() -> Iterable[ReporterComponent]:
    """Receivers of a run's events. `build` returns a `Reporter`."""
    raise NotImplementedError


@hookspec
def prunekit_optimizers() -> Iterable[OptimizerComponent]:
    """Optimizers of weights or scores. `build` returns an `OptimizerChoice`."""
    raise NotImplementedError


@hookspec
def prunekit_schedules() -> Iterable[ScheduleComponent]:
    """Schedules of the learning rate. `build` returns a `Schedule`."""
    raise NotImplementedError
