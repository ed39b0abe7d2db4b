"""Metrics in JSON and back."""

import copy
import json
import pickle

import pytest

from prunekit.contracts import Metric
from prunekit.store.metrics import read_metrics, split_metric, write_metrics

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


def test_a_decimal_point_is_no_border():
    assert split_metric("certify.certified@0.25") == ("certify", "certified@0.25")
    assert split_metric("pgd-0.031.accuracy") == ("pgd-0.031", "accuracy")
    assert split_metric("sparsity") == ("", "sparsity")
