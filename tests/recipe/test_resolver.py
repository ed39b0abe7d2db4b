"""TOML tables -> components and their typed options."""

from dataclasses import dataclass

import pytest

from prunekit.catalog.component import option
from prunekit.contracts import Threat
from prunekit.errors import OptionError, Place
from prunekit.recipe.describing import describe


@dataclass(frozen=True)
class Checked:
    low: int = option(1, help="low")
    high: int = option(2, help="high")

    def __post_init__(self):
        if self.low == 7:
            raise OptionError("low", "low cannot be 7; write 8")
        if self.low > self.high:
            raise ValueError("low above high")


def test_every_mistake_is_told_at_once(resolve):
    options, problems = resolve(
        {
            "whole": 1.5,
            "pair": [0.5, 1],
            "with": ["clen", {"use": "pgd", "esp": 1}, 3],
            "optimizer": {"use": "adam", "lr": 0, "schedule": {"use": "step", "warmup": -1}},
        }
    )
    assert options is None
    assert sorted(problems) == [
        "optimizer.lr: lr of optimizer 'adam' must be above 0, got 0",
        "optimizer.schedule.warmup: warmup of schedule 'step' must be at least 0, got -1",
        "pair.1: pair[1] of thing 'x' must be at least 0 and below 1, got 1",
        "whole: whole of thing 'x' must be a whole number, got 1.5",
        "with.0.use: unknown evaluator 'clen'; did you mean 'clean'?",
        "with.1.esp: unknown option 'esp' of evaluator 'pgd'; did you mean 'eps'?",
        'with.2: with[2] needs a name; write use = "clean" (prunekit list evaluators)',
    ]


def test_what_the_options_refuse_themselves(resolve):
    assert resolve({"low": 7, "high": 9}, Checked)[1] == [
        "low: thing 'x': low cannot be 7; write 8"
    ]
    assert resolve({"low": 3}, Checked)[1] == [
        ": thing 'x' rejects its options: ValueError: low above high"
    ]


@pytest.mark.parametrize("written", ["step", {"use": "step"}])
def test_a_component_is_named_by_a_string_or_a_table(written, resolve):
    options, _ = resolve({"optimizer": {"use": "adam", "schedule": written}})
    assert options.optimizer.component.name == "adam"
    assert options.optimizer.options.lr == 0.1
    assert options.optimizer.options.schedule.component.name == "step"


def test_a_table_without_a_name_changes_the_default_component(resolve):
    options, problems = resolve({"optimizer": {"schedule": "step"}, "pruner": {"warmup": 3}})
    assert problems == []
    assert options.optimizer.component.name == "sgd"
    assert options.optimizer.options.lr == 0.7
    assert options.optimizer.options.schedule.component.name == "step"
    assert options.pruner.options.warmup == 3


def test_another_component_does_not_take_over_options_of_the_default(resolve):
    options, _ = resolve({"optimizer": {"use": "adam"}})
    assert options.optimizer.options.lr == 0.1


def test_evaluators_may_have_names_of_their_own(resolve):
    options, _ = resolve({"with": [{"use": "pgd", "name": "weak", "eps": 0.1}, "clean"]})
    assert [use.name for use in options.with_] == ["weak", "clean"]
    assert resolve({"with": [{"use": "clean", "name": 3}]})[1] == [
        "with.0.name: name of evaluator 'clean' must consist of at most 100 letters, digits, '-', "
        "'_' and '+', got 3"
    ]
    (problem,) = resolve({"with": [{"use": "clean", "name": "../up"}]})[1]
    assert problem.endswith("got '../up'")
    assert resolve({"pruner": {"use": "score", "name": "x"}})[1] == [
        "pruner.name: unknown option 'name' of pruner 'score'; there are: warmup"
    ]


def test_a_component_inherits_the_threat_and_may_override_parts_of_it(resolve):
    threat = Threat("l2", 0.5)
    table = {"with": ["pgd", {"use": "pgd", "eps": 2}, {"use": "pgd", "norm": "linf"}, "clean"]}
    options, problems = resolve(table, threat=threat)
    assert problems == []
    assert [use.threat for use in options.with_] == [
        threat, Threat("l2", 2), Threat("linf", 0.5), None
    ]  # fmt: skip


def test_a_missing_threat_is_asked_for(resolve):
    assert resolve({"with": ["pgd"]})[1] == [
        "with.0: evaluator 'pgd' needs a threat model; write [threat] with norm = \"linf\" and "
        'eps = "8/255"'
    ]
    assert resolve({"with": [{"use": "pgd", "eps": 0.1}]})[1] == []


def test_a_norm_that_a_component_does_not_take_is_refused_where_it_stands(resolve):
    way = 'does not take norm "l2"; write norm = "linf" and an eps for it, or use another component'
    assert resolve({"with": ["ibp"]}, threat=Threat("linf", 0.1))[1] == []
    assert resolve({"with": ["pgd", "ibp"]}, threat=Threat("l2", 0.5))[1] == [
        f"with.1: evaluator 'ibp' {way}"
    ]
    assert resolve({"with": [{"use": "ibp", "norm": "l2"}]}, threat=Threat("linf", 0.1))[1] == [
        f"with.0.norm: evaluator 'ibp' {way}"
    ]
    table = {"with": [{"use": "ibp", "norm": "linf", "eps": 0.2}]}
    options, problems = resolve(table, threat=Threat("l2", 0.5))
    assert (problems, options.with_[0].threat) == ([], Threat("linf", 0.2))
    # Without [threat], the norm is the first that it takes.
    assert resolve({"with": [{"use": "ibp", "eps": 0.2}]})[0].with_[0].threat == Threat("linf", 0.2)


def test_paths_start_at_the_file_that_says_them_or_where_the_command_is_given(
    tmp_path, monkeypatch, resolve
):
    monkeypatch.chdir(tmp_path)
    for folder in ("base", "here"):
        (tmp_path / folder).mkdir()
    (tmp_path / "base/a.npz").touch()
    (tmp_path / "c.npz").touch()

    def find(name, place):
        options, problems = resolve({"file": name}, folder=tmp_path / "here", place=place)
        return options and options.file, problems

    assert find("a.npz", Place("base/r.toml", 3)) == (tmp_path / "base/a.npz", [])
    assert find("c.npz", Place("--set dataset.file=c.npz")) == (tmp_path / "c.npz", [])
    assert find("d.npz", Place("--set dataset.file=d.npz"))[1] == [
        f"--set dataset.file=d.npz: file of thing 'x': there is no {tmp_path}/d.npz; relative "
        "paths start at the current folder"
    ]


def test_description_resolves_to_the_same_options(resolve):
    options, _ = resolve(
        {
            "eps": "8/255",
            "lambda": 2,
            "file": "/",
            "with": [{"use": "pgd", "name": "weak", "eps": 0.1}],
            "optimizer": {"use": "adam", "schedule": "step"},
        }
    )
    told = describe(options)
    assert told["with"] == [{"use": "pgd", "name": "weak", "eps": 0.1}]
    assert told["optimizer"]["schedule"] == {"use": "step", "warmup": 0.0}
    assert told["file"] == "/"
    assert "anything" not in told
    assert type(told["eps"]) is float
    assert resolve(told)[0] == options
