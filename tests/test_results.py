"""The comparison of runs: what is shared, what is folded, and that nothing gets lost."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prunekit.cli.results import render
from prunekit.errors import UserError
from prunekit.results.comparison import Row, Value, compare
from prunekit.results.metrics import format_setting, is_fraction, is_main
from prunekit.results.tables import tabulate, to_csv, to_json
from prunekit.store.records import find_runs


def evaluate(key: str, accuracy: float, sparsity: float, name: str = "evaluate") -> dict[str, Any]:
    metrics = {
        "clean.accuracy": accuracy,
        "clean.accuracy_low": accuracy - 0.02,
        "clean.accuracy_high": accuracy + 0.01,
        "clean.n": 360,
        "certify.acr": accuracy / 2,
        "certify.certified@0.25": accuracy / 4,
        "certify.zero_gradient": 0,
        "certify.note": "not a number",
        "sparsity": sparsity,
    }
    return {"name": name, "kind": "evaluate", "key": key, "seconds": 1.0, "metrics": metrics}


def write_run(folder: Path, settings: dict[str, Any], *stages: Any, **other: Any) -> Path:
    """Write a run's record; `settings` are those of a sweep, the seed among them."""
    folder.mkdir(parents=True)
    told = {
        "format": 1,
        "name": "quickstart",
        "run": folder.name,
        "status": "done",
        "smoke": False,
        "seed": settings.get("seed", 0),
        "settings": settings,
        "seconds": 12.3,
        "stages": [{"name": "pretrain", "kind": "pretrain", "key": "p", "metrics": {}}, *stages],
        "sparsity": {"kept": 10, "weights": 100, "layers": {}},
        "error": None,
    }
    (folder / "run.json").write_text(json.dumps(told | other))
    return folder


def write_sweep(root: Path) -> None:
    """Two sparsities, two seeds; the dense evaluation of a seed is shared by its sparsities."""
    accuracy = {(0.9, 0): 0.70, (0.9, 1): 0.74, (0.99, 0): 0.60, (0.99, 1): 0.61}
    for (sparsity, seed), found in accuracy.items():
        write_run(
            root / f"sparsity={sparsity},seed={seed}",
            {"prune.sparsity": sparsity, "seed": seed},
            evaluate(f"dense{seed}", 0.80 + 0.02 * seed, 0.0, name="dense"),
            evaluate(f"{sparsity}-{seed}", found, sparsity),
        )


def test_seeds_are_folded_and_dense_results_shared(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    dense, low, high = compare(find_runs(tmp_path))
    assert (dense.stage, dense.settings, dense.seeds) == ("dense", {"prune.sparsity": None}, (0, 1))
    assert len(dense.runs) == 4
    value = dense.metrics["clean.accuracy"]
    # 0.80 and 0.82: sd = 0.01 * sqrt(2).
    assert value.mean == pytest.approx(0.81)
    assert value.sd == pytest.approx(0.0141421356)
    assert value.seeds == 2
    assert (value.low, value.high, value.images) == (None, None, None)
    assert (low.settings, low.seeds) == ({"prune.sparsity": 0.9}, (0, 1))
    assert low.metrics["clean.accuracy"].mean == pytest.approx(0.72)
    assert low.metrics["clean.accuracy"].sd == pytest.approx(0.0282842712)
    assert high.metrics["certify.acr"].mean == pytest.approx(0.3025)


def test_sample_standard_deviation_of_three(tmp_path: Path) -> None:
    # Mean 5, squared deviations 9 + 1 + 16 = 26, over n - 1 = 2.
    for seed, value in enumerate((0.02, 0.04, 0.09)):
        write_run(tmp_path / str(seed), {"seed": seed}, evaluate(str(seed), value, 0.5))
    (row,) = compare(find_runs(tmp_path))
    assert row.metrics["clean.accuracy"].mean == pytest.approx(0.05)
    assert row.metrics["clean.accuracy"].sd == pytest.approx(0.0360555)


def test_a_single_seed_has_its_interval_and_no_deviation(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"prune.sparsity": 0.9, "seed": 7}, evaluate("k", 0.7, 0.9))
    (row,) = compare(find_runs(tmp_path))
    assert row.seeds == (7,)
    assert row.settings == {}
    value = row.metrics["clean.accuracy"]
    assert (value.mean, value.sd, value.seeds) == (0.7, None, 1)
    assert (value.low, value.high, value.images) == pytest.approx((0.68, 0.71, 360))
    assert row.metrics["certify.acr"] == Value(0.35)
    assert set(row.metrics) == {
        "clean.accuracy",
        "certify.acr",
        "certify.certified@0.25",
        "certify.zero_gradient",
        "sparsity",
    }


def test_the_same_seed_twice_is_never_averaged(tmp_path: Path) -> None:
    for name, value in (("a", 0.7), ("b", 0.9)):
        write_run(tmp_path / name, {"seed": 0}, evaluate(name, value, 0.9))
    rows = compare(find_runs(tmp_path))
    assert [row.metrics["clean.accuracy"].mean for row in rows] == [0.7, 0.9]


def test_a_result_shared_by_seeds_counts_once(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / str(seed), {"seed": seed}, evaluate("given", 0.7, 0.0))
    (row,) = compare(find_runs(tmp_path))
    assert row.seeds == ()
    assert row.metrics["clean.accuracy"].seeds == 1


def test_a_seed_that_lacks_a_metric_is_seen(tmp_path: Path) -> None:
    for seed in range(3):
        stage = evaluate(str(seed), 0.5, 0.9)
        if seed == 2:
            stage["metrics"]["clean.accuracy"] = None
        write_run(tmp_path / str(seed), {"seed": seed}, stage)
    (row,) = compare(find_runs(tmp_path))
    assert row.metrics["clean.accuracy"].seeds == 2
    assert "50.0 ± 0.0 (2)" in tabulate([row])[1]


def test_runs_without_a_result_are_listed(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"prune.sparsity": 0.9}, evaluate("k", 0.7, 0.9))
    dense = evaluate("d", 0.8, 0.0, name="dense")
    failed = {"status": "failed", "error": "the loss is nan"}
    write_run(tmp_path / "b", {"prune.sparsity": 0.95}, dense, **failed)
    write_run(tmp_path / "c", {"prune.sparsity": 0.99}, status="running")
    write_run(tmp_path / "d", {"prune.sparsity": 0.99})
    rows = compare(find_runs(tmp_path))
    told = [(row.stage, row.settings["prune.sparsity"], row.status, row.error) for row in rows]
    assert told == [
        ("dense", 0.95, "done", ""),
        ("evaluate", 0.9, "done", ""),
        ("", 0.95, "failed", "the loss is nan"),
        ("", 0.99, "running", ""),
        ("", 0.99, "done", ""),
    ]
    text = show(rows)
    assert "b: failed: the loss is nan\n" in text
    assert "c: running\n" in text


def test_smoke_runs_are_marked_and_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"seed": 0}, evaluate("a", 0.7, 0.9))
    write_run(tmp_path / "b", {"seed": 1}, evaluate("b", 0.1, 0.9), smoke=True)
    rows = compare(find_runs(tmp_path))
    assert [(row.seeds, row.smoke) for row in rows] == [((0,), False), ((1,), True)]
    assert tabulate(rows)[2][-1] == "done, SMOKE"
    assert "numbers mean nothing" in show(rows)


def test_order_is_that_of_the_sweep(tmp_path: Path) -> None:
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


def test_recipes_are_told_apart(tmp_path: Path) -> None:
    for seed, name in enumerate(("trades", "mart")):
        write_run(tmp_path / name, {"seed": seed}, evaluate(name, 0.5, 0.9), name=name)
    rows = compare(find_runs(tmp_path))
    assert [row.settings for row in rows] == [{"name": "mart"}, {"name": "trades"}]


def test_table_text(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    assert tabulate(compare(find_runs(tmp_path))) == [
        [
            "stage",
            "prune\nsparsity",
            "seed",
            "sparsity %",
            "clean\naccuracy %",
            "certify\nacr",
            "certify\ncertified@0.25 %",
        ],
        ["dense", "-", "0,1", "0.00", "81.0 ± 1.4", "0.405 ± 0.0071", "20.2 ± 0.4"],
        ["evaluate", "0.9", "0,1", "90.00", "72.0 ± 2.8", "0.36 ± 0.014", "18.0 ± 0.7"],
        [
            "evaluate",
            "0.99",
            "0,1",
            "99.00",
            "60.5 ± 0.7",
            "0.3025 ± 0.0035",
            "15.1 ± 0.2",
        ],
    ]


def test_titles_are_short_where_that_is_clear() -> None:
    settings = {"prune.pruner": "snip", "prune.epochs": 1, "finetune.epochs": 2}
    row = Row("evaluate", "done", False, settings, (0,), {"sparsity": Value(0.9)}, (Path("a"),))
    assert tabulate([row])[0] == [
        "stage",
        "pruner",
        "prune\nepochs",
        "finetune\nepochs",
        "sparsity %",
    ]


def show(rows: list[Row], width: int = 80, encoding: str = "utf-8") -> str:
    written = io.BytesIO()
    file = io.TextIOWrapper(written, encoding=encoding, write_through=True)
    render(rows, Console(file=file, width=width))
    return written.getvalue().decode(encoding)


def test_table_is_whole_when_it_goes_to_a_file(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    text = show(compare(find_runs(tmp_path)), width=20)
    assert "…" not in text
    line = next(line for line in text.splitlines() if "0.99" in line)
    assert line.split("  ")[0].strip() == "evaluate"
    assert "60.5 ± 0.7" in line
    assert "15.1 ± 0.2" in line
    assert "60.5 +- 0.7" in show(compare(find_runs(tmp_path)), encoding="ascii")


def test_nothing_to_compare() -> None:
    assert compare([]) == []
    assert "stage" in show([])
    assert to_json([]) == {"schema_version": 1, "rows": []}


def test_vanished_gradients_are_told(tmp_path: Path) -> None:
    stage = evaluate("k", 0.5, 0.9)
    stage["metrics"]["certify.zero_gradient"] = 0.25
    write_run(tmp_path / "a", {}, stage)
    text = show(compare(find_runs(tmp_path)))
    assert "certify: up to 0.25 images of a network gave no gradient" in text


@pytest.mark.parametrize(
    ("name", "words"), [("errors", "made the verifier fail"), ("timeouts", "ran out of time")]
)
def test_images_without_a_verdict_are_told(tmp_path: Path, name: str, words: str) -> None:
    stage = evaluate("k", 0.5, 0.9)
    stage["metrics"][f"verified.{name}"] = 3
    write_run(tmp_path / "a", {}, stage)
    text = show(compare(find_runs(tmp_path)))
    assert f"verified: up to 3 images of a network {words}" in text


def test_json_is_strict_and_complete(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    write_run(tmp_path / "x", {"prune.sparsity": 0.9, "seed": 2}, status="interrupted")
    told = json.loads(json.dumps(to_json(compare(find_runs(tmp_path))), allow_nan=False))
    assert told["schema_version"] == 1
    dense = told["rows"][0]
    assert dense["settings"] == {"prune.sparsity": None}
    assert dense["metrics"]["sparsity"] == {
        "mean": 0.0,
        "sd": 0.0,
        "seeds": 2,
        "low": None,
        "high": None,
        "images": None,
    }
    assert [row["status"] for row in told["rows"]] == ["done", "done", "interrupted", "done"]
    assert told["rows"][2]["runs"] == [str(tmp_path / "x")]


def test_csv_has_mean_deviation_and_number_of_seeds(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    write_run(tmp_path / "x", {"prune.sparsity": 0.9, "seed": 2}, status="failed", error='a "b"')
    lines = list(csv.DictReader(io.StringIO(to_csv(compare(find_runs(tmp_path))))))
    assert [line["prune.sparsity"] for line in lines] == ["", "0.9", "0.9", "0.99"]
    assert lines[0]["seeds"] == "0 1"
    assert float(lines[1]["clean.accuracy"]) == pytest.approx(0.72)
    assert float(lines[1]["clean.accuracy_sd"]) == pytest.approx(0.0282842712)
    assert lines[1]["clean.accuracy_seeds"] == "2"
    assert (lines[2]["status"], lines[2]["error"], lines[2]["clean.accuracy"]) == (
        "failed",
        'a "b"',
        "",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "was not written by prunekit"),
        ('{"format": 2}', "has format 2, and this prunekit reads 1"),
        ('{"format": 1, "name": "a"}', "lacks 'status'"),
        (
            '{"format": 1, "name": "a", "status": "done", "smoke": false, "seed": 0,'
            ' "settings": {}, "stages": 3}',
            "is damaged",
        ),
    ],
)
def test_a_broken_record_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        find_runs(tmp_path)
    assert "run.json " in str(caught.value)


def test_runs_are_found_everywhere_but_in_hidden_folders(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", {"a": 1})
    write_run(tmp_path / "runs" / "deep" / "er", {"a": 2})
    write_run(tmp_path / "runs" / ".moved" / "old", {"a": 3})
    found = find_runs(tmp_path / "runs")
    assert [run.folder for run in found] == [tmp_path / "runs", tmp_path / "runs" / "deep" / "er"]
    with pytest.raises(UserError, match="there is no folder"):
        find_runs(tmp_path / "none")


@pytest.mark.parametrize(
    ("metric", "main", "fraction"),
    [
        ("pgd.accuracy", True, True),
        ("pgd-0.031.accuracy", True, True),
        ("certify.certified@0.25", True, True),
        ("certify.certified@0.25_low", False, True),
        ("certify.acr", True, False),
        ("pgd.n", False, False),
        ("pgd.zero_gradient", False, False),
        ("verified.crown-ibp_verified", True, True),
        ("verified.errors", False, False),
        ("verified.timeouts", False, False),
        ("sparsity", True, True),
        ("accuracy-of-names.loss", True, False),
    ],
)
def test_what_a_metrics_name_says(metric: str, main: bool, fraction: bool) -> None:
    assert (is_main(metric), is_fraction(metric)) == (main, fraction)


def test_reading_results_imports_neither_torch_nor_rich() -> None:
    code = "import sys, prunekit.results; print([m for m in ('rich', 'torch') if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"
