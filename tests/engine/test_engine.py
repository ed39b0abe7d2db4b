"""Runs from recipe to results: sharing, resuming, failing, and what a key follows."""

import dataclasses
import importlib
import json
import threading

import numpy as np
import pytest
import torch
from prunekit_adversarial import PgdOptions
from safetensors.torch import load_file

from prunekit.catalog.component import Component
from prunekit.catalog.registry import Entry, Registry, load_registry
from prunekit.contracts import Result
from prunekit.engine import inputs as module
from prunekit.engine.engine import Engine
from prunekit.engine.inputs import Inputs, build_state, make_keys
from prunekit.errors import Interrupted
from prunekit.models.failures import explain
from prunekit.recipe.document import load_recipe
from prunekit.recipe.plan import make_plan
from prunekit.report import EpochDone, Note, RunDone, RunFailed, StageDone, StageStarted
from prunekit.store.keys import hash_source
from prunekit.store.stages import Store

RECIPE = """
seed = 0
[dataset]
use = "npz"
file = "images.npz"
batch_size = 8
validation = 0.25
augment = ["flip"]
[architecture]
use = "small-cnn"
[threat]
eps = 0.1
[objective]
use = "benign"
[[stage]]
kind = "pretrain"
epochs = 2
[[stage]]
kind = "prune"
sparsity = 0.5
pruner = "lwm"
[[stage]]
kind = "finetune"
epochs = 2
[[stage]]
kind = "evaluate"
with = ["clean"]
"""

LEARNED = 'kind = "prune"\npruner = "score"\nepochs = 2\nbudget = "global"'

PARTS = '''
"""A plugin that does what a test tells it to."""
import numpy as np
import torch
from prunekit.contracts import Data, Loss, Result, Scores

act = {}
seen = []


def tell(what):
    seen.append(what)
    act.get(what, lambda: None)()


def build_pruner(options, context):
    def score(context):
        tell("pruner")
        act.get("look", lambda context: None)(context)
        return Scores({name: w.abs() for name, w in context.weights.items()})

    return score


def build_evaluator(options, context):
    def evaluate(model, batches):
        tell("evaluator")
        act.get("judge", lambda context: None)(context)
        n = sum(len(y) for _, y in batches)
        return Result({"value": act.get("value", 0.5)}, {"correct": np.zeros(n, bool)})

    return evaluate


def build_objective(options, context):
    def step(x, y, clock):
        tell("objective")
        logits = context.model(x)
        loss = torch.nn.functional.cross_entropy(logits, y)
        return Loss(loss, logits, {"odd": loss.detach() * float("nan")})

    return step


class Recorded:
    def __init__(self, name, n):
        self.name, self.n = name, n

    @property
    def labels(self):
        tell(self.name)
        return torch.arange(self.n) % 3

    def batches(self, indices):
        tell(self.name)
        for index in indices:
            yield torch.zeros(len(index), 1, 8, 8, dtype=torch.uint8) + index[:, None, None, None]


def build_dataset(options, context):
    return Data(Recorded("train", 24), Recorded("test", 10), (1, 8, 8), 3, (), "recorded")
'''


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """The plugin above, afresh."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "told_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(folder)
    hash_source.cache_clear()
    monkeypatch.delitem(importlib.sys.modules, "told_parts", raising=False)
    return importlib.import_module("told_parts")


def find_registry():
    told = [
        Entry(kind, Component(name="told", summary="Told", build=f"told_parts:build_{kind}"),
              "told", "told-dist 1.2")
        for kind in ("pruner", "evaluator", "objective", "dataset")
    ]  # fmt: skip
    installed = load_registry()
    return Registry((*installed.entries, *told))


class Bench:
    """A folder with a recipe, a store and a device."""

    def __init__(self, folder):
        self.folder, self.events, self.device = folder, [], torch.device("cpu")
        self.write_images(0)

    def write_images(self, seed):
        draw = np.random.default_rng(seed)
        images = draw.integers(0, 256, (30, 8, 8), dtype=np.uint8)
        labels = np.arange(30) % 3
        np.savez(self.folder / "images.npz", x_train=images[:20], y_train=labels[:20],
                 x_test=images[20:], y_test=labels[20:])  # fmt: skip

    def plan(self, *settings, recipe=RECIPE):
        path = self.folder / "r.toml"
        path.write_text(recipe)
        return make_plan(load_recipe(path, settings), find_registry())

    def engine(self, store="store", report=None):
        return Engine(Store(self.folder / store), self.device, report or self.events.append)

    def run(self, *settings, recipe=RECIPE, out="out", store="store", report=None):
        return self.engine(store, report).run(self.plan(*settings, recipe=recipe),
                                              self.folder / out)  # fmt: skip

    def keys(self, *settings, recipe=RECIPE):
        (run,) = self.plan(*settings, recipe=recipe).runs
        return self.make_keys(run)

    def make_keys(self, run):
        loaded = Inputs(self.device, self.events.append).load(run)
        return make_keys(run, loaded, self.device)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def model_of(folder):
    return (folder.path / "model.safetensors").read_bytes()


# Results


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


@pytest.mark.parametrize("recipe", [RECIPE, RECIPE.replace('kind = "prune"', LEARNED).replace(
    'pruner = "lwm"\n', "")], ids=["lwm", "score"])  # fmt: skip
def test_the_same_run_twice_gives_the_same_bytes(bench, recipe):
    (first,) = bench.run(recipe=recipe)
    torch.manual_seed(5)
    (again,) = bench.run(recipe=recipe, out="again", store="other")
    (other,) = bench.run("seed=1", recipe=recipe, out="seed")
    assert model_of(first) == model_of(again)
    assert model_of(first) != model_of(other)
    assert first.metrics == again.metrics


SCORED = RECIPE.replace('kind = "prune"', LEARNED).replace('pruner = "lwm"\n', "")


@pytest.mark.parametrize("stage", ["pretrain", "prune", "finetune"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(bench, stage):
    """The network that goes on is built anew; the stopped one came from the stage before."""
    recipe = SCORED.replace("epochs = 2", "epochs = 3")
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
    assert bench.run(recipe=recipe)[0].metrics == whole.metrics


def test_an_evaluator_can_be_stopped_within_a_batch_and_finds_what_it_left(bench, parts):
    engine = bench.engine()
    stages, found = [None], []

    def judge(context):
        if stages[-1] != "evaluate":  # the rehearsal
            return
        note = context.scratch / "note"
        found.append(note.exists())
        note.write_text("so far")
        engine.stop.requested = len(found) == 1
        context.pause()

    parts.act["judge"] = judge
    engine.report = lambda event: stages.append(getattr(event, "stage", None))
    recipe = RECIPE.replace('["clean"]', '["told"]')
    with pytest.raises(Interrupted):
        engine.run(bench.plan(recipe=recipe), bench.folder / "out")
    engine.stop.requested = False
    engine.run(bench.plan(recipe=recipe), bench.folder / "out")
    assert found == [False, True]


@pytest.mark.parametrize(
    "between", ["", '[[stage]]\nkind = "evaluate"\nname = "x"\nwith = ["clean"]\n']
)
def test_pruners_get_the_network_as_a_fresh_one_is(bench, parts, between):
    """Whatever stage was before: in train mode, every weight with gradients."""
    looks = []
    parts.act["look"] = lambda context: looks.append(
        {
            "training": all(m.training for m in context.model.modules()),
            "gradients": all(p.requires_grad for p in context.model.parameters()),
        }
    )
    before = '[[stage]]\nkind = "prune"'
    recipe = RECIPE.replace(before, between + before)
    (folder,) = bench.run(recipe=recipe.replace('"lwm"', '"told"'))
    assert folder.error == ""
    assert len(looks) == 2  # the rehearsal's too
    for model in looks:
        assert model == {"training": True, "gradients": True}


def test_a_pruner_sees_batches_and_numbers_that_the_seed_decides(bench, parts):
    looks = []

    def look(context):
        x, y = next(context.batches())
        loss = context.objective(x, y, None).value
        numbers = torch.rand(2, generator=context.generator).tolist()
        looks.append((y.tolist(), loss.item(), numbers, context.sparsity, context.stage))

    parts.act["look"] = look
    recipe = RECIPE.replace('"lwm"', '"told"')
    for seed, store in ((0, "a"), (0, "b"), (1, "c")):
        bench.run(f"seed={seed}", recipe=recipe, out=store, store=store)
    first, again, other = looks[1::2]  # rehearsals between them
    assert first == again
    assert first[3:] == (0.5, "prune")
    assert all(a != b for a, b in zip(first[:3], other[:3], strict=True))


# The store


SWEEP = RECIPE + '[sweep]\n"prune.pruner" = ["lwm", "random"]\n"prune.sparsity" = [0.5, 0.7]\n'


def test_a_shared_pretraining_is_computed_once(bench):
    folders = bench.run(recipe=SWEEP)
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


FAILING = RECIPE + '[sweep]\n"prune.pruner" = ["lwm", "told", "random"]\n'


def fail(error):
    def act():
        raise error

    return act


def test_a_failing_run_does_not_stop_the_others(bench, parts):
    parts.act["pruner"] = fail(ValueError("no luck\nmore"))
    folders = bench.run(recipe=FAILING)
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
    folders = bench.run(recipe=FAILING)
    assert [f.status for f in folders] == ["done"] * 3
    computed = [e.stage for e in bench.of(StageDone) if not e.reused]
    assert computed == ["prune", "finetune", "evaluate"]


def test_a_run_that_fails_later_than_its_rehearsal(bench, parts):
    """Stages that share what failed are not tried again."""
    recipe = (
        RECIPE.replace('use = "benign"', 'use = "told"') + '[sweep]\n"finetune.epochs" = [2, 3]'
    )
    steps = []
    parts.act["objective"] = lambda: steps.append(1) or len(steps) < 6 or fail(KeyError("x"))()
    folders = bench.run(recipe=recipe)
    assert [f.status for f in folders] == ["failed", "failed"]
    assert folders[0].error == folders[1].error
    assert len(steps) == 6


def test_what_failed_holds_no_tensors(bench, parts):
    parts.act["evaluator"] = fail(ValueError("x"))
    (folder,) = bench.run(recipe=RECIPE.replace('"clean"', '"told"'))
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


# Keys


CHANGES = {
    "seed": ("seed=1", 0),
    "batch size": ("dataset.batch_size=4", 0),
    "validation": ("dataset.validation=0.3", 0),
    "threat": ("threat.eps=0.2", None),
    "epochs": ("pretrain.epochs=3", 0),
    "rate": ("pretrain.optimizer.lr=0.2", 0),
    "sparsity": ("prune.sparsity=0.6", 1),
    "pruner": ("prune.pruner=random", 1),
    "finetune": ("finetune.select=last", 2),
    "evaluator": ('evaluate.with=["clean", "pgd"]', 3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_keys_change_from_the_stage_on_that_changed(bench, change):
    setting, first = CHANGES[change]
    before, after = bench.keys(), bench.keys(setting)
    differs = [a != b for a, b in zip(before, after, strict=True)]
    # Clean training and judging look at no threat.
    assert differs == [first is not None and i >= first for i in range(4)]


def test_the_threat_changes_the_keys_of_what_looks_at_it(bench):
    recipe = RECIPE.replace('["clean"]', '["clean", "pgd"]')
    before, after = bench.keys(recipe=recipe), bench.keys("threat.eps=0.2", recipe=recipe)
    assert [a != b for a, b in zip(before, after, strict=True)] == [False] * 3 + [True]
    recipe = RECIPE.replace('"benign"', '"trades"')
    for setting in ("threat.eps=0.2", "threat.norm=l2"):
        before, after = bench.keys(recipe=recipe), bench.keys(setting, recipe=recipe)
        assert all(a != b for a, b in zip(before, after, strict=True))


def test_names_and_reporters_change_no_key(bench):
    recipe = 'name = "other"\nreport = ["jsonl"]\n' + RECIPE.replace(
        'kind = "finetune"', 'kind = "finetune"\nname = "tune"'
    )
    assert bench.keys() == bench.keys(recipe=recipe)


def test_keys_follow_the_content_of_the_data(bench):
    before = bench.keys()
    bench.write_images(0)
    assert bench.keys() == before
    bench.write_images(1)
    assert not set(bench.keys()) & set(before)


def test_keys_follow_the_source_of_the_plugins_that_are_used(bench, parts):
    recipe = RECIPE.replace('"lwm"', '"told"')
    before, other = bench.keys(recipe=recipe), bench.keys()
    file = bench.folder / "plugins" / "told_parts.py"
    file.write_text(file.read_text() + "# changed\n")
    hash_source.cache_clear()
    after = bench.keys(recipe=recipe)
    assert [a != b for a, b in zip(before, after, strict=True)] == [False, True, True, True]
    assert bench.keys() == other


def test_keys_follow_the_source_of_other_packages_that_a_component_names(bench, monkeypatch):
    helper = bench.folder / "told_helper.py"
    helper.write_text("a = 1\n")
    monkeypatch.syspath_prepend(bench.folder)
    plan = bench.plan()
    (run,) = plan.runs
    use = run.stages[1].options.pruner
    component = dataclasses.replace(use.component, sources=("told_helper",))
    options = dataclasses.replace(
        run.stages[1].options, pruner=dataclasses.replace(use, component=component)
    )
    stages = list(run.stages)
    stages[1] = dataclasses.replace(stages[1], options=options)
    run = dataclasses.replace(run, stages=tuple(stages))
    hash_source.cache_clear()
    before = bench.make_keys(run)
    helper.write_text("a = 2\n")
    hash_source.cache_clear()
    after = bench.make_keys(run)
    assert [a != b for a, b in zip(before, after, strict=True)] == [False, True, True, True]


def test_keys_follow_the_starting_weights(bench):
    bench.run()
    weights = bench.folder / "start.safetensors"
    weights.write_bytes((bench.folder / "out" / "model.safetensors").read_bytes())
    setting = f"architecture.init={weights}"
    before = bench.keys(setting)
    assert not set(before) & set(bench.keys())
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert not set(before) & set(bench.keys(setting))


def test_keys_follow_the_threads(bench, monkeypatch):
    before = bench.keys()
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 64)
    assert not set(before) & set(bench.keys())


# Data


def test_training_never_touches_the_test_images_nor_judging_others(bench, parts):
    recipe = (
        SCORED.replace('use = "npz"', 'use = "told"').replace('file = "images.npz"', "")
        .replace('with = ["clean"]', 'with = ["clean", "pgd"]')
    )  # fmt: skip
    touched = {}
    stage = [None]

    def report(event):
        if isinstance(event, StageStarted):
            stage[0] = event.kind
        if isinstance(event, StageDone):
            stage[0] = None

    for name in ("train", "test"):
        parts.act[name] = lambda name=name: touched.setdefault(stage[0], set()).add(name)
    (folder,) = bench.run(recipe=recipe, report=report)
    assert folder.error == ""
    assert {kind: parts for kind, parts in touched.items() if kind} == {
        "pretrain": {"train"}, "prune": {"train"}, "finetune": {"train"}, "evaluate": {"test"},
    }  # fmt: skip


def test_data_are_loaded_once_for_runs_that_differ_in_batch_size_or_seed(bench, monkeypatch):
    calls = []
    hold_out = module.hold_out
    monkeypatch.setattr(module, "hold_out", lambda *a: calls.append(1) or hold_out(*a))
    sweep = '[sweep]\nseed = [0, 1]\n"dataset.batch_size" = [4, 8]\n'
    folders = bench.run(recipe=RECIPE + sweep)
    assert [f.status for f in folders] == ["done"] * 4
    assert len(calls) == 1


def test_records_are_those_of_the_images(bench):
    (folder,) = bench.run(recipe=RECIPE.replace('["clean"]', '["clean"]\nimages = 7'))
    with np.load(folder.path / "records.npz", allow_pickle=False) as records:
        index = records["evaluate/index"]
        assert index.tolist() == [i * 10 // 7 for i in range(7)]
        assert records["evaluate/label"].tolist() == ((20 + index) % 3).tolist()
        assert len(records["evaluate/clean.correct"]) == 7
        mean = records["evaluate/clean.correct"].mean()
    assert folder.metrics["evaluate"]["clean.accuracy"] == pytest.approx(mean)


def test_unbalanced_classes_get_a_balanced_accuracy(bench):
    """The test images have classes 2 0 1 2 0 1 2 0 1 2; now they have 0 four times as often."""
    with np.load(bench.folder / "images.npz") as kept:
        arrays = dict(kept)
    arrays["y_test"] = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 2])
    arrays["y_train"] = np.array([0] * 12 + [1] * 4 + [2] * 4)
    np.savez(bench.folder / "images.npz", **arrays)
    (folder,) = bench.run()
    found = folder.metrics["evaluate"]
    with np.load(folder.path / "records.npz", allow_pickle=False) as records:
        correct = records["evaluate/clean.correct"]
    balanced = (correct[:8].mean() + correct[8] + correct[9]) / 3
    assert found["clean.balanced_accuracy"] == pytest.approx(balanced)
    assert found["clean.balanced_accuracy_low"] <= balanced
    assert "validation.balanced_accuracy" in folder.metrics["pretrain"]


def test_balanced_classes_get_none(bench):
    (folder,) = bench.run()
    assert "clean.balanced_accuracy" not in folder.metrics["evaluate"]


def test_contradicting_verdicts_are_told(bench, parts):
    """An attack that breaks what a proof says is verified: a warning that stays with the result."""
    registry = find_registry()

    def add(judges):
        return Entry(
            "evaluator",
            Component(name=judges, summary=judges, build=f"told_parts:build_{judges}",
                      options=PgdOptions, judges=judges),
            "told", "told-dist 1.2",
        )  # fmt: skip

    for judges, record, verdict in (("attack", "correct", False), ("proof", "verified", True)):
        setattr(parts, f"build_{judges}", give_verdict(record, verdict))
    path = bench.folder / "r.toml"
    path.write_text(RECIPE.replace('["clean"]', '["attack", "proof"]'))
    plan = make_plan(load_recipe(path), Registry((*registry.entries, add("attack"), add("proof"))))
    (folder,) = bench.engine().run(plan, bench.folder / "out")
    assert folder.status == "done", folder.error
    (warning,) = [e.text for e in bench.of(Note) if e.warning]
    assert warning.startswith("UNSOUND: attack breaks 10 images that proof says are verified")


def give_verdict(record, verdict):
    def build(options, context):
        def evaluate(model, batches):
            n = sum(len(y) for _, y in batches)
            return Result({"value": 0.5}, {record: np.full(n, verdict)})

        return evaluate

    return build


# What goes wrong


def test_the_rehearsal_catches_the_last_stage_before_the_first_is_trained(bench, parts):
    parts.act["evaluator"] = fail(AssertionError("shapes"))
    (folder,) = bench.run(recipe=RECIPE.replace('"clean"', '"told"'))
    assert folder.status == "failed"
    assert "plugin told (told-dist 1.2) failed: AssertionError: shapes" in folder.error
    assert not bench.of(StageStarted)
    assert not list((bench.folder / "store").glob("*/*/result.json"))


def test_a_run_is_not_spared_because_its_twin_failed(bench):
    """Runs that differ in numbers: the first fails in rehearsal, the second is fine."""
    recipe = RECIPE.replace('pruner = "lwm"', 'pruner = "lwm"\nbudget = "global"')
    folders = bench.run(recipe=recipe + '[sweep]\n"prune.sparsity" = [0.9999, 0.5]\n')
    assert [f.status for f in folders] == ["failed", "done"]
    assert "leaves no weight of" in folders[0].error


def test_one_rehearsal_speaks_for_runs_that_differ_in_numbers(bench, parts):
    recipe = RECIPE.replace('"clean"', '"told"') + "[sweep]\nseed = [0, 1, 2]\n"
    folders = bench.run(recipe=recipe)
    assert [f.status for f in folders] == ["done"] * 3
    assert parts.seen.count("evaluator") == 1 + 3


def test_a_failure_is_rehearsed_for_every_run_that_shares_it(bench, parts):
    parts.act["evaluator"] = fail(ValueError("x"))
    recipe = RECIPE.replace('"clean"', '"told"') + "[sweep]\nseed = [0, 1]\n"
    folders = bench.run(recipe=recipe)
    assert [f.status for f in folders] == ["failed", "failed"]
    assert not bench.of(StageStarted)


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
def test_memory_errors_say_what_to_do(bench, parts, error):
    parts.act["pruner"] = fail(error)
    (folder,) = bench.run(recipe=RECIPE.replace('"lwm"', '"told"'))
    assert folder.error.startswith("memory ran out")
    assert "--set dataset.batch_size=4" in folder.error


def test_errors_of_the_core_blame_no_plugin(bench):
    (run,) = bench.plan().runs
    with pytest.raises(AttributeError) as caught:
        module.describe_counts(None)
    assert explain(caught.value, run).startswith("AttributeError: ")
    assert explain(ValueError(), run) == "ValueError (--debug shows where)"


def test_a_term_that_is_no_number_does_not_lose_the_stage(bench, parts):
    (folder,) = bench.run(recipe=RECIPE.replace('"benign"', '"told"'))
    assert folder.status == "done"
    assert "odd" not in folder.metrics["pretrain"]
    assert "loss" in folder.metrics["pretrain"]


def test_a_metric_that_is_no_number_names_the_evaluator(bench, parts):
    parts.act["value"] = float("nan")
    (folder,) = bench.run(recipe=RECIPE.replace('"clean"', '"told"'))
    assert folder.error == (
        "rehearsal, one batch a stage: "
        "evaluator 'told' of plugin told (told-dist 1.2) gave value = nan"
    )


def test_weights_that_do_not_fit_are_told(bench):
    torch.save({"fc.weight": torch.ones(2, 2)}, bench.folder / "w.pt")
    (folder,) = bench.run(f"architecture.init={bench.folder / 'w.pt'}")
    assert "does not fit the network: missing: " in folder.error


def test_starting_weights_are_taken(bench):
    bench.run()
    trained = load_file(bench.folder / "out" / "model.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in trained.items()}},
               bench.folder / "w.pt")  # fmt: skip
    (run,) = bench.plan(f"architecture.init={bench.folder / 'w.pt'}").runs
    data = Inputs(bench.device, bench.events.append).load(run).data
    state = build_state(run, data, bench.device)
    assert all(torch.equal(v, trained[k]) for k, v in state.model.state_dict().items())
    assert state.masks == {}
