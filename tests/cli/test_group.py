"""The command line as a whole: exit codes, usage, and nothing heavy before it is needed."""

import sys

import pytest

import prunekit
from prunekit.errors import DataMissingError, RecipeError, suggest

pytestmark = pytest.mark.usefixtures("here")


def test_usage_errors_exit_with_2(call):
    for arguments in (["chekc"], ["check"], ["run"], ["run", "r.toml", "--bogus"]):
        _, err = call(*arguments, code=2)
        assert err.startswith("Usage:")
    assert "did you mean" in call("run", "r.toml", "--devise", "cpu", code=2)[1].lower()


def test_a_defect_is_one_line_and_a_traceback_with_debug(monkeypatch, call):
    def burst(*arguments):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("prunekit.cli.components.load_registry", burst)
    line = "prunekit: ZeroDivisionError: oh (a bug in prunekit; --debug shows where)\n"
    assert call("list", code=1) == ("", line)
    _, err = call("--debug", "list", code=1)
    assert err.startswith("Traceback")
    assert err.endswith(line)


def test_interruption_exits_with_130(monkeypatch, call):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("prunekit.cli.components.load_registry", interrupt)
    assert call("list", code=130) == ("", "prunekit: interrupted\n")


def test_an_interrupted_run_says_how_to_go_on(here, monkeypatch, call):
    from prunekit.engine.engine import Engine
    from prunekit.errors import Interrupted

    def interrupt(*arguments):
        raise Interrupted

    command = ["prunekit", "run", "r.toml", "--set", "seed=1 # x", "--device", "cpu"]
    monkeypatch.setattr(Engine, "run", interrupt)
    monkeypatch.setattr(sys, "argv", command)
    out, err = call(*command[1:], code=130)
    assert out == ""
    assert err.splitlines()[-2:] == [
        "everything so far is saved; resume with: prunekit run r.toml --set 'seed=1 # x' "
        "--device cpu",
        "prunekit: interrupted",
    ]
    monkeypatch.undo()
    monkeypatch.chdir(here)
    call(*command[1:])


def test_a_file_that_cannot_be_read_is_no_defect(monkeypatch, call):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr("prunekit.cli.components.load_registry", refuse)
    assert call("list", code=1) == ("", "prunekit: somewhere: Permission denied\n")


# Words


@pytest.mark.parametrize(
    ("word", "words", "meant"),
    [
        ("CIFAR-10", ["cifar10", "cifar100", "digits"], "cifar10"),
        ("WRN_28_4", ["wrn-28-10", "wrn-28-4"], "wrn-28-4"),
        ("SGD", ["adam", "sgd"], "sgd"),
        ("magnitude", ["lwm", "random", "score"], "lwm"),
        ("learning_rate", ["lr", "momentum"], "lr"),
        ("Weight-Decay", ["lr", "weight_decay"], "weight_decay"),
    ],
)
def test_words_of_the_field_are_understood(word, words, meant):
    assert suggest(word, words) == f"did you mean {meant!r}?"
    # A synonym of what there is not says nothing.
    assert "did you mean" not in suggest(word, ["qqq"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("train", "r.toml"), "write prunekit run"),
        (("chekc", "r.toml"), "did you mean 'check'?"),
        (("run", "r.toml", "--gpu"), "write --device cuda"),
        (("run", "r.toml", "--dry_run"), "did you mean '--dry-run'?"),
        (("run", "r.toml", "--seed", "3"), "write --set seed=1"),
        (("run", "r.toml", "--resume"), "the same command again goes on where it was stopped"),
        (("run", "r.toml", "--verbose"), "prunekit --debug shows the traceback"),
        (("check", "r.toml", "--gpu"), "there are: --deep, --json, --set"),
        (("check", "r.toml", "--set", "pretrain.lr=1"), "write pretrain.optimizer.lr"),
        (("check", "r.toml", "--set", "pretrain.learning_rate=1"), "write pretrain.optimizer.lr"),
    ],
)
def test_what_is_called_otherwise_elsewhere(arguments, told, call):
    assert told in call(*arguments, code=2)[1]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[threat]\neps = 8/255", 'eps = "8/255"'),
        ('threat = { norm = "linf", eps = 2 / 255 }', 'eps = "8/255"'),
        ("[stage]\nepochs = 1", "[[stage]], with two brackets"),
        ("lr = 0.1\nlr: 3", "write key = value"),
    ],
)
def test_toml_that_is_nearly_right(line, told, here, recipe, call):
    (here / "r.toml").write_text(f"{recipe}\n{line}\n")
    assert told in call("check", "r.toml", code=2)[1]


def test_a_recipe_from_python_is_located_by_its_keys():
    with pytest.raises(RecipeError) as found:
        prunekit.run(
            {"dataset": "digits", "stage": [{"kind": "pretrain", "optimizer": {"lr": -1}}]}
        )
    assert "recipe.toml" not in str(found.value)
    assert "stage[0].optimizer.lr: lr of optimizer 'sgd' must be above 0" in str(found.value)


def test_a_note_that_recipes_share_is_told_once(here, recipe, call):
    prune = '[[stage]]\nkind = "prune"\nsparsity = 0.5\nepochs = 2\n'
    text = recipe + prune + '[sweep]\n"prune.pruner" = ["score", "lwm"]\n'
    for name in "abc":
        (here / f"{name}.toml").write_text(text)
    out, err = call("check", "a.toml", "b.toml", "c.toml")
    assert out.count("good") == 3
    assert err.count("is one-shot") == 1
    assert "a.toml and 2 more: " in err


def test_missing_data_is_told_once(here, recipe, call, monkeypatch):
    def load(self, run):
        raise DataMissingError("the images are gone")

    monkeypatch.setattr("prunekit.engine.work.Inputs.load", load)
    (here / "m.toml").write_text(recipe + "[sweep]\nseed = [0, 1, 2]\n")
    out, err = call("run", "m.toml", "--device", "cpu", code=2)
    assert (out + err).count("the images are gone") == 1


def test_the_list_fits_80_columns(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = call("list")[0].splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["kind", "name", "what", "it", "is"]
