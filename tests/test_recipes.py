"""Every delivered recipe: it passes `check`, all stages run, and its methods are treated alike."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from prunekit.cli.group import main
from prunekit.cli.recipes import plan_recipe
from prunekit.engine.running import run_plan
from prunekit.recipe import reduction
from prunekit.recipe.describing import describe

ROOT = Path(__file__).parent.parent
RECIPES = {
    path.relative_to(ROOT / "recipes").with_suffix("").as_posix(): path
    for path in sorted((ROOT / "recipes").rglob("*.toml"))
}

SMOOTHED = [
    f"hydra/{data}-{net}-smoothing" for data in ("cifar10", "svhn") for net in ("vgg16", "wrn-28-4")
]

LESS = {
    # A forward pass costs 5 GMAC an image; the narrow net has the same layers.
    "hydra/cifar10-wrn-28-10": ("architecture=wrn-28-1",),
    "hydra/imagenet-resnet50-free-adv": ("prune.pruner=score",),
    # Their networks are run by the rows of adversarial training.
    **dict.fromkeys(SMOOTHED, ("architecture=vgg4-bn",)),
    # ResNet-18 and VGG-16 are run by other recipes.
    **dict.fromkeys((r for r in RECIPES if r.startswith("benchmark/")), ("architecture=vgg4-bn",)),
    "benchmark/cifar10-resnet18-channels": ("architecture=wrn-28-1",),
    # CROWN through the large network takes seconds and gigabytes for each image.
    **{
        f"certified/{data}-large-{objective}": ("architecture=cifar-small",)
        for data in ("svhn", "cifar10")
        for objective in ("crown-ibp", "mixtrain")
    },
}
"""What the smoke run of a recipe is spared here."""

QUICK = ("quickstart", "mnist-trades", "mnist-crown-ibp")

# data set, network, sparsities
ROWS = {
    "hydra/cifar10-vgg16": ("cifar10", "vgg16-bn", {0.9, 0.95, 0.99}),
    "hydra/cifar10-wrn-28-4": ("cifar10", "wrn-28-4", {0.9, 0.95, 0.99}),
    "hydra/cifar10-wrn-28-10": ("cifar10", "wrn-28-10", {0.9}),
    "hydra/svhn-vgg16": ("svhn", "vgg16-bn", {0.9, 0.95, 0.99}),
    "hydra/svhn-wrn-28-4": ("svhn", "wrn-28-4", {0.9, 0.95, 0.99}),
    "hydra/imagenet-resnet50-free-adv": ("imagenet", "imagenet-resnet50", {0.95, 0.99}),
}


def plan(name, *settings, small=False):
    """The plan of a recipe; where its data set can be fetched, it may not be."""
    path = RECIPES[name]
    if all(hasattr(run.dataset.options, "download") for run in plan_recipe(path, ()).runs):
        settings = (*settings, "dataset.download=false")
    return plan_recipe(path, settings, smoke=small)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_passes_check(recipe):
    done = CliRunner().invoke(main, ["check", str(RECIPES[recipe])])
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One for all: recipes that extend each other share stages."""
    return tmp_path_factory.mktemp("stages")


@pytest.mark.parametrize(
    "recipe", [pytest.param(r, marks=[pytest.mark.slow] * (r not in QUICK)) for r in RECIPES]
)
def test_recipe_runs(recipe, store, tmp_path, monkeypatch):
    """As `prunekit run RECIPE --smoke` does where there is no data, with fewer images still."""
    # Training on 2 images at the paper's rates blows ImageNet's network up.
    images = 8 if "imagenet" in recipe else 2
    monkeypatch.setenv("PRUNEKIT_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(reduction, "SMOKE_BATCHES", 1)
    monkeypatch.setattr(reduction, "SMOKE_BATCH_SIZE", images)
    small = plan(recipe, *LESS.get(recipe, ()), small=True)
    folders = run_plan(small, tmp_path / "out", store, force=False, resume="", tell=print)
    assert folders
    assert [folder.error for folder in folders if folder.status != "done"] == []


@pytest.mark.parametrize("recipe", ROWS)
def test_row_of_the_paper_has_its_settings(recipe):
    runs = plan(recipe).runs
    dataset, architecture, sparsities = ROWS[recipe]
    free = dataset == "imagenet"
    assert {run.dataset.component.name for run in runs} == {dataset}
    assert {run.architecture.component.name for run in runs} == {architecture}
    found = [(r.stages[-1].sparsity, r.stages[2].options.pruner.component.name) for r in runs]
    assert sorted(found) == sorted((s, p) for s in sparsities for p in ("score", "lwm"))
    for run in runs:
        assert [s.kind for s in run.stages] == [
            "pretrain", "evaluate", "prune", "finetune", "evaluate"
        ]  # fmt: skip
        pretrain, _, prune, finetune, _ = run.stages
        assert run.data.batch_size == (256 if free else 128)
        assert run.threat.eps == (0.0156 if free else 0.031)
        assert (pretrain.options.epochs, finetune.options.epochs) == (
            (90, 90) if free else (100, 100)
        )
        if free:
            assert (pretrain.epochs, finetune.epochs) == (23, 23)
        for stage, rate in ((pretrain, 0.1), (prune, 0.1), (finetune, 0.01)):
            if stage is prune and prune.options.pruner.component.name == "lwm":
                continue
            chosen = stage.options.optimizer
            assert chosen.component.name == "sgd"
            assert chosen.options.schedule.component.name == "cosine"
            sgd = (chosen.options.lr, chosen.options.momentum, chosen.options.weight_decay)
            assert sgd == (rate, 0.9, 1e-4)
            objective = stage.options.objective
            if free:
                assert (objective.component.name, objective.options.replays) == ("free-adv", 4)
            else:
                trades = (
                    objective.options.beta,
                    objective.options.steps,
                    objective.options.step_size,
                )
                assert (objective.component.name, *trades) == ("trades", 6.0, 10, 0.0078)


@pytest.mark.parametrize("recipe", SMOOTHED)
def test_smoothed_row_differs_in_objective_and_judgement_alone(recipe):
    theirs = {str(r.settings): r for r in plan(recipe.removesuffix("-smoothing")).runs}
    ours = {str(r.settings): r for r in plan(recipe).runs}
    assert ours.keys() == theirs.keys()
    for settings, run in ours.items():
        other = theirs[settings]
        assert describe(run.architecture) == describe(other.architecture)
        assert (describe(run.dataset), run.data) == (describe(other.dataset), other.data)
        for stage, twin in zip(run.stages, other.stages, strict=True):
            mine, others = describe(stage.options), describe(twin.options)
            if stage.kind == "evaluate":
                clean, certify = stage.options.with_
                assert (clean.component.name, certify.component.name) == ("clean", "certify")
                wanted = certify.options
                assert (wanted.sigma, wanted.n0, wanted.n) == (0.25, 100, 10_000)
                assert (wanted.alpha, wanted.sequential) == (0.001, False)
                assert 110 / 255 in wanted.radii
                continue
            objective, replaced = mine.pop("objective"), others.pop("objective")
            assert (objective["use"], replaced["use"]) == ("smoothing", "trades")
            assert (objective["sigma"], objective["beta"]) == (0.25, 6.0)
            assert mine == others


@pytest.mark.parametrize(
    "recipe", [*ROWS, *SMOOTHED, "cifar10-resnet18-2-4", "cifar10-resnet18-channels"]
)
def test_methods_are_treated_alike(recipe):
    """At one sparsity, runs differ in the pruner alone."""
    alike = {}
    for run in plan(recipe).runs:
        others = [describe(s.options) for s in run.stages if s.kind != "prune"]
        prune = next(s for s in run.stages if s.kind == "prune").options
        rest = (prune.sparsity, prune.budget, prune.structure, prune.exclude)
        alike.setdefault(prune.sparsity, []).append((others, rest))
    assert all(len(runs) == 2 and runs[0] == runs[1] for runs in alike.values())


def test_second_baseline_is_finetuned_for_as_long_as_scores_take():
    found = {
        (r.stages[-1].sparsity, r.stages[2].options.pruner.component.name, r.stages[3].epochs)
        for r in plan("hydra/cifar10-vgg16-lwm-120").runs
    }
    methods = [("score", 100), ("lwm", 100), ("lwm", 120)]
    assert found == {(sparsity, *method) for sparsity in (0.9, 0.95, 0.99) for method in methods}


def test_subnetwork_is_learned_within_a_benign_network_and_not_finetuned():
    runs = plan("hydra/subnetwork-cifar10-vgg16").runs
    for run in runs:
        kinds = {stage.kind: stage.options for stage in run.stages}
        assert "finetune" not in kinds
        assert kinds["pretrain"].objective.component.name == "benign"
        assert kinds["prune"].objective.component.name == "trades"
        assert kinds["prune"].sparsity == 0.5
    prunes = [run.stages[2].options for run in runs]
    assert {(p.pruner.component.name, p.bn) for p in prunes} == {
        ("score", "train"), ("score", "freeze"), ("lwm", "train")
    }  # fmt: skip


CERTIFIED = {
    f"certified/{data}-{size}-{objective}": (data, size, objective)
    for data in ("svhn", "cifar10")
    for size in ("small", "large")
    for objective in ("crown-ibp", "mixtrain")
}


@pytest.mark.parametrize("recipe", CERTIFIED)
def test_certified_row_has_its_settings(recipe):
    data, size, objective = CERTIFIED[recipe]
    mixtrain = objective == "mixtrain"
    runs = plan(recipe).runs
    tuned = {}
    for run in runs:
        assert run.dataset.component.name == data
        assert run.architecture.component.name == f"cifar-{size}"
        assert run.threat.eps == (0.007 if data == "svhn" else 2 / 255)
        assert run.data.batch_size == (50 if mixtrain else 128)
        pretrain, _, prune, finetune, _ = run.stages
        epochs = (60, 60) if mixtrain else (200, 100)
        assert (pretrain.options.epochs, finetune.options.epochs) == epochs
        chosen = pretrain.options.objective
        assert chosen.component.name == objective
        assert chosen.options.ramp_epochs == (15 if mixtrain else 120)
        if mixtrain:
            drawn = (chosen.options.images, chosen.options.probability)
            assert drawn == (1 if size == "large" else 5, 0.8)
        pruner = prune.options.pruner.component.name
        if pruner == "score":
            rate = prune.options.optimizer.options.lr
            assert (prune.options.epochs, rate) == (20, 1e-5)
        assert pretrain.options.optimizer.options.lr == 1e-3
        assert pretrain.options.optimizer.options.weight_decay == 1e-4
        rates = tuned.setdefault((prune.options.sparsity, pruner), [])
        rates.append(finetune.options.optimizer.options.lr)
    assert {sparsity for sparsity, _ in tuned} == {0.9, 0.95, 0.99}
    assert all(sorted(rates) == [1e-5, 1e-4, 5e-4] for rates in tuned.values())
