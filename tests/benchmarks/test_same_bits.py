"""The gate that numbers did not move: it sees every bit, and never agrees about nothing."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

FILE = Path(__file__).parents[2] / "benchmarks/same_bits.py"


@pytest.fixture(scope="module")
def gate():
    spec = importlib.util.spec_from_file_location("same_bits", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder, tensors, arrays, store=".stages/v2"):
    """A finished run with one stored stage."""
    (folder / "out/a").mkdir(parents=True)
    (folder / store / "key").mkdir(parents=True)
    stages = [{"name": "prune", "key": "key"}]
    (folder / "out/a/run.json").write_text(json.dumps({"status": "done", "stages": stages}))
    save_file(tensors, folder / "out/a/model.safetensors")
    save_file(tensors, folder / store / "key/model.safetensors")
    np.savez(folder / "out/a/records.npz", **arrays)
    return folder / "out"


WEIGHT = torch.tensor([1.0, float("nan")])
RIGHT = np.array([True, False])
SAME = ({"w": WEIGHT}, {"evaluate/pgd.correct": RIGHT})


@pytest.mark.parametrize("store", [".stages", ".stages/v2"])
def test_the_same_bits_wherever_stages_are_stored(gate, tmp_path, store):
    old = gate.collect(write(tmp_path / "old", *SAME))
    new = gate.collect(write(tmp_path / "new", *SAME, store=store))
    assert sorted(old) == [
        "a/end/model.safetensors: w",
        "a/end/records.npz: evaluate/pgd.correct",
        "a/prune/model.safetensors: w",
    ]
    assert list(gate.compare(old, new)) == []


@pytest.mark.parametrize(
    ("tensors", "arrays", "told"),
    [
        ({"w": -WEIGHT}, SAME[1], "a/end/model.safetensors: w: 2 of 8 bytes differ"),
        ({"w": WEIGHT.half()}, SAME[1], "a/end/model.safetensors: w: F32 (2,) -> F16 (2,)"),
        ({"w": WEIGHT[None]}, SAME[1], "a/end/model.safetensors: w: F32 (2,) -> F32 (1, 2)"),
        ({"w": WEIGHT, "v": WEIGHT.clone()}, SAME[1], "a/end/model.safetensors: v: only in new"),
        (SAME[0], {"evaluate/pgd.correct": ~RIGHT},
         "a/end/records.npz: evaluate/pgd.correct: 2 of 2 bytes differ"),
        (SAME[0], {}, "a/end/records.npz: evaluate/pgd.correct: only in old"),
    ],
)  # fmt: skip
def test_what_differs_is_named(gate, tmp_path, tensors, arrays, told):
    old = gate.collect(write(tmp_path / "old", *SAME))
    new = gate.collect(write(tmp_path / "new", tensors, arrays))
    assert told in list(gate.compare(old, new))


def test_a_run_that_failed_and_nothing_at_all_are_no_agreement(gate, tmp_path, monkeypatch):
    out = write(tmp_path / "old", *SAME)
    (out / "a/run.json").write_text('{"status": "failed", "error": "why", "stages": []}')
    with pytest.raises(SystemExit, match="failed: why"):
        gate.collect(out)
    monkeypatch.setattr(gate, "run_commit", lambda *told: tmp_path / "empty")
    monkeypatch.setattr(sys, "argv", ["same_bits", "a", "b", "--recipes", "quickstart.toml"])
    assert gate.main() == 1
