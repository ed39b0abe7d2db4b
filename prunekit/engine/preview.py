"""What a run would do, without doing it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from prunekit.catalog.containment import ask
from prunekit.data.batches import Feed
from prunekit.engine.keys import make_keys
from prunekit.engine.work import Inputs, Loaded, build_state, open_place
from prunekit.errors import relative
from prunekit.judging import LOOKS
from prunekit.models.failures import explained
from prunekit.pruning.layers import find_prunable
from prunekit.recipe.plan import Plan, Run
from prunekit.recipe.stages import Stage
from prunekit.report import Event, Note
from prunekit.store.stages import Store
from prunekit.training.compute import Compute


def preview_plan(plan: Plan, out: Path, store: Path) -> dict[str, Any]:
    """What a run would do: resolved recipes, stages, stored or not, steps, passes.

    Downloads nothing: where data are missing, sizes are those that the data set declares.
    """
    plan.permit()
    notes = list(plan.notes)

    def report(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    place = open_place(plan)
    inputs = Inputs(place, report, plan.smoke, preview=True)
    seen: set[str] = set()
    counts: dict[str, dict[str, int]] = {}
    runs: list[dict[str, Any]] = []
    for run in plan.runs:
        with explained(run):
            runs.append(_preview_run(run, inputs.load(run), place, Store(store), seen, counts))
    return {
        "out": relative(out),
        "store": relative(store),
        "smoke": plan.smoke,
        "notes": list(dict.fromkeys(notes)),
        "runs": runs,
    }


def _preview_run(
    run: Run,
    loaded: Loaded,
    compute: Compute,
    store: Store,
    seen: set[str],
    counts: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """What `preview_plan` says of one run; `seen` are the stages of the runs before it.

    `counts` are those of their networks, since building a large one takes seconds.
    """
    recipe = run.describe()
    network = str((recipe["architecture"], recipe["dataset"], run.trains_first))
    if network not in counts:
        model = build_state(run, loaded.data, compute, weights=False).model
        prunable = (w for w in find_prunable(model).values() if w.requires_grad)
        counts[network] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "prunable": sum(w.numel() for w in prunable),
        }
    stages: list[dict[str, Any]] = []
    for stage, made in zip(run.stages, make_keys(run, loaded, compute), strict=True):
        steps, passes = _count_work(run, loaded, stage, compute)
        key, done = made.key, all(store.folder(part).done for part in made.parts)
        status = "stored" if done else "shared" if key in seen else "to do"
        seen.add(key)
        told = {"name": stage.name, "kind": stage.kind, "key": key, "status": status}
        stages.append({**told, "steps": steps, "forward_passes": passes})
    return {
        "run": run.label,
        **counts[network],
        "recipe": recipe,
        "stages": stages,
    }


def _count_work(run: Run, loaded: Loaded, stage: Stage, compute: Compute) -> tuple[int, int]:
    """(optimizer steps, forward passes of a batch) of a stage."""
    options, size = stage.options, run.data.batch_size
    if stage.kind == "evaluate":
        images = min(options.images or math.inf, len(loaded.data.test.labels))
        batches = min(math.ceil(images / size), stage.limit or math.inf)
        passes = sum(ask(u, "forward_passes") for u in options.with_)
        return 0, int(batches) * passes + LOOKS * len(options.with_)
    parts, limits = (loaded.data.train, loaded.validation), (stage.limit, options.validation_images)
    feed = Feed(*parts, size, compute.device, (), None, *limits)
    use, batches = options.objective, feed.count()
    once = ask(use, "forward_passes") if use else 1
    beside = 0
    if stage.kind == "prune":
        beside = ask(options.pruner, "forward_passes", batches, once)
        beside += batches if options.bn == "recalibrate" else 0
    if options.epochs is None:
        return 0, beside
    steps = stage.epochs * batches * stage.replays
    judged = ask(use, "validation_passes")
    if options.validate:
        judged += ask(options.validate, "forward_passes")
    validation = feed.count_validation()
    checked = stage.epochs * validation * judged + (LOOKS if validation else 0)
    again = once - ask(use, "attack_passes")
    more = 0
    for wrapper in options.wrap:
        active = max(0, stage.epochs - ask(wrapper, "idle", stage.epochs))
        more += active * batches * stage.replays * (ask(wrapper, "passes") - 1) * again
        more += active * min(ask(wrapper, "batches"), batches) * once
    return steps, steps * once + more + checked + beside
