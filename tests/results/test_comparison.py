"""The comparison of runs: what is shared, what is folded, and that nothing gets lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunekit.results.comparison import Value, compare
from prunekit.results.metrics import format_setting
from prunekit.results.tables import tabulate
from prunekit.store.records import find_runs


def test_seeds_are_folded_and_dense_results_shared(tmp_path: Path, write_sweep) -> None:
    write_sweep(tmp_path)
    dense, low, high = compare(find_runs(tmp_path))
    assert (dense.stage, dense.settings, dense.seeds) == ("dense", {"prune.sparsity": None}, (0, 1))
    assert len(dense.runs) == 4
    value = dense.metrics["clean.accuracy"]
    # 0.80 and 0.82: sd = 0.01 * sqrt(2).
    assert value.mean == pytest.approx(0.81)
    assert value.sd == pytest.approx(0.0141421356)
    assert value.seeds == 2
    assert (value.mean.low, value.mean.high, value.mean.n) == (None, None, None)
    assert (low.settings, low.seeds) == ({"prune.sparsity": 0.9}, (0, 1))
    assert low.metrics["clean.accuracy"].mean == pytest.approx(0.72)
    assert low.metrics["clean.accuracy"].sd == pytest.approx(0.0282842712)
    assert high.metrics["certify.acr"].mean == pytest.approx(0.3025)


def test_a_single_seed_has_its_interval_and_no_deviation(
    tmp_path: Path, evaluate, write_run
) -> None:
    write_run(tmp_path / "a", {"prune.sparsity": 0.9, "seed": 7}, evaluate("k", 0.7, 0.9))
    (row,) = compare(find_runs(tmp_path))
    assert row.seeds == (7,)
    assert row.settings == {}
    value = row.metrics["clean.accuracy"]
    assert (value.mean, value.sd, value.seeds) == (0.7, None, 1)
    mean = value.mean
    assert (mean.low, mean.high, mean.n) == pytest.approx((0.68, 0.71, 360))
    assert row.metrics["certify.acr"] == Value(0.35)
    assert set(row.metrics) == {
        "clean.accuracy",
        "certify.acr",
        "certify.certified@0.25",
        "certify.zero_gradient",
        "sparsity",
    }


def test_the_same_seed_twice_is_never_averaged(tmp_path: Path, evaluate, write_run) -> None:
    for name, value in (("a", 0.7), ("b", 0.9)):
        write_run(tmp_path / name, {"seed": 0}, evaluate(name, value, 0.9))
    rows = compare(find_runs(tmp_path))
    assert [row.metrics["clean.accuracy"].mean for row in rows] == [0.7, 0.9]


def test_a_result_shared_by_seeds_counts_once(tmp_path: Path, evaluate, write_run) -> None:
    for seed in (0, 1):
        write_run(tmp_path / str(seed), {"seed": seed}, evaluate("given", 0.7, 0.0))
    (row,) = compare(find_runs(tmp_path))
    assert row.seeds == ()
    assert row.metrics["clean.accuracy"].seeds == 1


def test_a_seed_that_lacks_a_metric_is_seen(tmp_path: Path, evaluate, write_run) -> None:
    for seed in range(3):
        stage = evaluate(str(seed), 0.5, 0.9)
        if seed == 2:
            stage["metrics"]["clean.accuracy"] = None
        write_run(tmp_path / str(seed), {"seed": seed}, stage)
    (row,) = compare(find_runs(tmp_path))
    assert row.metrics["clean.accuracy"].seeds == 2
    assert "50.0 ± 0.0 (2)" in tabulate([row])[1]


def test_order_is_that_of_the_sweep(tmp_path: Path, evaluate, write_run) -> None:
    combinations = [(epochs, pruner) for epochs in (5, 10) for pruner in ("lwm", {"use": "snip"})]
    for number, (epochs, pruner) in enumerate(combinations):
        name = f"epochs={epochs},pruner={pruner if pruner == 'lwm' else 'score'}"
        settings = {"finetune.epochs": epochs, "prune.pruner": pruner}
        write_run(tmp_path / name, settings, evaluate(name, 0.5, 0.9), number=number)
    rows = compare(find_runs(tmp_path))
    assert [tuple(map(format_setting, row.settings.values())) for row in rows] == [
        ("5", "lwm"),
        ("5", "snip"),
        ("10", "lwm"),
        ("10", "snip"),
    ]
