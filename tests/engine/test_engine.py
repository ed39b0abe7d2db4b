"""Runs from recipe to results: sharing, resuming, failing."""

import json
import threading

import pytest
import torch
from safetensors.torch import load_file

from prunekit.engine import work as module
from prunekit.errors import Interrupted
from prunekit.models.failures import explain
from prunekit.recipe.reduction import reduce_plan
from prunekit.report import EpochDone, Note, RunDone, RunFailed, StageDone, StageStarted
from prunekit.store.stages import Store


def model_of(folder):
    return (folder.path / "model.safetensors").read_bytes()


def test_a_run_leaves_a_plain_pruned_network(bench):
    (folder,) = bench.run()
    assert folder.status == "done"
    state = load_file(folder.path / "model.safetensors")
    weights = {name: w for name, w in state.items() if name.endswith("weight")}
    zeros = {name: int((w == 0).sum()) for name, w in weights.items()}
    assert zeros == {name: w.numel() // 2 for name, w in weights.items()}
    before, after = (folder.metrics[name] for name in ("prune", "finetune"))
    assert before["masks"] == after["masks"]
    assert after["sparsity"] == 0.5
    # Finetuning trained what is kept, and kept the mask to the bit.
    (run,) = bench.plan().runs
    keys = bench.make_keys(run)
    pruned = load_file(bench.folder / "store/v2" / keys[1] / "model.safetensors")
    for name in weights:
        assert torch.equal(pruned[name] == 0, state[name] == 0)
        assert not torch.equal(pruned[name], state[name])


@pytest.mark.parametrize("recipe", ["recipe", "scored"], ids=["lwm", "score"])
def test_the_same_run_twice_gives_the_same_bytes(bench, recipe):
    recipe = getattr(bench, recipe)
    (first,) = bench.run(recipe=recipe)
    torch.manual_seed(5)
    (again,) = bench.run(recipe=recipe, out="again", store="other")
    (other,) = bench.run("seed=1", recipe=recipe, out="seed")
    assert model_of(first) == model_of(again)
    assert model_of(first) != model_of(other)
    assert first.metrics == again.metrics


@pytest.mark.parametrize("stage", ["pretrain", "prune", "finetune"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(bench, stage):
    """The network that goes on is built anew; the stopped one came from the stage before."""
    recipe = bench.scored.replace("epochs = 2", "epochs = 3")
    (whole,) = bench.run(recipe=recipe, out="whole", store="other")
    engine = bench.engine()

    def report(event):
        bench.events.append(event)
        if isinstance(event, EpochDone) and (event.stage, event.epoch) == (stage, 1):
            engine.stop.requested = True

    engine.report = report
    with pytest.raises(Interrupted):
        engine.run(bench.plan(recipe=recipe), bench.folder / "out")
    record = json.loads((bench.folder / "out" / "run.json").read_text())
    assert record["status"] == "interrupted"
    bench.events.clear()
    (folder,) = bench.run(recipe=recipe)
    assert model_of(folder) == model_of(whole)
    assert folder.metrics == whole.metrics
    (started,) = [e for e in bench.of(StageStarted) if e.stage == stage]
    assert started.epoch == 1
    # Its first epoch keeps its time, of which nothing was spent in this process.
    told = [e for e in bench.of(EpochDone) if e.stage == stage]
    assert [e.stored for e in told] == [True, *[False] * (len(told) - 1)]
    assert 0 < told[0].seconds == started.seconds
    (computed,) = [e for e in bench.of(StageDone) if e.stage == stage]
    assert computed.seconds >= sum(e.seconds for e in told)
    bench.events.clear()
    bench.run(recipe=recipe, out="stored")
    again = [e for e in bench.of(EpochDone) if e.stage == stage]
    assert [(e.seconds, e.decides) for e in again] == [(e.seconds, e.decides) for e in told]
    assert told[0].decides == "validation.accuracy"
    assert bench.run(recipe=recipe)[0].metrics == whole.metrics


SWEEP = '[sweep]\n"prune.pruner" = ["lwm", "random"]\n"prune.sparsity" = [0.5, 0.7]\n'


def test_a_shared_pretraining_is_computed_once(bench):
    folders = bench.run(recipe=bench.recipe + SWEEP)
    assert [f.status for f in folders] == ["done"] * 4
    done = [(e.stage, e.reused) for e in bench.of(StageDone)]
    assert done.count(("pretrain", False)) == 1
    assert done.count(("pretrain", True)) == 3
    assert done.count(("finetune", False)) == 4
    assert len({model_of(f) for f in folders}) == 4
    # What is reused is told again.
    assert sum(e.stored for e in bench.of(EpochDone)) == 6


def test_a_second_start_computes_nothing(bench):
    (first,) = bench.run()
    bench.events.clear()
    (again,) = bench.run(out="again")
    assert all(e.reused for e in bench.of(StageDone))
    assert not bench.of(Note)
    assert model_of(first) == model_of(again)
    assert first.metrics == again.metrics


FAILING = '[sweep]\n"prune.pruner" = ["lwm", "told", "random"]\n'


def test_a_failing_run_does_not_stop_the_others(bench, parts, fail):
    parts.act["pruner"] = fail(ValueError("no luck\nmore"))
    folders = bench.run(recipe=bench.recipe + FAILING)
    assert [f.status for f in folders] == ["done", "failed", "done"]
    (failed,) = bench.of(RunFailed)
    assert failed.error == folders[1].error
    assert failed.error == (
        "plugin told (told-dist 1.2) failed: ValueError: no luck (--debug shows where)"
    )
    assert len(bench.of(RunDone)) == 2
    record = json.loads((folders[1].path / "run.json").read_text())
    assert (record["status"], record["error"]) == ("failed", failed.error)
    assert isinstance(folders[1].cause, ValueError)
    parts.act.clear()
    bench.events.clear()
    folders = bench.run(recipe=bench.recipe + FAILING)
    assert [f.status for f in folders] == ["done"] * 3
    computed = [e.stage for e in bench.of(StageDone) if not e.reused]
    assert computed == ["prune", "finetune", "evaluate"]


def test_a_run_that_fails_later_than_its_rehearsal(bench, parts, fail):
    """Stages that share what failed are not tried again."""
    recipe = (
        bench.recipe.replace('use = "benign"', 'use = "told"')
        + '[sweep]\n"finetune.epochs" = [2, 3]'
    )
    steps = []
    parts.act["objective"] = lambda: steps.append(1) or len(steps) < 6 or fail(KeyError("x"))()
    folders = bench.run(recipe=recipe)
    assert [f.status for f in folders] == ["failed", "failed"]
    assert folders[0].error == folders[1].error
    assert len(steps) == 6


def test_what_failed_holds_no_tensors(bench, parts, fail):
    parts.act["evaluator"] = fail(ValueError("x"))
    (folder,) = bench.run(recipe=bench.recipe.replace('"clean"', '"told"'))
    frames, link = [], folder.cause.__traceback__
    while link is not None:
        frames.append(link.tb_frame)
        link = link.tb_next
    inner = [f for f in frames if f.f_code.co_name in ("evaluate", "_compute")]
    assert inner
    assert not any(f.f_locals for f in inner)


def test_another_process_is_waited_for_and_its_result_reused(bench):
    (first,) = bench.run()
    (run,) = bench.plan().runs
    key = bench.make_keys(run)[0]
    store = Store(bench.folder / "store")
    result = store.folder(key).path / "result.json"
    content = result.read_text()
    result.unlink()
    locked, told = threading.Event(), threading.Event()

    def other_process():
        with store.locked(key, pytest.fail) as folder:
            locked.set()
            assert told.wait(20)
            (folder.path / "result.json").write_text(content)

    thread = threading.Thread(target=other_process)
    thread.start()
    assert locked.wait(10)

    def report(event):
        bench.events.append(event)
        if isinstance(event, Note) and "another process" in event.text:
            told.set()

    bench.events.clear()
    (again,) = bench.run(out="again", report=report)
    thread.join(20)
    assert told.is_set()
    assert all(e.reused for e in bench.of(StageDone))
    assert model_of(again) == model_of(first)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate "
                     "memory: you tried to allocate 4 bytes"),
    ],
    ids=["python", "cuda", "cpu"],
)  # fmt: skip
def test_memory_errors_say_what_to_do(bench, parts, error, fail):
    parts.act["pruner"] = fail(error)
    (folder,) = bench.run(recipe=bench.recipe.replace('"lwm"', '"told"'))
    assert folder.error.startswith("memory ran out")
    assert "--set dataset.batch_size=4" in folder.error


def test_errors_of_the_core_blame_no_plugin(bench):
    (run,) = bench.plan().runs
    with pytest.raises(AttributeError) as caught:
        module.describe_counts(None)
    assert explain(caught.value, run).startswith("AttributeError: ")
    assert explain(ValueError(), run) == "ValueError (--debug shows where)"


MANY = """
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
    full = bench.plan("pretrain.epochs=50", recipe=MANY)
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
