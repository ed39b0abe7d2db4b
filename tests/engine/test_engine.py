"""Runs from recipe to results: sharing, resuming, failing, and what is damaged on disk."""

import json
import os
import shutil
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prunekit.engine import work as module
from prunekit.errors import Interrupted, UserError
from prunekit.models.failures import explain
from prunekit.reading import hash_file
from prunekit.recipe.reduction import reduce_plan
from prunekit.report import EpochDone, Note, RunDone, RunFailed, StageDone, StageStarted
from prunekit.store.files import read_npz, seal, set_aside, write_npz
from prunekit.store.records import find_changed
from prunekit.store.stages import StageResult, Store
from prunekit.store.tensors.checkpoint import read_checkpoint, read_header, write_checkpoint


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
    pruned = load_file(bench.folder / "store/v3" / keys[1] / "model.safetensors")
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
    live = [list(e.metrics) for e in bench.of(EpochDone)]
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
    assert [list(e.metrics) for e in bench.of(EpochDone)] == live  # in the order of a table
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
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
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


# What is damaged is told, moved aside and computed again, to the same bytes


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def zero(path):
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        told = json.loads(file.read(size))["__metadata__"]
    save_file({name: value * 0 for name, value in load_file(path).items()}, path, told)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def forge(folder, **told):
    """A store that agrees with itself on a model whose header says what is `told`."""
    model, result = folder / "model.safetensors", folder / "result.json"
    state, header = read_checkpoint(model)
    write_checkpoint(model, state, header | told)
    content = json.loads(result.read_text())
    content["files"] = {model.name: hash_file(model)}
    result.write_text(json.dumps({**content, "sha256": seal(content)}))


def replace_by_folder(path):
    path.unlink()
    (path / "inner").mkdir(parents=True)


STORED = {
    "a flipped bit": lambda stage, other: flip(stage / "model.safetensors"),
    "zeroed weights": lambda stage, other: zero(stage / "model.safetensors"),
    "another model": lambda stage, other: shutil.copy(other / "model.safetensors", stage),
    "another stage": lambda stage, other: shutil.copytree(other, stage, dirs_exist_ok=True),
    "a model of another stage": lambda stage, other: forge(
        stage, stage=read_header(other / "model.safetensors")["stage"]
    ),
    "a model of another recipe": lambda stage, other: forge(stage, seed=5),
    "no model": lambda stage, other: (stage / "model.safetensors").unlink(),
    "a folder for a model": lambda stage, other: replace_by_folder(stage / "model.safetensors"),
    "an edited number": lambda stage, other: edit(stage / "result.json", seconds=0.5),
    "wrong types": lambda stage, other: edit(stage / "result.json", metrics=[], notes=3),
    "no result": lambda stage, other: (stage / "result.json").write_bytes(b"\xff{"),
    "a list": lambda stage, other: (stage / "result.json").write_text("[]"),
    "a folder for a result": lambda stage, other: replace_by_folder(stage / "result.json"),
}


@pytest.mark.parametrize("damage", STORED.values(), ids=STORED)
def test_a_damaged_stage_is_computed_again(bench, damage):
    bench.run(out="whole")
    whole = (bench.folder / "whole/model.safetensors").read_bytes()
    (run,) = bench.plan().runs
    first, second, *_ = (bench.folder / "store/v3" / key for key in bench.make_keys(run))
    damage(second, first)
    bench.events.clear()
    (folder,) = bench.run()
    assert (folder.path / "model.safetensors").read_bytes() == whole
    assert [event.reused for event in bench.of(StageDone)] == [True, False, True, True]
    (told,) = (event.text for event in bench.of(Note) if event.warning)
    aside = second.with_name(f"{second.name}.damaged1")
    assert f"the stored stage {second} is damaged (" in told
    assert told.endswith(f"it is computed again, and what was there is now in {aside}")
    assert "\n" not in told
    assert any(aside.iterdir())


def test_clean_deletes_what_was_moved_aside(bench):
    bench.run()
    store = Store(bench.folder / "store")
    (run,) = bench.plan().runs
    keys = bench.make_keys(run)
    flip(store.folder(keys[0]).model)
    bench.run(out="again")
    stray = set_aside(write(store.stages / "stray"))
    used = {part.name for part in store.stages.iterdir()} - {f"{keys[0]}.damaged1", stray.name}
    assert {name for name, _ in store.remove_unused(used)} == {f"{keys[0]}.damaged1", stray.name}
    assert {part.name for part in store.stages.iterdir()} == used


def write(path):
    path.write_bytes(b"garbage")
    return path


@pytest.mark.parametrize("value", [0.9, "0.9"])
def test_an_edited_accuracy_is_not_believed(bench, value):
    bench.run()
    for result in (bench.folder / "store/v3").glob("*/result.json"):
        content = json.loads(result.read_text())
        if "accuracy" in content["metrics"] and "network" in content["metrics"]:
            content["metrics"]["accuracy"]["value"] = value
            result.write_text(json.dumps(content))
    bench.events.clear()
    (folder,) = bench.run(out="again")
    assert [event.reused for event in bench.of(StageDone)] == [True, True, True, False]
    assert folder.metrics["evaluate"]["clean.accuracy"] != value


UNFINISHED = {
    "a flipped bit": lambda file: flip(file),
    "garbage": write,
    "an empty file": lambda file: file.write_bytes(b""),
    "a folder": replace_by_folder,
    "other tensors": lambda file: save_file(load_file(file), file),
    "a link": lambda file: file.rename(file.with_name("x")) and file.symlink_to("x"),
}


@pytest.mark.parametrize("damage", UNFINISHED.values(), ids=UNFINISHED)
def test_a_damaged_checkpoint_starts_the_stage_anew(bench, damage):
    (whole,) = bench.run(out="whole", store="other")
    engine = bench.engine()

    def report(event):
        if isinstance(event, EpochDone):
            engine.stop.requested = True

    engine.report = report
    with pytest.raises(Interrupted):
        engine.run(bench.plan(), bench.folder / "out")
    (progress,) = (bench.folder / "store/v3").glob("*/progress.safetensors")
    damage(progress)
    (folder,) = bench.run()
    assert folder.status == "done"
    assert any("is damaged" in event.text for event in bench.of(Note))
    left = (bench.folder / "store/v3").glob("*/progress*.safetensors")
    assert not [file for file in left if "damaged" not in file.parent.name]
    model = "model.safetensors"
    assert (folder.path / model).read_bytes() == (whole.path / model).read_bytes()


SCRATCH = {
    "garbage": lambda scratch: write(scratch / "batch-0.npz"),
    "an empty file": lambda scratch: (scratch / "batch-0.npz").touch(),
    "other images": lambda scratch: write_npz(scratch / "batch-0.npz", {"correct": [True]}),
    "broken JSON": lambda scratch: (scratch / "not-finite.json").write_text("[1, "),
    "other JSON": lambda scratch: (scratch / "not-finite.json").write_text("{}"),
    "a file": lambda scratch: (scratch.rmdir(), scratch.touch()),
}


@pytest.mark.parametrize("damage", SCRATCH.values(), ids=SCRATCH)
def test_damaged_parts_of_an_evaluation_are_judged_again(bench, damage):
    recipe = bench.recipe.replace('with = ["clean"]', 'with = [{ use = "pgd", steps = 2 }]')
    bench.run(recipe=recipe, out="whole", store="other")
    (part,) = (p.parent for p in (bench.folder / "other/v3").glob("*/records.npz"))
    scratch = bench.folder / "store/v3" / part.name / "scratch"
    scratch.mkdir(parents=True)
    damage(scratch)
    bench.run(recipe=recipe)
    assert any("is damaged" in event.text for event in bench.of(Note))
    got, expected = (read_npz(bench.folder / out / "records.npz") for out in ("out", "whole"))
    assert all(np.array_equal(got[name], value) for name, value in expected.items())
    assert got.keys() == expected.keys()


@pytest.mark.parametrize("kind", ["file", "lock"])
def test_what_is_no_stage_folder_is_moved_aside(bench, kind):
    (run,) = bench.plan().runs
    folder = bench.folder / "store/v3" / bench.make_keys(run)[0]
    folder.parent.mkdir(parents=True)
    if kind == "file":
        folder.touch()
    else:
        (folder / "lock").mkdir(parents=True)
    assert bench.run()[0].status == "done"


# Runs


def test_a_run_knows_its_files(bench):
    (folder,) = bench.run()
    told = json.loads((folder.path / "run.json").read_text())
    assert sorted(told["files"]) == ["model.safetensors", "recipe.toml", "records.npz"]
    train, *_, judge = told["stages"]
    stored = json.loads((bench.folder / "store/v3" / train["key"] / "result.json").read_text())
    assert train["files"] == stored["files"]
    assert train["compute"] == stored["compute"] == bench.compute.describe()
    assert list(judge["files"]) == ["clean/records.npz"]
    assert find_changed(folder.path) == []


def test_an_edited_record_is_named(bench):
    (folder,) = bench.run()
    edit(folder.path / "run.json", seed=3)
    assert find_changed(folder.path) == ["run.json"]
    edit(folder.path / "run.json", status="running")
    assert find_changed(folder.path) == []


def test_nothing_is_known_of_runs_without_hashes(write_run, tmp_path):
    assert find_changed(write_run(tmp_path / "old", {})) == []


# Links and leftovers


@pytest.mark.parametrize("name", ["model.safetensors", "run.json", "recipe.toml", "records.npz"])
def test_files_elsewhere_are_not_written_through_links(bench, name):
    elsewhere = write(bench.folder / "elsewhere")
    (bench.folder / "out").mkdir()
    (bench.folder / "out" / name).symlink_to(elsewhere)
    bench.run()
    assert elsewhere.read_bytes() == b"garbage"
    assert not (bench.folder / "out" / name).is_symlink()


@pytest.mark.parametrize("place", ["store", "run"])
def test_folders_elsewhere_are_not_written_through_links(bench, place):
    elsewhere = bench.folder / "elsewhere"
    elsewhere.mkdir()
    if place == "store":
        (run,) = bench.plan().runs
        link = bench.folder / "store/v3" / bench.make_keys(run)[0]
    else:
        link = bench.folder / "out/sparsity=0.5"
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    if place == "store":
        (folder,) = bench.run()
        assert "is a link, which is not written through" in folder.error
    else:
        with pytest.raises(UserError, match="is a link, which is not written through"):
            bench.run("prune.sparsity=[0.5, 0.6]")
    assert not any(elsewhere.iterdir())


def test_what_a_killed_process_was_writing_is_removed(bench):
    out = bench.folder / "out"
    out.mkdir()
    (out / ".run.json.abcd_123").touch()
    (out / ".hidden").touch()
    bench.run()
    assert not (out / ".run.json.abcd_123").exists()
    assert (out / ".hidden").exists()


@pytest.fixture
def nobody(tmp_path):
    """A context in which nothing here can be written; root may write anywhere."""
    root = hasattr(os, "getuid") and os.getuid() == 0

    @contextmanager
    def nobody():
        for path in (tmp_path, *list(tmp_path.parents)[:3]):
            path.chmod(0o755)
        inner = list(tmp_path.rglob("*"))
        for path in inner:
            path.chmod(0o555 if path.is_dir() else 0o444)
        if root:
            os.setresuid(65534, 65534, 0)
        try:
            yield
        finally:
            if root:
                os.setresuid(0, 0, 0)
            for path in inner:
                path.chmod(0o755)

    return nobody


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_a_finished_store_that_cannot_be_written_to_is_used(tmp_path, nobody):
    store, done = Store(tmp_path / "store"), "a" * 32
    with store.locked(done, pytest.fail) as folder:
        folder.model.write_bytes(b"x")
        folder.finish(StageResult({"sparsity": 0.5}, seconds=1.0), {})
    with nobody():
        store.prepare(pytest.fail)
        with store.locked(done, pytest.fail) as folder:
            assert folder.repair(pytest.fail).metrics == {"sparsity": 0.5}
        with (
            pytest.raises(UserError, match="Permission denied; choose another folder with --store"),
            store.locked("0" * 32, pytest.fail),
        ):
            pass
