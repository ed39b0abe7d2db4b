"""RigL as a package of somebody else: installed by entry point, killed, resumed, exact."""

import ast
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from prunekit.contracts import Clock
from prunekit.data.seeds import generator
from prunekit.pruning.budgets import count_kept
from prunekit.steps import Moment
from prunekit.store.checkpoint import read_checkpoint, read_masks
from prunekit.testing import check_component, find_components

PACKAGES = Path(__file__).parent.parent / "packages"

DATA = """
[dataset]
use = "digits"
fraction = 0.2
batch_size = 16
[architecture]
use = "small-cnn"
[threat]
eps = 0.05
[objective]
use = "trades"
steps = 2
"""

RIGL = f"""
{DATA}
[[stage]]
kind = "pretrain"
epochs = 8
sparsity = 0.8
budget = "erk"
rewire = {{ use = "rigl", every = 5 }}
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The package, found by its entry point."""
    site = tmp_path / "site"
    shutil.copytree(PACKAGES / "acme_rigl", site / "acme_rigl")
    info = site / "acme_rigl-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-rigl\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[prunekit]\nrigl = acme_rigl\n")
    monkeypatch.syspath_prepend(site)
    for name in [n for n in sys.modules if n.startswith("acme_")]:
        monkeypatch.delitem(sys.modules, name)
    return site


def test_it_is_short_and_imports_the_public_list_alone():
    """The length is that of what is beside the declaration."""
    (source,) = (f for f in (PACKAGES / "acme_rigl").glob("*.py") if f.stem != "__init__")
    assert len(source.read_text().splitlines()) <= 30
    for file in source.parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("prunekit"):
                assert node.module in ("prunekit", "prunekit.contracts", "prunekit.steps")


def test_it_keeps_the_contract(installed):
    for component in find_components("acme_rigl"):
        check_component(component, {"every": 3})


def test_rigl_drops_the_smallest_and_grows_by_gradient(installed):
    """3 of 6 kept, a third dropped: |w| = 1 goes; of 0, 5, 2 and its own 3 the gradient 5 grows."""
    from acme_rigl import RiglOptions
    from acme_rigl.rigl import Rigl

    rewirer = Rigl(RiglOptions(every=1, fraction=0.34), None)
    weight = torch.tensor([[9.0, -7.0, 1.0, 0.0, 0.0, 0.0]])
    mask = weight != 0
    gradient = torch.tensor([[8.0, 8.0, 3.0, 0.0, -5.0, 2.0]])
    moment = Moment(Clock(0, 9, 0, 1), 0.5, {"w": weight}, {"w": mask}, {"w": gradient}, (),
                    generator(0))  # fmt: skip
    values = rewirer(moment).values["w"]
    assert values.topk(3).indices.sort().values.tolist() == [[0, 1, 4]]


def run(site, folder):
    (folder / "r.toml").write_text(RIGL)
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "prunekit", "run", "r.toml", "--device", "cpu", "--out", "out"]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def find_progress(folder):
    return folder.glob(".stages/*/*/progress.safetensors")


@pytest.mark.slow
def test_a_kill_in_the_middle_changes_no_bit(installed, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    process = run(installed, killed)
    deadline = time.monotonic() + 120
    try:
        while not _is_in_the_middle(killed):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    for folder in (killed, whole):
        process = run(installed, folder)
        told = process.communicate(timeout=240)[0]
        assert process.returncode == 0, told
    models = [folder / "out/model.safetensors" for folder in (killed, whole)]
    assert models[0].read_bytes() == models[1].read_bytes()
    state, header = read_checkpoint(models[0])
    masks = read_masks(state, header, models[0])
    weights = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == count_kept(weights, 0.8)


def _is_in_the_middle(folder):
    for file in find_progress(folder):
        try:
            tensors, header = read_checkpoint(file)
        except Exception:
            continue
        if header["at"]["epoch"] >= 2 and any(name.endswith("_kept") for name in tensors):
            return True
    return False
