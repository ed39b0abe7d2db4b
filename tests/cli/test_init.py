"""`prunekit init`: what it writes passes check, runs, and overwrites nothing."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from prunekit.catalog.registry import load_registry
from prunekit.cli.group import main
from prunekit.cli.init import SHIPPED
from prunekit.recipe.plan import make_plan
from prunekit.recipe.toml.document import load_recipe

pytestmark = pytest.mark.usefixtures("here")


def call(*arguments, code=0):
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


OBJECTIVES = [e.component.name for e in load_registry().entries if e.kind == "objective"]


@pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar10", "imagenet"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_gets_a_recipe_that_passes_check(here, dataset, objective):
    done = call("init", "mine", "--dataset", dataset, "--objective", objective)
    assert done.stdout == "mine.toml\n"
    first, run = make_plan(load_recipe(Path("mine.toml")), load_registry()).runs
    names = [use.component.name for use in first.stages[-1].options.with_]
    proof = {"smoothing": ["certify"], "benign": ["pgd"]}.get(objective)
    bounds = objective in ("ibp", "crown-ibp", "mixtrain")
    assert names == ["clean", *(proof or ["pgd", *(["verified"] if bounds else [])])]
    assert first.dataset.component.name == dataset
    assert run.settings == {"prune.pruner": "lwm"}
    assert Path("mine.toml").read_text().startswith("# prunekit run mine.toml\n")


def test_what_it_writes_runs(here):
    call("init")
    call("run", "recipe.toml", "--smoke", "--device", "cpu")
    assert Path("runs/recipe-smoke/pruner=score/run.json").exists()


def test_one_of_your_own_needs_its_network(here):
    error = call("init", "--dataset", "npz", code=2).stderr
    assert error == "prunekit: the image size of npz is unknown; give --model\n"
    call("init", "--dataset", "npz", "--model", "timm")
    assert 'file = "my-file"' in Path("recipe.toml").read_text()
    assert "unknown architecture 'vgg'" in call("init", "x", "--model", "vgg", code=2).stderr
    assert not Path("x.toml").exists()


def test_a_file_that_is_there_stays(here):
    Path("recipe.toml").write_text("mine")
    told = "prunekit: recipe.toml exists already; choose another name\n"
    assert call("init", code=2).stderr == told
    assert call("init", "--like", "quickstart", code=2).stderr == told
    assert Path("recipe.toml").read_text() == "mine"


def test_nothing_is_written_through_a_link(here):
    Path("i.toml").symlink_to("elsewhere.toml")
    assert "i.toml exists already" in call("init", "i", code=2).stderr
    assert not Path("elsewhere.toml").exists()


def test_a_place_without_room_for_a_folder_is_told_with_the_way_out(here):
    Path("file").touch()
    told = call("init", "file/mine", code=2).stderr
    assert "cannot write to file: " in told
    assert told.endswith("; choose a NAME in another folder\n")


@pytest.mark.parametrize("recipe", sorted(SHIPPED.rglob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_can_be_copied(here, recipe):
    name = recipe.relative_to(SHIPPED).with_suffix("").as_posix()
    written = call("init", "sub/copy", "--like", name).stdout.splitlines()
    assert written[0] == "sub/copy.toml"
    assert all(Path(file).exists() for file in written)
    runs = make_plan(load_recipe(Path("sub/copy.toml")), load_registry()).runs
    assert len(runs) == len(make_plan(load_recipe(recipe), load_registry()).runs)


def test_recipes_that_share_what_they_extend_can_stand_together(here):
    call("init", "a", "--like", "hydra/svhn-vgg16")
    assert call("init", "b", "--like", "hydra/cifar10-wrn-28-4").stdout == "b.toml\n"
    assert 'name = "b"' in Path("b.toml").read_text()
    Path("cifar10-vgg16.toml").write_text("mine")
    error = call("init", "c", "--like", "hydra/svhn-vgg16", code=2).stderr
    assert "cifar10-vgg16.toml exists already; choose a NAME in another folder" in error
    assert not Path("c.toml").exists()
    assert (
        "leave out the other options"
        in call("init", "d", "--like", "quickstart", "--objective", "mart", code=2).stderr
    )


@pytest.mark.parametrize("options", [["--dataset", "given"], ["--model", "given"]])
def test_what_cannot_stand_alone_is_refused(here, options):
    assert "'given' cannot stand alone in a recipe" in call("init", *options, code=2).stderr


def test_an_unknown_size_is_not_a_small_one(here):
    done = call("init", "--dataset", "image-folder", "--model", "imagenet-resnet50")
    assert 'eps = "8/255"' in Path("recipe.toml").read_text()
    assert "replace my-file" in done.stderr


def test_a_recipe_that_is_not_shipped(here):
    error = call("init", "--like", "quickstrat", code=2).stderr
    assert "no recipe 'quickstrat' comes with prunekit; there are: benchmark/" in error
