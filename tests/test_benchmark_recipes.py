"""The recipes of the benchmark and of the methods' sanity run: all train alike."""

from pathlib import Path

import pytest

from prunekit.cli.recipes import plan_recipe
from prunekit.recipe.describing import describe

RECIPES = Path(__file__).parent.parent / "recipes"

# data set, network, sparsities
CELLS = {
    f"{data}-{net}{more}": (data, architecture, sparsities)
    for data in ("cifar10", "svhn")
    for net, architecture in (("resnet18", "cifar-resnet18"), ("vgg16", "vgg16-bn"))
    for more, sparsities in (("", {0.9, 0.95, 0.99}), ("-channels", {0.5, 0.75, 0.9}))
}
LEARNED = ("score", "harp", "twinrep", "radmm")
ONE_SHOT = ("lwm", "random", "snip", "fashapley", "movement")
REWIRERS = {"gradual", "rigl", "set", "flyingbird", "flyingbird-plus"}

OWN = ("objective", "optimizer", "weight_decay", "lr", "optimizer.schedule", "finetune.wrap")
"""Ends of the addresses that only cases with a paper's own settings set."""


def equal_runs(recipe):
    """The runs of a recipe of the benchmark, without those with the settings of a paper."""
    runs = plan_recipe(RECIPES / f"benchmark/{recipe}.toml", ()).runs
    return [run for run in runs if not any(address.endswith(OWN) for address in run.settings)]


def weights_trained(run):
    """What decides the training of weights outside of the prune stage, but for the epochs."""
    stages = [s for s in run.stages if s.kind in ("pretrain", "finetune") and s.name != "prune"]
    return [{k: v for k, v in describe(s.options).items() if k != "epochs"} for s in stages]


@pytest.mark.parametrize("recipe", CELLS)
def test_pruners_of_a_cell_are_on_one_footing(recipe):
    data, architecture, sparsities = CELLS[recipe]
    runs = equal_runs(recipe)
    cells, wrapped = {}, set()
    for run in runs:
        assert (run.dataset.component.name, run.architecture.component.name) == (data, architecture)
        pretrain, dense, prune, finetune, pruned = run.stages
        pruner = prune.options.pruner.component
        assert pretrain.epochs == 100
        assert finetune.epochs + pruner.learns * prune.epochs == 120
        assert prune.options.structure == ("channel" if "channels" in recipe else "element")
        for judged in (dense.options, pruned.options):
            assert (judged.with_[-1].component.name, judged.images) == ("autoattack", 10_000)
            assert judged.with_[-1].threat.eps == 8 / 255
            assert judged.with_[-1].options.attacks is None  # all of the standard ones
        cells.setdefault(pruner.name, set()).add(prune.sparsity)
        wrapped |= {(pruner.name, use.component.name) for use in prune.options.wrap}
    assert cells == dict.fromkeys((*LEARNED, *ONE_SHOT), sparsities)
    assert wrapped == {("score", "s2ap"), ("harp", "s2ap")}
    assert all(weights_trained(run) == weights_trained(runs[0]) for run in runs)


def test_awp_has_its_own_settings_for_svhn_on_the_dense_networks_of_the_cells():
    runs = plan_recipe(RECIPES / "benchmark/svhn-awp.toml", ()).runs
    dense = equal_runs("svhn-resnet18")[0].stages[0].describe()
    for run in runs:
        pretrain, *_, finetune, _ = run.stages
        (awp,) = finetune.options.wrap
        assert (awp.name, awp.options.start) == ("awp", 5)
        assert finetune.options.objective.options.step_size == 1 / 255
        assert pretrain.describe() == dense
    assert len(runs) == 2 * 3 * 4


@pytest.mark.parametrize("recipe", ["rewired", "scratch"])
def test_rewirers_have_the_training_of_the_pruners(recipe):
    cells = {}
    pruners = weights_trained(equal_runs("cifar10-resnet18")[0])
    for run in equal_runs(recipe):
        (prune,) = (stage for stage in run.stages if stage.name == "prune")
        assert sum(stage.epochs for stage in run.stages if stage.kind != "evaluate") == 220
        assert weights_trained(run) == (pruners if recipe == "rewired" else [])
        cell = (run.dataset.component.name, run.architecture.component.name, prune.sparsity)
        cells.setdefault(cell, set()).add(prune.options.rewire.component.name)
    assert len(cells) == 12
    assert all(found == REWIRERS for found in cells.values())


def test_rewired_networks_come_from_the_dense_ones_of_the_pruners():
    """The stages before the masks are equal, so the store gives them."""
    rewired, cell = equal_runs("rewired")[0], equal_runs("cifar10-resnet18")[0]
    first = [[stage.describe() for stage in run.stages[:2]] for run in (rewired, cell)]
    assert first[0] == first[1]


def test_every_method_of_the_sanity_run_sees_the_images_equally_often():
    names = set()
    for recipe in ("cifar10-methods", "cifar10-methods-rewired"):
        for run in plan_recipe(RECIPES / f"{recipe}.toml", ()).runs:
            pretrain, _, prune, finetune, _ = run.stages
            (chosen,) = prune.choosing
            names.add(chosen.component.name)
            trains = prune.kind == "finetune" or chosen.component.learns
            assert (pretrain.epochs, prune.sparsity) == (12, 0.95)
            assert finetune.epochs + trains * (prune.epochs or 0) == 8
    assert names == {*LEARNED, *ONE_SHOT, *REWIRERS}
