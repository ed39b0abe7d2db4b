"""Contradictions between evaluators are told, and nothing else is."""

import numpy as np
import pytest

from prunekit.catalog.component import Component, Use
from prunekit.contracts import Threat
from prunekit.engine.evaluating import cross_examine

EPS = Threat("linf", 0.1)
INDEX = np.array([0, 10, 20, 30])


def attack(name, correct, threat=EPS, beats=()):
    component = Component(name=name, summary="", build="a:b", judges="attack", beats=beats)
    return Use("evaluator", component, None, name=name, threat=threat), f"{name}.correct", correct


def proof(name, verified, threat=EPS):
    component = Component(name=name, summary="", build="a:b", judges="proof")
    return Use("evaluator", component, None, name=name, threat=threat), f"{name}.verified", verified


def examine(*judged):
    records = {"index": INDEX} | {key: np.array(values) for _, key, values in judged}
    return list(cross_examine([use for use, _, _ in judged], records))


def test_a_stronger_attack_that_leaves_more_standing_is_told():
    strong = attack("auto", [True, True, True, False], beats=("pgd",))
    (text,) = examine(attack("pgd", [True, True, False, False]), strong)
    assert text.startswith("auto leaves 75.0% of the images standing, pgd at the same radius only")


@pytest.mark.parametrize(
    "weak",
    [
        attack("pgd", [True, True, True, False]),  # the same number
        attack("pgd", [True, False, False, False], Threat("linf", 0.2)),  # another radius
        attack("pgd", [True, False, False, False], Threat("l2", 0.1)),
        attack("other", [True, False, False, False]),  # nothing was said of it
    ],
)
def test_attacks_that_do_not_compare_are_left_alone(weak):
    assert examine(attack("auto", [True, True, True, False], beats=("pgd",)), weak) == []


def test_a_fifth_of_a_percent_is_tolerated():
    weak, strong = np.ones(1000, bool), np.ones(1000, bool)
    weak[:2] = False
    uses = [attack("auto", strong, beats=("pgd",))[0], attack("pgd", weak)[0]]
    records = {"index": np.arange(1000), "auto.correct": strong, "pgd.correct": weak}
    assert list(cross_examine(uses, records)) == []
    weak[2] = False
    assert len(list(cross_examine(uses, records))) == 1


def test_a_proof_that_an_attack_breaks_is_unsound():
    (text,) = examine(
        proof("verified", [True, True, False, False]), attack("pgd", [True, False, False, True])
    )
    assert text.startswith("UNSOUND: pgd breaks 1 images that verified says are verified")
    assert "test images 10)" in text


def test_a_proof_at_a_smaller_radius_may_be_broken_at_a_larger():
    assert examine(proof("v", [True] * 4, Threat("linf", 0.05)), attack("pgd", [False] * 4)) == []


def test_components_without_a_threat_say_nothing_of_it():
    assert examine(proof("v", [True] * 4, None), attack("a", [False] * 4, None)) == []
