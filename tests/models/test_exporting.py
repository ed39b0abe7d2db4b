"""What other programs read: HYDRA's checkpoints."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from prunekit_nets import NetOptions
from prunekit_nets.linear import lin_2
from prunekit_nets.vgg import build_vgg
from prunekit_nets.wide_resnet import wrn_28_1

from prunekit.cli.group import main
from prunekit.contexts import ArchitectureContext
from prunekit.models.exporting import find_sparsity
from prunekit.models.importing import count_imported, find_keep_ratio
from prunekit.pruning.layers import find_prunable
from prunekit.pruning.masks import apply_masks
from prunekit.pruning.selection import count_kept
from prunekit.store.tensors.checkpoint import read_checkpoint, read_masks, write_model
from prunekit.testing import example_context

pytestmark = pytest.mark.usefixtures("here")

CONTEXT = example_context(ArchitectureContext, shape=(1, 8, 8), classes=10)


def call(*arguments, code=0):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.stdout, done.stderr


def write(net, use, counts=None, extra=None):
    """m.safetensors with random masks, of which `counts(n)` weights of a layer are kept."""
    masks = {}
    for name, weight in find_prunable(net).items() if counts else ():
        if counts(weight.numel()) is None:  # left dense
            continue
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[torch.randperm(weight.numel())[: counts(weight.numel())]] = True
        masks[name] = mask.view_as(weight)
    masks |= extra or {}
    apply_masks(net, masks)
    write_model(Path("m.safetensors"), net, masks, {"architecture": {"use": use}})
    return masks


def read(folder):
    path = Path(folder) / "model.safetensors"
    state, header = read_checkpoint(path)
    return state, read_masks(state, header, path)


def make_net(build=lin_2):
    torch.manual_seed(0)
    return build(NetOptions(), CONTEXT)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.95, 0.99])
def test_export_and_import_change_nothing(sparsity):
    torch.manual_seed(0)
    net = build_vgg(2, NetOptions(), CONTEXT, batch_norm=True)
    with torch.no_grad():
        net.features[0].weight[0] = 0.0  # some of them are kept
    masks = write(net, "vgg2-bn", lambda n: count_kept(n, sparsity))
    told = call("export", "m.safetensors", "--format", "hydra", "--out", "h.pth.tar")[0]
    written = told.split("--sparsity ")[1].strip()
    assert float(written) == pytest.approx(sparsity, abs=1e-3)
    content = torch.load("h.pth.tar", weights_only=True)
    assert content["arch"] == "vgg2_bn"
    call("import", "hydra", "h.pth.tar", "--model", "vgg2-bn", "--dataset", "digits",
         "--sparsity", written)  # fmt: skip
    state, found = read("runs/h")
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], masks[name]) for name in masks)
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())
    call("export", "runs/h", "--format", "hydra", "--out", "again.pth.tar")
    again = torch.load("again.pth.tar", weights_only=True)["state_dict"]
    assert again.keys() == content["state_dict"].keys()
    assert all(torch.equal(again[name], content["state_dict"][name]) for name in again)


def test_wide_resnets_get_the_block_that_hydra_wants():
    net = make_net(wrn_28_1)
    write(net, "wrn-28-1", lambda n: count_kept(n, 0.9))
    call("export", "m.safetensors", "--format", "hydra", "--out", "h.pth")
    state = torch.load("h.pth", weights_only=True)["state_dict"]
    ours = [name for name in state if name.startswith("block1.")]
    assert [name for name in state if name.startswith("sub_")] == [f"sub_{n}" for n in ours]
    call("import", "hydra", "h.pth", "--model", "wrn-28-1", "--dataset", "digits",
         "--sparsity", 0.9)  # fmt: skip
    assert read("runs/h")[0].keys() == net.state_dict().keys()


def test_a_layer_that_was_left_dense_has_scores_as_well_or_the_file_is_refused():
    net = make_net()
    sizes = [weight.numel() for weight in find_prunable(net).values()]
    assert sizes == [6400, 1000]
    write(net, "lin-2", lambda n: n // 10 if n > 1000 else None)
    told = call("export", "m.safetensors", "--format", "hydra", "--out", "h.pth", code=2)[1]
    assert "keeps 0.1 and 2.weight 1 of its weights; " in told
    assert "exclude = []" in told
    assert not Path("h.pth").exists()
    # int(0.0005 * 1000) = 0: at this sparsity HYDRA keeps the small layer whole itself.
    masks = write(net, "lin-2", lambda n: n - 3 if n > 1000 else None)
    told = call("export", "m.safetensors", "--format", "hydra", "--out", "h.pth")[0]
    call("import", "hydra", "h.pth", "--model", "lin-2", "--dataset", "digits",
         "--sparsity", told.split("--sparsity ")[1].strip())  # fmt: skip
    state, found = read("runs/h")
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("sparsity", [0.07, 0.1, 0.3, 0.55, 0.7, 0.9, 0.95, 0.99, 0.123456])
def test_the_sparsity_found_gives_the_very_counts(sparsity):
    sizes = [10, 90, 576, 640, 2560, 36864, 65536, 2359296]
    counts = {str(n): (n, count_kept(n, sparsity)) for n in sizes}
    found = find_sparsity(counts)
    ratio = find_keep_ratio(found)
    assert [count_imported(n, ratio) for n in sizes] == [kept for _, kept in counts.values()]


def test_what_a_hydra_file_cannot_say_is_refused():
    def refuse():
        return call("export", "m.safetensors", "--format", "hydra", "--out", "h.pth", code=2)[1]

    write(make_net(), "lin-2")
    assert "has no masks" in refuse()
    write(make_net(), "lin-2", lambda n: n // (2 if n > 2000 else 4))
    assert 'prune with budget = "layer"' in refuse()
    write(make_net(), "lin-2", lambda n: n // 2,
          {name: p != 0 for name, p in make_net().named_parameters() if p.dim() == 1})  # fmt: skip
    assert "scores of layers only" in refuse()
    assert not Path("h.pth").exists()
    write(make_net(), "lin-2", lambda n: n // 2)
    Path("h.pth").write_text("mine")
    assert "exists already" in refuse()
    told = call("export", "m.safetensors", "--format", "hydra", "--out", "h.pth/f", code=2)[1]
    assert told.endswith("; choose another folder with --out\n")
    assert Path("h.pth").read_text() == "mine"
    missing = call("export", "runs/none", "--format", "hydra", "--out", "h.pth", code=2)[1]
    assert "there is no run folder or file runs/none" in missing
