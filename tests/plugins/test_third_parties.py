"""HARP as a package of somebody else: installed by entry point, killed, resumed, exact."""

import ast
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from prunekit.contracts import Clock, Scores
from prunekit.pruning.budgets import count_kept
from prunekit.pruning.selection import Selection
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

HARP = f"""
{DATA}
[[stage]]
kind = "pretrain"
epochs = 1
[[stage]]
kind = "prune"
sparsity = 0.8
pruner = {{ use = "harp", gamma = 1.0 }}
epochs = 8
[[stage]]
kind = "finetune"
epochs = 1
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The package, found by its entry point."""
    site = tmp_path / "site"
    for name in ("harp",):
        shutil.copytree(PACKAGES / f"acme_{name}", site / f"acme_{name}")
        info = site / f"acme_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[prunekit]\n{name} = acme_{name}\n")
    monkeypatch.syspath_prepend(site)
    for name in [n for n in sys.modules if n.startswith("acme_")]:
        monkeypatch.delitem(sys.modules, name)
    return site


@pytest.mark.parametrize(("name", "most"), [("harp", 60)])
def test_they_are_short_and_import_the_public_list_alone(name, most):
    """The length is that of what is beside the declaration."""
    (source,) = (f for f in (PACKAGES / f"acme_{name}").glob("*.py") if f.stem != "__init__")
    assert len(source.read_text().splitlines()) <= most
    for file in source.parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("prunekit"):
                assert node.module in ("prunekit", "prunekit.contracts", "prunekit.steps")


@pytest.mark.parametrize("package", ["acme_harp"])
def test_they_keep_the_contract(package, installed):
    for component in find_components(package):
        check_component(component)


def test_harps_rates_follow_their_formula(installed):
    """With g = dL/dw_eff * w, the rate's is sum(g) * (1 - floor) s (1 - s), s its sigmoid."""
    from acme_harp.harp import Harp, Rate

    net = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
    weight = net[0].weight.detach().clone()
    rates = {"0.weight": Rate(0.1, torch.tensor(0.5))}
    start = {"0.weight": weight.clone()}
    masking = Harp(net, Scores(start), Selection(0.5), {}, "train", None, rates=rates, gamma=2.0)
    clock, x = Clock(0, 9, 0, 3), torch.rand(3, 4)
    with masking.effective(clock):
        net(x).square().sum().backward()
    part = masking.parts["0.weight"]
    outer = 2 * x.T @ (x @ (weight * part.mask).T)
    expected = outer.T * weight
    sigma = rates["0.weight"].raw.detach().sigmoid()
    torch.testing.assert_close(
        rates["0.weight"].raw.grad, expected.sum() * 0.9 * sigma * (1 - sigma)
    )
    torch.testing.assert_close(part.score.grad, expected * weight.sign())
    assert int(part.mask.sum()) == 4  # 0.5 of 8
    # The budget is 4, the density 0.1 + 0.9 s; the factor grows with the epoch.
    density = rates["0.weight"]().item()
    later = Clock(6, 9, 2, 3)
    assert float(masking.penalty(later)["budget"]) == pytest.approx(3 * 2 * (2 * density - 1))


def run(site, folder, recipe):
    (folder / "r.toml").write_text(recipe)
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
@pytest.mark.parametrize(("recipe", "moving"), [(HARP, "rate.raw")], ids=["harp"])
def test_a_kill_in_the_middle_changes_no_bit(recipe, moving, installed, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    process = run(installed, killed, recipe)
    deadline = time.monotonic() + 120
    try:
        while not _is_in_the_middle(killed, moving):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    for folder in (killed, whole):
        process = run(installed, folder, recipe)
        told = process.communicate(timeout=240)[0]
        assert process.returncode == 0, told
    models = [folder / "out/model.safetensors" for folder in (killed, whole)]
    assert models[0].read_bytes() == models[1].read_bytes()
    state, header = read_checkpoint(models[0])
    masks = read_masks(state, header, models[0])
    weights = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == count_kept(weights, 0.8)


def _is_in_the_middle(folder, moving):
    for file in find_progress(folder):
        try:
            tensors, header = read_checkpoint(file)
        except Exception:
            continue
        if header["at"]["epoch"] >= 2 and any(name.endswith(moving) for name in tensors):
            return True
    return False
