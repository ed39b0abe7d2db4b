"""TOML values -> typed options: what is taken, and what is said of the rest."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from prunekit.catalog.component import Component, Radius, Use, option
from prunekit.catalog.registry import Entry, Registry
from prunekit.contracts import Evaluator, OptimizerChoice, Pruner, Schedule, Threat
from prunekit.errors import OptionError, Place
from prunekit.recipe.resolver import Resolver, describe


@dataclass(frozen=True)
class ScheduleOptions:
    warmup: float = option(0.0, help="warm-up", low=0)


@dataclass(frozen=True)
class OptimizerOptions:
    lr: float = option(0.1, help="rate", above=0)
    schedule: Use[Schedule] = option("cosine", help="schedule")


@dataclass(frozen=True)
class AttackOptions:
    eps: Radius | None = option(None, help="radius")
    norm: Literal["linf", "l2"] | None = option(None, help="norm")


@dataclass(frozen=True)
class Options:
    whole: int = option(1, help="a whole number", low=1, high=5)
    number: float = option(0.5, help="a number", above=0, below=1)
    truth: bool = option(False, help="true or false")
    text: str = option("x", help="a text")
    choice: Literal["layer", "global"] = option("layer", help="a choice")
    size: Literal[1, 2] = option(1, help="a size")
    eps: Radius = option(0.1, help="a radius")
    file: Path | None = option(None, help="a file", exists=True)
    pair: tuple[float, float] = option((0.1, 0.2), help="two numbers", low=0, below=1)
    words: tuple[str, ...] = option((), help="some texts")
    anything: Any = option(None, help="anything")
    kwargs: dict[str, Any] | None = option(None, help="a table")
    optimizer: Use[OptimizerChoice] = option({"use": "sgd", "lr": 0.7}, help="optimizer")
    pruner: Use[Pruner] = option("score", help="pruner")
    with_: tuple[Use[Evaluator], ...] = option((), help="evaluators")
    lambda_: float = option(1.0, help="a Python keyword")


@dataclass(frozen=True)
class Needy:
    epochs: int = option(help="passes over the images")
    eps: Radius = option(help="radius")
    budget: Literal["layer", "global"] = option(help="budget")
    betas: tuple[float, float] = option(help="decays")


@dataclass(frozen=True)
class Checked:
    low: int = option(1, help="low")
    high: int = option(2, help="high")

    def __post_init__(self):
        if self.low == 7:
            raise OptionError("low", "low cannot be 7; write 8")
        if self.low > self.high:
            raise ValueError("low above high")


def make_registry():
    def entry(kind, name, options=None):
        settings = {"options": options} if options else {}
        return Entry(kind, Component(name=name, summary=name, build="m:b", **settings), "p", "d 1")

    return Registry(
        (
            entry("optimizer", "sgd", OptimizerOptions),
            entry("optimizer", "adam", OptimizerOptions),
            entry("schedule", "cosine", ScheduleOptions),
            entry("schedule", "step", ScheduleOptions),
            entry("pruner", "score", ScheduleOptions),
            entry("evaluator", "clean"),
            entry("evaluator", "pgd", AttackOptions),
        )
    )


def resolve(table, cls=Options, threat=None, folder=Path("/base")):
    """(options or None, problems as "path: message")."""
    resolver = Resolver(
        make_registry(), folder, lambda path: Place(".".join(map(str, path))), threat
    )
    return resolver.options(cls, table, (), "thing 'x'"), list(map(str, resolver.problems))


def test_defaults_need_no_table():
    options, problems = resolve({})
    assert problems == []
    assert (options.whole, options.pair, options.words) == (1, (0.1, 0.2), ())
    assert isinstance(options.eps, Radius)
    assert options.optimizer.component.name == "sgd"
    assert options.optimizer.options.lr == 0.7
    assert options.optimizer.options.schedule.component.name == "cosine"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("whole", 3.0, 3),
        ("number", 0.25, 0.25),
        ("truth", True, True),
        ("choice", "global", "global"),
        ("size", 2, 2),
        ("eps", "8/255", 8 / 255),
        ("eps", "0.25", 0.25),
        ("eps", 0, 0),
        ("eps", 1, 1),
        ("pair", [0, 0.5], (0.0, 0.5)),
        ("words", ["a", "b"], ("a", "b")),
        ("anything", [1, {"a": 2}], [1, {"a": 2}]),
        ("kwargs", {"depth": 3}, {"depth": 3}),
        ("file", "/", Path("/")),
        ("lambda", 3, 3.0),
    ],
)
def test_a_value_of_the_right_type_is_taken(key, value, expected):
    options, problems = resolve({key: value})
    assert problems == []
    found = getattr(options, "lambda_" if key == "lambda" else key)
    assert found == expected
    assert type(found) in (type(expected), Radius)


WRONG = [
    ("whole", True, "whole: whole of thing 'x' must be a whole number, got True"),
    ("whole", 1.5, "whole: whole of thing 'x' must be a whole number, got 1.5"),
    ("whole", "3", "whole: whole of thing 'x' must be a whole number, got '3'"),
    ("whole", 0, "whole: whole of thing 'x' must be at least 1 and at most 5, got 0"),
    ("whole", 6, "whole: whole of thing 'x' must be at least 1 and at most 5, got 6"),
    ("number", "0.5", "number: number of thing 'x' must be a number, got '0.5'"),
    ("number", False, "number: number of thing 'x' must be a number, got False"),
    ("number", 1, "number: number of thing 'x' must be above 0 and below 1, got 1"),
    (
        "number",
        90,
        "number: number of thing 'x' must be above 0 and below 1, got 90; write 0.9 for 90 %",
    ),
    ("number", float("nan"), "number: number of thing 'x' must be above 0 and below 1, got nan"),
    ("truth", 1, "truth: truth of thing 'x' must be true or false, got 1"),
    ("truth", "true", "truth: truth of thing 'x' must be true or false, got 'true'"),
    ("text", 3, "text: text of thing 'x' must be a string, got 3"),
    ("choice", "globl", "choice: choice of thing 'x' cannot be 'globl'; did you mean 'global'?"),
    ("choice", 3, "choice: choice of thing 'x' cannot be 3; there are: global, layer"),
    ("size", True, "size: size of thing 'x' cannot be True; there are: 1, 2"),
    ("eps", 8, 'eps: eps is a radius in [0, 1] pixel units, got 8; write "8/255"'),
    ("eps", 8.0, 'eps: eps is a radius in [0, 1] pixel units, got 8.0; write "8/255"'),
    ("eps", "8", 'eps: eps is a radius in [0, 1] pixel units, got 8; write "8/255"'),
    ("eps", 300, "eps: eps is a radius in [0, 1] pixel units, got 300"),
    ("eps", -0.1, "eps: eps is a radius in [0, 1] pixel units, got -0.1"),
    ("eps", "nan", "eps: eps is a radius in [0, 1] pixel units, got nan"),
    ("eps", "8/0", "eps: eps of thing 'x' must be a radius such as 0.03 or \"8/255\", got '8/0'"),
    ("eps", True, "eps: eps of thing 'x' must be a radius such as 0.03 or \"8/255\", got True"),
    ("file", 3, "file: file of thing 'x' must be a path, got 3"),
    (
        "file",
        "no.npz",
        "file: file of thing 'x': there is no /base/no.npz; relative paths start at the "
        "folder of the recipe",
    ),
    ("words", "a", "words: words of thing 'x' must be a list, got 'a'; write ['a']"),
    ("pair", [0.5], "pair: pair of thing 'x' must be a list of 2 values, got [0.5]"),
    ("kwargs", 3, "kwargs: kwargs of thing 'x' must be a table, got 3"),
    ("pruner", "scor", "pruner.use: unknown pruner 'scor'; did you mean 'score'?"),
    ("pruner", 3, 'pruner: pruner needs a name; write use = "score" (prunekit list pruners)'),
    ("lambda_", 3, "lambda_: unknown option 'lambda_' of thing 'x'; did you mean 'lambda'?"),
    ("numbr", 3, "numbr: unknown option 'numbr' of thing 'x'; did you mean 'number'?"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_value_that_cannot_be_is_told_with_a_way_out(key, value, message):
    options, problems = resolve({key: value})
    assert options is None
    assert problems == [message]


def test_every_mistake_is_told_at_once():
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


def test_what_is_required_is_asked_for_with_an_example():
    _, problems = resolve({}, Needy)
    assert problems == [
        ": thing 'x' needs epochs: passes over the images; write epochs = 10",
        ": thing 'x' needs eps: radius; write eps = \"8/255\"",
        ": thing 'x' needs budget: budget; write budget = \"layer\"",
        ": thing 'x' needs betas: decays; write betas = [0.5, 0.5]",
    ]


def test_what_the_options_refuse_themselves():
    assert resolve({"low": 7, "high": 9}, Checked)[1] == [
        "low: thing 'x': low cannot be 7; write 8"
    ]
    assert resolve({"low": 3}, Checked)[1] == [
        ": thing 'x' rejects its options: ValueError: low above high"
    ]


# Components in options


@pytest.mark.parametrize("written", ["step", {"use": "step"}])
def test_a_component_is_named_by_a_string_or_a_table(written):
    options, _ = resolve({"optimizer": {"use": "adam", "schedule": written}})
    assert options.optimizer.component.name == "adam"
    assert options.optimizer.options.lr == 0.1
    assert options.optimizer.options.schedule.component.name == "step"


def test_a_table_without_a_name_changes_the_default_component():
    options, problems = resolve({"optimizer": {"schedule": "step"}, "pruner": {"warmup": 3}})
    assert problems == []
    assert options.optimizer.component.name == "sgd"
    assert options.optimizer.options.lr == 0.7
    assert options.optimizer.options.schedule.component.name == "step"
    assert options.pruner.options.warmup == 3


def test_another_component_does_not_take_over_options_of_the_default():
    options, _ = resolve({"optimizer": {"use": "adam"}})
    assert options.optimizer.options.lr == 0.1


def test_evaluators_may_have_names_of_their_own():
    options, _ = resolve({"with": [{"use": "pgd", "name": "weak", "eps": 0.1}, "clean"]})
    assert [use.name for use in options.with_] == ["weak", "clean"]
    assert resolve({"with": [{"use": "clean", "name": 3}]})[1] == [
        "with.0.name: name of evaluator 'clean' must consist of letters, digits, '-', '_' and "
        "'+', got 3"
    ]
    (problem,) = resolve({"with": [{"use": "clean", "name": "../up"}]})[1]
    assert problem.endswith("got '../up'")
    assert resolve({"pruner": {"use": "score", "name": "x"}})[1] == [
        "pruner.name: unknown option 'name' of pruner 'score'; there are: warmup"
    ]


# Threats


def test_a_component_inherits_the_threat_and_may_override_parts_of_it():
    threat = Threat("l2", 0.5)
    table = {"with": ["pgd", {"use": "pgd", "eps": 2}, {"use": "pgd", "norm": "linf"}, "clean"]}
    options, problems = resolve(table, threat=threat)
    assert problems == []
    assert [use.threat for use in options.with_] == [
        threat, Threat("l2", 2), Threat("linf", 0.5), None
    ]  # fmt: skip


def test_a_radius_above_one_is_a_mistake_in_linf_alone():
    assert resolve({"with": [{"use": "pgd", "eps": 2, "norm": "linf"}]})[1] == [
        'with.0.eps: eps is a radius in [0, 1] pixel units, got 2; write "2/255"'
    ]
    assert resolve({"with": [{"use": "pgd", "eps": 2, "norm": "l2"}]})[1] == []


@dataclass(frozen=True)
class OfOneNorm:
    radii: tuple[Radius, ...] = option((), help="radii", norm="l2", above=0)


def test_a_radius_that_is_always_of_l2_may_be_above_one_whatever_the_threat():
    table = {"radii": [0.5, 2]}
    for threat in (None, Threat("linf", 0.1)):
        options, problems = resolve(table, OfOneNorm, threat)
        assert (options.radii, problems) == ((0.5, 2), [])
    assert resolve({"radii": [0.5, -1]}, OfOneNorm)[1] == [
        "radii.1: radii[1] is a radius in [0, 1] pixel units, got -1"
    ]


def test_a_missing_threat_is_asked_for():
    assert resolve({"with": ["pgd"]})[1] == [
        "with.0: evaluator 'pgd' needs a threat model; write [threat] with norm = \"linf\" and "
        'eps = "8/255"'
    ]
    assert resolve({"with": [{"use": "pgd", "eps": 0.1}]})[1] == []


# Paths


def test_paths_start_at_the_file_that_says_them_or_where_the_command_is_given(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for folder in ("base", "here"):
        (tmp_path / folder).mkdir()
    (tmp_path / "base/a.npz").touch()
    (tmp_path / "c.npz").touch()

    def find(name, place):
        resolver = Resolver(make_registry(), tmp_path / "here", lambda path: place)
        options = resolver.options(Options, {"file": name}, (), "thing 'x'")
        return options and options.file, [p.message for p in resolver.problems]

    assert find("a.npz", Place("base/r.toml", 3)) == (tmp_path / "base/a.npz", [])
    assert find("c.npz", Place("--set dataset.file=c.npz")) == (tmp_path / "c.npz", [])
    assert find("d.npz", Place("--set dataset.file=d.npz"))[1] == [
        f"file of thing 'x': there is no {tmp_path}/d.npz; relative paths start at the "
        "current folder"
    ]


def test_description_resolves_to_the_same_options():
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
