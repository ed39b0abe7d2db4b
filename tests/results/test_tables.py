"""The comparison of runs as text, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from prunekit.contracts import Metric
from prunekit.results.comparison import Row, Value, compare
from prunekit.results.tables import split, tabulate, to_csv, to_json
from prunekit.store.records import find_runs


def test_table_text(tmp_path: Path, write_sweep) -> None:
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
    row = Row(
        "evaluate",
        "done",
        False,
        settings,
        (0,),
        {"sparsity": Value(Metric(0.9, unit="sparsity"))},
        (Path("a"),),
    )
    assert tabulate([row])[0] == [
        "stage",
        "pruner",
        "prune\nepochs",
        "finetune\nepochs",
        "sparsity %",
    ]


def test_json_is_strict_and_complete(tmp_path: Path, write_run, write_sweep) -> None:
    write_sweep(tmp_path)
    write_run(tmp_path / "x", {"prune.sparsity": 0.9, "seed": 2}, status="interrupted")
    told = json.loads(json.dumps(to_json(compare(find_runs(tmp_path))), allow_nan=False))
    dense = told["rows"][0]
    assert dense["settings"] == {"prune.sparsity": None}
    assert dense["metrics"]["sparsity"] == {
        "mean": 0.0,
        "sd": 0.0,
        "seeds": 2,
        "low": None,
        "high": None,
        "images": None,
        "unit": "sparsity",
        "kind": "result",
    }
    assert [row["status"] for row in told["rows"]] == ["done", "done", "interrupted", "done"]
    assert told["rows"][2]["runs"] == [str(tmp_path / "x")]


def test_csv_has_mean_deviation_and_number_of_seeds(tmp_path: Path, write_run, write_sweep) -> None:
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


def test_reading_results_imports_neither_torch_nor_rich() -> None:
    code = (
        "import sys\n"
        "from prunekit.results import choosing, comparison, tables\n"
        "print([m for m in ('rich', 'torch') if m in sys.modules])\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


@pytest.mark.parametrize("name", ["score", "n" * 60, "n" * 100])
@pytest.mark.parametrize("metrics", [1, 20])
@pytest.mark.parametrize("width", [40, 80])
def test_blocks_keep_the_width_and_leave_nothing_out(name: str, metrics: int, width: int) -> None:
    titles = ["stage", "pruner", *(f"pgd-strong-{n}\naccuracy %" for n in range(metrics))]
    cells = [titles, *([f"s{row}", name, *("80.0 ± 0.1",) * metrics] for row in (1, 2))]
    blocks = split(cells, 2, width)
    for block in blocks:
        assert len(block) == 3
        wide = [
            max(len(line) for cell in c for line in cell.split("\n"))
            for c in zip(*block, strict=True)
        ]
        # What is wider than the terminal is alone beside the number of its row.
        assert sum(wide) + 2 * len(wide) <= width or block[0] == ["row", "pruner"]
    shown = [title for block in blocks for title in block[0]]
    assert set(shown) - {"row"} == set(titles)
    labels = {tuple(block[1][:2]) if block[0][0] == "stage" else block[1][0] for block in blocks}
    assert labels in ({("s1", name)}, {"1"})


def test_settings_are_shown_as_people_write_them() -> None:
    settings = {"threat.eps": 8 / 255, "architecture.init": str(Path.cwd() / "w.safetensors")}
    row = Row("pruned", "done", False, settings, (0,), {}, (Path("a"),))
    assert tabulate([row])[1][1:] == ["8/255", "w.safetensors"]
    assert f",{8 / 255}," in to_csv([row])


@pytest.mark.parametrize("formula", ["=1+1", "\uff1d1+1", " @x", "\uff0dx"])
def test_no_cell_of_csv_is_a_formula(formula) -> None:
    row = Row("pruned", "done", False, {"name": formula}, (0,), {}, (Path("a"),))
    assert f",'{formula}\n" in to_csv([row])
