"""One batch of everything, before anything is trained."""

from prunekit.engine.rehearsal import reduce_plan
from prunekit.report import StageStarted

SWEEP = """
dataset = "digits"
architecture = "small-cnn"
objective = "trades"
threat = { eps = 0.1 }
[[stage]]
kind = "pretrain"
epochs = 1
[[stage]]
kind = "prune"
sparsity = 0.9
pruner = "score"
epochs = 1
[[stage]]
kind = "evaluate"
with = ["clean"]
[sweep]
"prune.pruner" = ["score", "lwm"]
"prune.sparsity" = [0.5, 0.9, 0.95]
seed = [0, 1]
"""


def test_smoke_runs_each_component_once_with_tiny_numbers(bench):
    full = bench.plan("pretrain.epochs=50", recipe=SWEEP)
    small = reduce_plan(full)
    assert (len(full.runs), len(small.runs)) == (12, 2)
    assert small.smoke
    run = small.runs[0]
    assert run.data.batch_size == 8
    assert {s.limit for s in run.stages} == {2}
    assert [getattr(s.options, "epochs", None) for s in run.stages] == [1, 1, None]
    assert run.stages[0].options.objective.options.steps == 2
    assert run.stages[1].sparsity == full.runs[0].stages[1].sparsity
    one_shot = next(r for r in small.runs if r.stages[1].options.pruner.component.name == "lwm")
    assert one_shot.stages[1].options.epochs is None


def test_the_rehearsal_catches_the_last_stage_before_the_first_is_trained(bench, parts, fail):
    parts.act["evaluator"] = fail(AssertionError("shapes"))
    (folder,) = bench.run(recipe=bench.recipe.replace('"clean"', '"told"'))
    assert folder.status == "failed"
    assert "plugin told (told-dist 1.2) failed: AssertionError: shapes" in folder.error
    assert not bench.of(StageStarted)
    assert not list((bench.folder / "store").glob("*/*/result.json"))


def test_a_run_is_not_spared_because_its_twin_failed(bench):
    """Runs that differ in numbers: the first fails in rehearsal, the second is fine."""
    recipe = bench.recipe.replace('pruner = "lwm"', 'pruner = "lwm"\nbudget = "global"')
    folders = bench.run(recipe=recipe + '[sweep]\n"prune.sparsity" = [0.9999, 0.5]\n')
    assert [f.status for f in folders] == ["failed", "done"]
    assert "leaves no weight of" in folders[0].error


def test_one_rehearsal_speaks_for_runs_that_differ_in_numbers(bench, parts):
    recipe = bench.recipe.replace('"clean"', '"told"') + "[sweep]\nseed = [0, 1, 2]\n"
    folders = bench.run(recipe=recipe)
    assert [f.status for f in folders] == ["done"] * 3
    assert parts.seen.count("evaluator") == 1 + 3


def test_a_failure_is_rehearsed_for_every_run_that_shares_it(bench, parts, fail):
    parts.act["evaluator"] = fail(ValueError("x"))
    recipe = bench.recipe.replace('"clean"', '"told"') + "[sweep]\nseed = [0, 1]\n"
    folders = bench.run(recipe=recipe)
    assert [f.status for f in folders] == ["failed", "failed"]
    assert not bench.of(StageStarted)
