"""Metrics in JSON and back, and what the names of old runs said."""

import copy
import json
import pickle

import pytest

from prunekit.contracts import Metric
from prunekit.store.metrics import read_metrics, read_old_metrics, split_metric, write_metrics

ACCURACY = Metric(0.5, n=20, low=0.3, high=0.7, unit="fraction")
ZERO = Metric(2, kind="diagnosis", note="gave no gradient")


def test_a_metric_is_a_number_with_words():
    assert ACCURACY == 0.5
    assert ACCURACY + 1 == 1.5
    assert (ACCURACY.n, ACCURACY.low, ACCURACY.high) == (20, 0.3, 0.7)
    with pytest.raises(AttributeError, match="make another one to set its n"):
        ACCURACY.n = 3


@pytest.mark.parametrize("metric", [ACCURACY, ZERO, Metric(0.1)])
@pytest.mark.parametrize("way", ["json", "pickle", "copy", "deepcopy"])
def test_nothing_is_lost_on_the_way(metric, way):
    again = {
        "json": lambda m: read_metrics(json.loads(json.dumps(write_metrics({"a": m}))))["a"],
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
    }[way](metric)
    assert (float(again), vars(again)) == (float(metric), vars(metric))


def test_what_is_no_metric_stays():
    told = {"masks": "abc", "counts": {"kept": 1}, "loss": 0.25}
    assert read_metrics(write_metrics(told)) == told


def test_old_runs_say_by_their_names_what_they_mean():
    found = read_old_metrics({
        "pgd.accuracy": 0.5, "pgd.accuracy_low": 0.3, "pgd.accuracy_high": 0.7, "pgd.n": 20,
        "pgd.zero_gradient": 2, "certify.certified@0.25": 0.4, "certify.acr": 0.1,
        "certify.sigma": 0.25, "autoattack.standard": 0.0, "sparsity": 0.9, "masks": "abc",
        "epoch": 3, "loss": 0.5,
    })  # fmt: skip
    assert vars(found["pgd.accuracy"]) == vars(ACCURACY)
    assert {n for n, v in found.items() if isinstance(v, Metric) and v.kind == "result"} == {
        "pgd.accuracy", "certify.certified@0.25", "certify.acr", "sparsity", "loss"
    }  # fmt: skip
    assert found["pgd.zero_gradient"].kind == "diagnosis"
    assert found["certify.sigma"].kind == found["autoattack.standard"].kind == "setting"
    assert (found["sparsity"].unit, found["certify.certified@0.25"].unit) == (
        "sparsity",
        "fraction",
    )
    assert (found["masks"], found["epoch"]) == ("abc", 3)
    assert "pgd.n" not in found


def test_a_decimal_point_is_no_border():
    assert split_metric("certify.certified@0.25") == ("certify", "certified@0.25")
    assert split_metric("pgd-0.031.accuracy") == ("pgd-0.031", "accuracy")
    assert split_metric("sparsity") == ("", "sparsity")
