"""`prunekit results`, `curve` and `clean`: what is printed where."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

from rich.console import Console

from prunekit.cli.results import print_comparison
from prunekit.results.comparison import Row, compare
from prunekit.results.tables import tabulate, to_json
from prunekit.store.records import find_runs


def show(rows: list[Row], width: int = 80, encoding: str = "utf-8") -> str:
    written = io.BytesIO()
    file = io.TextIOWrapper(written, encoding=encoding, write_through=True)
    print_comparison(rows, Console(file=file, width=width))
    return written.getvalue().decode(encoding)


def test_runs_without_a_result_are_listed(tmp_path: Path, evaluate, write_run) -> None:
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
        ("", 0.99, "running or stopped", ""),
        ("", 0.99, "done", ""),
    ]
    text = show(rows)
    assert "b: failed: the loss is nan\n" in text
    assert "c: running or stopped\n" in text


def test_smoke_runs_are_marked_and_apart(tmp_path: Path, evaluate, write_run) -> None:
    write_run(tmp_path / "a", {"seed": 0}, evaluate("a", 0.7, 0.9))
    write_run(tmp_path / "b", {"seed": 1}, evaluate("b", 0.1, 0.9), smoke=True)
    rows = compare(find_runs(tmp_path))
    assert [(row.seeds, row.smoke) for row in rows] == [((0,), False), ((1,), True)]
    assert tabulate(rows)[2][-1] == "done, SMOKE"
    assert "numbers mean nothing" in show(rows)


def test_table_is_whole_when_it_goes_to_a_file(tmp_path: Path, write_sweep) -> None:
    write_sweep(tmp_path)
    text = show(compare(find_runs(tmp_path)), width=20)
    assert "…" not in text
    line = next(line for line in text.splitlines() if "0.99" in line)
    assert line.split("  ")[0].strip() == "evaluate"
    assert "60.5 ± 0.7" in line
    assert "15.1 ± 0.2" in line
    assert "60.5 +- 0.7" in show(compare(find_runs(tmp_path)), encoding="ascii")


def test_vanished_gradients_are_told(tmp_path: Path, evaluate, write_run) -> None:
    stage = evaluate("k", 0.5, 0.9)
    stage["metrics"]["certify.zero_gradient"]["value"] = 0.25
    write_run(tmp_path / "a", {}, stage)
    text = show(compare(find_runs(tmp_path)))
    assert "certify: up to 0.25 images of a network gave no gradient" in text


def test_stages_that_ended_early_are_told_once_for_all_runs(here, evaluate, write_run, call):
    reason = "validation.accuracy has not risen for 3 epochs"
    stage = {"name": "pretrain", "kind": "pretrain", "key": "p", "metrics": {"ended": reason}}
    for name in ("a", "b", "c"):
        write_run(here / "runs" / name, {"seed": 0}, stage, evaluate(name, 0.7, 0.9))
    out, _ = call("results", "runs")
    assert out.endswith(f"runs/a and 2 more: stage 'pretrain' ended early: {reason}\n")
    assert out.count("ended early") == 1


def test_results_in_three_forms(ran, call, read):
    out, err = call("results", "runs")
    assert "evaluate" in out
    assert err == ""
    (row,) = read("results", "runs")["rows"]
    accuracy = row["metrics"]["clean.accuracy"]["mean"]
    (line,) = csv.DictReader(io.StringIO(call("results", "runs", "--csv")[0]))
    assert float(line["clean.accuracy"]) == accuracy
    assert call("results", "runs", "--csv", "--json", code=2)[1].startswith("Usage:")


def test_results_of_nothing(here, call):
    (here / "empty").mkdir()
    for way in ([], ["--json"], ["--csv"], ["--layers"]):
        told = call("results", "empty", *way, code=2)
        assert told == ("", "prunekit: there are no runs in empty; name a folder that holds some\n")
    assert call("results", "gone", code=2)[1] == "prunekit: there is no folder gone\n"


def test_clean_frees_what_no_run_refers_to(ran, call):
    stages = {p.name for p in (ran / "runs/.stages/v3").iterdir()}
    assert len(stages) == 2
    assert call("clean")[0] == "0.0 MB freed (0 stages)\n"
    call("run", "r.toml", "--set", "seed=1", "--device", "cpu", "--out", "runs/second")
    shutil.rmtree(ran / "runs/second")
    out, _ = call("clean", "--dry-run")
    assert out.splitlines()[-1].endswith(" would be freed (2 stages)")
    assert len(list((ran / "runs/.stages/v3").iterdir())) == 4
    out, _ = call("clean")
    assert out.splitlines()[-1].endswith(" freed (2 stages)")
    assert {p.name for p in (ran / "runs/.stages/v3").iterdir()} == stages


def test_clean_of_nothing(here, call):
    assert call("clean", "gone", code=2)[1] == "prunekit: there is no folder gone\n"


def test_results_count_the_layers(ran, call):
    out, _ = call("results", "runs", "--layers")
    header, *rows = [line.split() for line in out.splitlines()]
    assert header == ["run", "layer", "kept", "weights", "sparsity"]
    told = json.loads((ran / "runs/tiny/run.json").read_text())["sparsity"]
    counts = {row[1]: [int(cell.replace(",", "")) for cell in row[2:4]] for row in rows}
    assert counts.pop("all") == [told["kept"], told["weights"]]
    assert counts == {n: [c["kept"], c["weights"]] for n, c in told["layers"].items()}
    _, err = call("results", "runs", "--layers", "--json", code=2)
    assert "exclude each other" in err


def test_nothing_to_compare() -> None:
    assert compare([]) == []
    assert "stage" in show([])
    assert to_json([]) == {"rows": []}
