"""What runs start from, and what a key follows."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from prunekit.engine import work as module
from prunekit.engine.work import Inputs, build_state
from prunekit.store.keys import hash_source

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
    recipe = bench.recipe.replace('["clean"]', '["clean", "pgd"]')
    before, after = bench.keys(recipe=recipe), bench.keys("threat.eps=0.2", recipe=recipe)
    assert [a != b for a, b in zip(before, after, strict=True)] == [False] * 3 + [True]
    recipe = bench.recipe.replace('"benign"', '"trades"')
    for setting in ("threat.eps=0.2", "threat.norm=l2"):
        before, after = bench.keys(recipe=recipe), bench.keys(setting, recipe=recipe)
        assert all(a != b for a, b in zip(before, after, strict=True))


def test_names_and_reporters_change_no_key(bench):
    recipe = 'name = "other"\nreport = ["jsonl"]\n' + bench.recipe.replace(
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
    recipe = bench.recipe.replace('"lwm"', '"told"')
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


def test_keys_follow_the_device_and_not_the_threads(bench, monkeypatch):
    before = bench.keys()
    bench.compute = dataclasses.replace(bench.compute, threads=64)
    assert before == bench.keys()
    monkeypatch.setattr(type(bench.compute), "key", lambda self: {"device": "cuda"})
    assert not set(before) & set(bench.keys())


def test_data_are_loaded_once_for_runs_that_differ_in_batch_size_or_seed(bench, monkeypatch):
    calls = []
    hold_out = module.hold_out
    monkeypatch.setattr(module, "hold_out", lambda *a: calls.append(1) or hold_out(*a))
    sweep = '[sweep]\nseed = [0, 1]\n"dataset.batch_size" = [4, 8]\n'
    folders = bench.run(recipe=bench.recipe + sweep)
    assert [f.status for f in folders] == ["done"] * 4
    assert len(calls) == 1


def test_starting_weights_are_taken(bench):
    bench.run()
    trained = load_file(bench.folder / "out" / "model.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in trained.items()}},
               bench.folder / "w.pt")  # fmt: skip
    (run,) = bench.plan(f"architecture.init={bench.folder / 'w.pt'}").runs
    data = Inputs(bench.compute, bench.events.append).load(run).data
    state = build_state(run, data, bench.compute)
    assert all(torch.equal(v, trained[k]) for k, v in state.model.state_dict().items())
    assert state.masks == {}


def test_what_has_no_effect_in_a_stage_is_in_no_key(bench, monkeypatch):
    """A pretraining names no budget, a one-shot pruner no optimizer."""
    (run,) = bench.plan().runs
    pretrain, prune, *_ = run.stages
    assert {use.kind for use in pretrain.uses()} == {"objective", "optimizer", "schedule"}
    assert {use.kind for use in prune.uses()} == {"objective", "pruner", "budget"}
    assert "budget" not in pretrain.describe_options()
    assert "optimizer" not in prune.describe_options()
