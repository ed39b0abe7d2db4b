"""TOML values -> values of options: what is taken, and what is said of the rest."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from prunekit.catalog.component import Radius, option
from prunekit.contracts import Threat


@dataclass(frozen=True)
class Needy:
    epochs: int = option(help="passes over the images")
    eps: Radius = option(help="radius")
    budget: Literal["layer", "global"] = option(help="budget")
    betas: tuple[float, float] = option(help="decays")


def test_defaults_need_no_table(resolve):
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
def test_a_value_of_the_right_type_is_taken(key, value, expected, resolve):
    options, problems = resolve({key: value})
    assert problems == []
    found = getattr(options, "lambda_" if key == "lambda" else key)
    assert found == expected
    assert type(found) in (type(expected), Radius)


WRONG = [
    ("whole", True, "whole: whole of thing 'x' must be a whole number, got True"),
    ("whole", 1.5, "whole: whole of thing 'x' must be a whole number, got 1.5"),
    ("whole", "3", "whole: whole of thing 'x' must be a whole number, got '3'; write 3"),
    ("whole", "1e6", "whole: whole of thing 'x' must be a whole number, got '1e6'; write 1000000"),
    ("whole", "1.5", "whole: whole of thing 'x' must be a whole number, got '1.5'"),
    ("whole", "three", "whole: whole of thing 'x' must be a whole number, got 'three'"),
    ("number", "90%", "number: number of thing 'x' must be a number, got '90%'; write 0.9"),
    ("number", "0,95", "number: number of thing 'x' must be a number, got '0,95'; write 0.95"),
    ("number", "inf", "number: number of thing 'x' must be a number, got 'inf'"),
    ("whole", 0, "whole: whole of thing 'x' must be at least 1 and at most 5, got 0"),
    ("whole", 6, "whole: whole of thing 'x' must be at least 1 and at most 5, got 6"),
    ("number", "0.5", "number: number of thing 'x' must be a number, got '0.5'; write 0.5"),
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
    ("eps", "-8/255", 'eps: eps is a radius in [0, 1] pixel units, got -8/255; write "8/255"'),
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
    ("words", "a", "words: words of thing 'x' must be a list, got 'a'; write [\"a\"]"),
    ("pair", [0.5], "pair: pair of thing 'x' must be a list of 2 values, got [0.5]"),
    ("kwargs", 3, "kwargs: kwargs of thing 'x' must be a table, got 3"),
    ("pruner", "scor", "pruner.use: unknown pruner 'scor'; did you mean 'score'?"),
    ("pruner", 3, 'pruner: pruner needs a name; write use = "score" (prunekit list pruners)'),
    ("lambda_", 3, "lambda_: unknown option 'lambda_' of thing 'x'; did you mean 'lambda'?"),
    ("numbr", 3, "numbr: unknown option 'numbr' of thing 'x'; did you mean 'number'?"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_value_that_cannot_be_is_told_with_a_way_out(key, value, message, resolve):
    options, problems = resolve({key: value})
    assert options is None
    assert problems == [message]


def test_what_is_required_is_asked_for_with_an_example(resolve):
    _, problems = resolve({}, Needy)
    assert problems == [
        ": thing 'x' needs epochs: passes over the images; write epochs = 10",
        ": thing 'x' needs eps: radius; write eps = \"8/255\"",
        ": thing 'x' needs budget: budget; write budget = \"layer\"",
        ": thing 'x' needs betas: decays; write betas = [0.5, 0.5]",
    ]


def test_a_radius_above_one_is_a_mistake_in_linf_alone(resolve):
    assert resolve({"with": [{"use": "pgd", "eps": 2, "norm": "linf"}]})[1] == [
        'with.0.eps: eps is a radius in [0, 1] pixel units, got 2; write "2/255"'
    ]
    assert resolve({"with": [{"use": "pgd", "eps": 2, "norm": "l2"}]})[1] == []


@dataclass(frozen=True)
class OfOneNorm:
    radii: tuple[Radius, ...] = option((), help="radii", norm="l2", above=0)


def test_a_radius_that_is_always_of_l2_may_be_above_one_whatever_the_threat(resolve):
    table = {"radii": [0.5, 2]}
    for threat in (None, Threat("linf", 0.1)):
        options, problems = resolve(table, OfOneNorm, threat)
        assert (options.radii, problems) == ((0.5, 2), [])
    assert resolve({"radii": [0.5, -1]}, OfOneNorm)[1] == [
        "radii.1: radii[1] is a radius in [0, 1] pixel units, got -1"
    ]
