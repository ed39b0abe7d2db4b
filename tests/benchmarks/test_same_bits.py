"""What benchmarks/same_bits.py tells of two folders with results."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "benchmarks/same_bits.py"
WEIGHT = np.array([[1.0, np.nan], [-2.0, 0.0]], np.float32)
CORRECT = np.array([True, False, True])


@pytest.fixture(scope="module")
def same_bits():
    spec = importlib.util.spec_from_file_location("same_bits", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_tensors(path, tensors, metadata=""):
    """A safetensors file by hand, of types that NumPy has not as well."""
    header, body = {"__metadata__": {"prunekit": metadata}}, b""
    for name, (dtype, shape, bits) in tensors.items():
        offsets = [len(body), len(body) + len(bits)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += bits
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def write_results(root, weight=WEIGHT, key="a1", tensors=None, arrays=None, dtype="F32"):
    """A run with a pruned network and its evaluation; `out`, as `--out` names it."""
    out, store = root / "out", root / ".stages"
    stages = {"prune": key + "p", "pruned": key + "e"}
    for folder in (out / "score", *(store / k for k in stages.values())):
        folder.mkdir(parents=True)
    told = {"run": "score", "stages": [{"name": n, "key": k} for n, k in stages.items()]}
    (out / "score/run.json").write_text(json.dumps(told))
    content = {"w": (dtype, list(weight.shape), weight.tobytes()), **(tensors or {})}
    records = {"pgd.correct": CORRECT, **(arrays or {})}
    write_tensors(store / stages["prune"] / "model.safetensors", content, metadata=key)
    np.savez(store / stages["pruned"] / "records.npz", **records)
    # The run's own are the last stage's: here they stay, so that only the store's differ.
    write_tensors(out / "score/model.safetensors", {"w": ("F32", [1], bytes(4))})
    return out


def flip_bit(array):
    """The last bit of the first number."""
    bits = bytearray(array.tobytes())
    bits[0] ^= 1
    return np.frombuffer(bytes(bits), array.dtype).reshape(array.shape)


def test_same_bits_under_other_keys_and_headers(same_bits, tmp_path, capsys):
    bf16 = {"half": ("BF16", [2], bytes([192, 127, 128, 63]))}
    old = write_results(tmp_path / "old", tensors=bf16)
    new = write_results(tmp_path / "new", tensors=bf16, key="b2")
    assert same_bits.compare(old, new) == ("1 runs, 3 tensors, 1 arrays", [])
    assert same_bits.report("quickstart", old, new) == 0
    assert capsys.readouterr().out == "quickstart: 1 runs, 3 tensors, 1 arrays: same\n"


def test_order_in_the_file_is_no_difference(same_bits, tmp_path):
    more = {"v": ("I64", [1], bytes(8))}
    old, new = (write_results(tmp_path / n, tensors=more) for n in ("old", "new"))
    content = {**more, "w": ("F32", [2, 2], WEIGHT.tobytes())}
    write_tensors(tmp_path / "new/.stages/a1p/model.safetensors", content)
    assert same_bits.compare(old, new)[1] == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"weight": flip_bit(WEIGHT)}, "score/prune/w: max abs difference 1.19e-07"),
        ({"weight": WEIGHT * np.float32([[1], [-1]])}, "score/prune/w: max abs difference 4"),
        ({"weight": np.nan_to_num(WEIGHT)}, "score/prune/w: max abs difference nan"),
        ({"dtype": "I32"}, "score/prune/w: <f4 (2, 2) became I32 (2, 2)"),
        ({"weight": WEIGHT.reshape(4)}, "score/prune/w: <f4 (2, 2) became <f4 (4,)"),
        ({"tensors": {"v": ("F32", [1], bytes(4))}}, "score/prune/v: only in NEW"),
        ({"arrays": {"pgd.correct": ~CORRECT}}, "score/pruned/pgd.correct: max abs difference 1"),
        ({"arrays": {"clean.correct": CORRECT}}, "score/pruned/clean.correct: only in NEW"),
        (
            {"arrays": {"pgd.correct": CORRECT.astype("u1")}},
            "score/pruned/pgd.correct: |b1 (3,) became |u1 (3,)",
        ),
    ],
)
def test_difference_is_named(same_bits, tmp_path, capsys, change, told):
    old = write_results(tmp_path / "old")
    new = write_results(tmp_path / "new", **change)
    assert same_bits.compare(old, new)[1] == [told]
    assert same_bits.report("quickstart", old, new) == 1
    assert capsys.readouterr().out.endswith(f": 1 DIFFER\n  {told}\n")


def test_missing_tensor_and_bits_of_a_type_without_numbers(same_bits, tmp_path):
    halves = ({"half": ("BF16", [1], bytes([128, x]))} for x in (63, 64))
    first, second = (write_results(tmp_path / str(i), tensors=x) for i, x in enumerate(halves))
    assert same_bits.compare(first, second)[1] == ["score/prune/half: other bits"]
    without = write_results(tmp_path / "without")
    assert same_bits.compare(first, without)[1] == ["score/prune/half: only in OLD"]


def test_zero_and_minus_zero_are_different(same_bits, tmp_path):
    old = write_results(tmp_path / "old", weight=np.zeros(1, np.float32))
    new = write_results(tmp_path / "new", weight=-np.zeros(1, np.float32))
    assert same_bits.compare(old, new)[1] == ["score/prune/w: max abs difference 0"]


def test_nothing_to_compare_fails(same_bits, tmp_path, capsys):
    old, empty = write_results(tmp_path / "old"), tmp_path / "new/out"
    for pair in ((empty, empty), (old, empty), (empty, old)):
        assert same_bits.report("quickstart", *pair) == 2
        assert "FAILED: nothing to compare" in capsys.readouterr().out
    (tmp_path / "old/.stages/a1p/model.safetensors").unlink()
    assert same_bits.report("quickstart", old, old) == 2
    assert "no results of score/prune" in capsys.readouterr().out


def test_command_that_fails_is_told_with_the_end_of_its_errors(same_bits):
    code = "import os, sys; sys.exit('first\\nlast, ' + os.environ['OMP_NUM_THREADS'] + ' thread')"
    with pytest.raises(same_bits.Failure, match=r"(?s)ended with 1.*last, 1 thread"):
        same_bits.call(sys.executable, "-c", code)


def test_unknown_commit_is_wrong_usage(same_bits, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["same_bits", "no-such-commit", ".", "--cache", str(tmp_path)])
    assert same_bits.main() == 2
