"""A checkpoint brings a training back to the same bits, whatever ended it."""

import subprocess
import sys
import time

import pytest

from prunekit.store.tensors.checkpoint import read_checkpoint

RECIPE = """
[dataset]
use = "digits"
fraction = 0.15
batch_size = 16
[architecture]
use = "small-cnn"
[objective]
use = "benign"
[[stage]]
kind = "pretrain"
epochs = 25
optimizer = {use = "adam", lr = 1e-3}
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE)
    command = [sys.executable, "-m", "prunekit", "run", str(tmp_path / "r.toml"), "--device", "cpu"]

    def run(name):
        return subprocess.run(
            [*command, "--out", str(tmp_path / name / "out")], capture_output=True, check=True
        )

    def progress(name):
        return next(tmp_path.glob(f"{name}/.stages/*/*/progress.safetensors"), None)

    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "killed" / "out")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while progress("killed") is None and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    found = progress("killed")
    assert found is not None, "killed too late"
    assert 0 < read_checkpoint(found)[1]["at"]["epoch"] < 25
    run("killed")
    run("whole")
    killed, whole = (tmp_path / name / "out" / "model.safetensors" for name in ("killed", "whole"))
    assert killed.read_bytes() == whole.read_bytes()
    assert progress("killed") is None
