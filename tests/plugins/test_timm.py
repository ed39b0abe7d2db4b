"""timm's families: from recipe to pruned network, resumed, exported; normalised inside."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from prunekit_timm import TimmOptions, prunekit_architectures
from prunekit_timm.models import adapt, build_timm
from safetensors.torch import load_file
from torch import nn

from prunekit.catalog.component import Use
from prunekit.catalog.registry import load_registry
from prunekit.contexts import ArchitectureContext
from prunekit.contracts import Clock, Scores
from prunekit.engine.engine import Engine
from prunekit.errors import Interrupted, OptionError, UserError
from prunekit.graph.groups import find_groups, follow
from prunekit.graph.leaking import LEAK
from prunekit.pruning.layers import find_prunable, find_unprunable
from prunekit.pruning.masks import apply_masks
from prunekit.pruning.selection import Selection, select_masks
from prunekit.pruning.structures import fits
from prunekit.recipe.describing import describe
from prunekit.recipe.plan import make_plan
from prunekit.recipe.toml.document import load_recipe
from prunekit.report import EpochDone, Note
from prunekit.store.stages import Store
from prunekit.testing import check_component, example_context
from prunekit.training.compute import open_compute
from prunekit.training.masking import LearnedScores

(COMPONENT,) = prunekit_architectures()
CONTEXT = example_context(ArchitectureContext, shape=(3, 32, 32), classes=3)

FAMILIES = {
    "resnet": ("test_resnet", {}),
    "convnext": ("test_convnext", {"drop_path_rate": 0.1}),
    "vit": ("test_vit", {"patch_size": 8, "depth": 2, "drop_path_rate": 0.1}),
    "efficientnet": ("test_efficientnet", {}),
    "mobilenet": ("mobilenetv3_small_050", {}),
}
DENSE = {
    "resnet": [],
    "convnext": ["stem.0", "head.fc", *(f"stages.{s}.blocks.{b}.conv_dw" for s, b in (
        (0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3), (3, 0), (3, 1)))],
    "vit": ["patch_embed.proj", "head"],
    "efficientnet": ["conv_stem", "blocks.3.0.conv_dw", "blocks.4.0.conv_dw"],
    "mobilenet": ["conv_stem", *(f"blocks.{s}.{b}.conv_dw" for s, b in (
        (0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (4, 0), (4, 1), (4, 2)))],
}  # fmt: skip
"""What is left dense: depthwise convolutions, the stem with them, patches and their classifier."""


def build(model, *, shape=(3, 32, 32), classes=3, fresh=True, seed=0, **options):
    torch.manual_seed(seed)
    context = example_context(ArchitectureContext, shape=shape, classes=classes, fresh=fresh)
    return build_timm(TimmOptions(model, **options), context)


def build_family(family, seed=0):
    model, kwargs = FAMILIES[family]
    return build(model, kwargs=kwargs, seed=seed)


def recipe(model, kwargs, extra=""):
    table = ", ".join(f"{k} = {v}" for k, v in kwargs.items())
    return f"""
[dataset]
use = "npz"
file = "images.npz"
batch_size = 8
validation = 0.34
[architecture]
use = "timm"
model = "{model}"
kwargs = {{ {table} }}
[objective]
use = "benign"
[[stage]]
kind = "pretrain"
epochs = 1
[[stage]]
kind = "prune"
sparsity = 0.5
epochs = 2
{extra}
[[stage]]
kind = "finetune"
epochs = 1
[[stage]]
kind = "evaluate"
with = ["clean"]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8), np.arange(24) % 3
    np.savez("images.npz", x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    return tmp_path


def test_every_family_is_covered():
    """By tests that train and prune; `show timm` and docs/models.md name them."""
    names = ("ResNet", "ConvNeXt", "ViT", "EfficientNet", "MobileNet")
    guide = Path(__file__).parents[2] / "docs" / "models.md"
    for text in (COMPONENT.details, guide.read_text()):
        assert all(name in text for name in names)
    assert [name.lower() for name in names] == list(FAMILIES)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * (f != "vit")) for f in FAMILIES]
)
def test_a_family_is_trained_pruned_and_resumed_to_the_same_bytes(family, here):
    """Learned scores; the process is stopped between the epochs of the prune stage."""
    Path("r.toml").write_text(recipe(*FAMILIES[family]))
    plan = make_plan(load_recipe(Path("r.toml")), load_registry())
    events, cpu = [], open_compute("cpu")
    # A smoke engine does not rehearse: the run itself is as short.
    (whole,) = Engine(Store(here / "a"), cpu, events.append, smoke=True).run(plan, here / "whole")
    assert whole.error == ""

    def report(event):
        if isinstance(event, EpochDone) and (event.stage, event.epoch) == ("prune", 1):
            stopped.stop.requested = True

    stopped = Engine(Store(here / "b"), cpu, report, smoke=True)
    with pytest.raises(Interrupted):
        stopped.run(plan, here / "out")
    again = Engine(Store(here / "b"), cpu, lambda event: None, smoke=True)
    (folder,) = again.run(plan, here / "out")
    model = "model.safetensors"
    assert (folder.path / model).read_bytes() == (whole.path / model).read_bytes()
    assert folder.metrics == whole.metrics

    state = load_file(folder.path / model)
    network = build_family(family)
    assert state.keys() == network.state_dict().keys()
    weights = find_prunable(network)
    dense = [f"{name}.weight" for name in DENSE[family]]
    assert sorted(network.leave_dense) == sorted(dense)
    assert set(dense) < set(weights) or not dense
    for name, weight in weights.items():
        zeros = int((state[name] == 0).sum())
        assert zeros == (0 if name in dense else weight.numel() // 2), name
    notes = " ".join(e.text for e in events if isinstance(e, Note))
    told = ": ".join(["exclude = [] prunes them too)", ", ".join(n for n in weights if n in dense)])
    assert (told in notes) is bool(dense)
    assert all(name in notes for name in find_unprunable(network))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("structure", ["channel", "2:4"])
def test_structures_give_the_network_that_was_learned(family, structure):
    """With what is removed set to zero, the network does what it did while scores were learned."""
    network, x = build_family(family), torch.rand(3, 3, 32, 32)
    network.train()
    for _ in range(2):  # statistics and gates as of a trained network
        network(x)
    for module in network.modules():  # scales that start at zero would hide everything
        if hasattr(module, "gamma") and isinstance(module.gamma, nn.Parameter):
            module.gamma.data.fill_(1)
    network.eval()
    weights = find_prunable(network, network.leave_dense)
    groups, dense = find_groups(network, x[:1], weights) if structure == "channel" else ([], {})
    names = [n for n, w in weights.items() if n not in dense and fits(w, structure)]
    assert len(names) > len(weights) // 3
    scores = Scores({name: torch.rand_like(weights[name]) for name in names})
    selection = Selection(0.5, structure=structure, groups=groups)
    masks = select_masks(scores, selection)
    masks |= follow(masks, groups)

    variables = LearnedScores(copy.deepcopy(network), scores, selection, {}, "freeze")
    with variables.effective(Clock(0, 10, 0, 2)), torch.no_grad():
        learned = variables.model.eval()(x)
    before = network(x).detach()
    apply_masks(network, masks)
    after = network(x).detach()
    torch.testing.assert_close(learned, after, rtol=1e-3, atol=1e3 * LEAK)
    assert not torch.allclose(before, after, atol=1e-2)


def test_what_a_structure_does_not_suit_is_named(call):
    Path("r.toml").write_text(
        recipe("test_efficientnet", {}, 'structure = "2:4"\nexclude = []').replace(
            "sparsity = 0.5\n", ""
        )
    )
    told = call("run", "r.toml", "--smoke", "--out", "out")[1]
    (line,) = (line for line in told.splitlines() if "leaves dense" in line)
    # One input channel, and three.
    assert "blocks.3.0.conv_dw.weight" in line
    assert "conv_stem.weight" in line
    assert "blocks.3.0.conv_pw.weight" not in line


# The network itself


def test_contract():
    check_component(COMPONENT, {"model": "test_vit"}, shape=(3, 32, 32))


def test_keys_are_timms_and_images_are_normalised_inside():
    network = build("test_efficientnet", classes=7)
    plain = timm.create_model("test_efficientnet", num_classes=7)
    plain.load_state_dict(network.state_dict())
    network.eval(), plain.eval()
    x = torch.rand(2, 3, 32, 32)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(network(x), plain((x - mean) / deviation))
        bare = build("test_efficientnet", classes=7, normalize=False).eval()
        bare.load_state_dict(network.state_dict())
        torch.testing.assert_close(bare(x), plain(x))
        # The constants follow the network, and a copy of it.
        twin = copy.deepcopy(network).double()
        assert twin(x.double()).dtype == torch.float64


def test_channels_and_sizes_follow_the_images():
    grey = build("test_vit", shape=(1, 48, 32), kwargs={"patch_size": 16})
    assert grey.patch_embed.proj.weight.shape[1] == 1
    assert grey(torch.rand(2, 1, 48, 32)).shape == (2, 3)
    assert grey.input_mean.shape == (1, 1, 1)
    assert adapt((0.2, 0.3, 0.4), 1) == pytest.approx([0.3])
    assert adapt((0.2, 0.3, 0.4), 5) == [0.2, 0.3, 0.4, 0.2, 0.3]


def test_weight_standardised_convolutions_are_not_prunable():
    network = build("test_nfnet")
    weights, others = find_prunable(network), find_unprunable(network)
    assert "head.fc.weight" in weights
    assert others["stem.conv1.weight"] == "ScaledStdConv2d"
    assert not weights.keys() & others.keys()


def test_position_tables_and_vectors_are_not_prunable():
    network = build("test_vit")
    assert find_unprunable(network) == {"pos_embed": "VisionTransformer"}
    assert all(name.endswith(".weight") for name in find_prunable(network))


# Mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "resnet19"}, "timm has no model 'resnet19'; did you mean .*'resnet18'"),
        (
            {"model": "resnet18.none"},
            "'resnet18.none' cannot be built: RuntimeError: Invalid pretrained tag",
        ),
        ({"model": "timm/resnet18"}, "hf-hub:timm/resnet18"),
        ({"model": "test_resnet", "kwargs": {"dept": 2}}, r"with kwargs \{'dept': 2\}: .*'dept'"),
        ({"model": "local-dir:/nowhere"}, r"there is no file .*config\.json"),
    ],
)
def test_what_cannot_be_built_is_told_in_a_line(options, words):
    with pytest.raises(UserError, match=words) as error:
        build(**options)
    assert "\n" not in str(error.value)


def test_options_that_cannot_be():
    with pytest.raises(OptionError, match="a local-dir has to be an absolute path, got 'mine'"):
        TimmOptions("local-dir:mine")
    with pytest.raises(OptionError, match="kwargs cannot hold num_classes: it comes from the data"):
        TimmOptions("resnet18", kwargs={"num_classes": 3})


def test_images_that_are_too_small(call):
    Path("r.toml").write_text(recipe("test_vit", {"patch_size": 12}))
    done = call("check", "--deep", "r.toml", code=2)[1]
    assert "32" in done
    assert "patch" in done


def test_check_deep_counts(call):
    Path("r.toml").write_text(recipe(*FAMILIES["vit"]))
    out = call("check", "--deep", "r.toml")[0]
    network = build_family("vit")
    total = sum(p.numel() for p in network.parameters())
    assert f"timm test_vit: {total:,} parameters" in out
    assert "left dense: patch_embed.proj.weight, head.weight" in out
    assert "never pruned: pos_embed (VisionTransformer)" in out
    (found,) = json.loads(call("check", "--deep", "r.toml", "--json")[0])["recipes"]
    assert found["networks"][0]["prunable"] == sum(
        w.numel() for w in find_prunable(network).values()
    )


def test_names_can_be_searched(call):
    out = call("list", "architectures", "--match", "test_conv*", "--json")[0]
    found = {c["name"]: c["summary"] for c in json.loads(out)["components"]}
    assert found["test_convnext"] == 'use = "timm", model = "test_convnext"'
    assert all(name.startswith("test_conv") for name in found)
    assert "timm " in call("list", "architectures", "--match", "timm")[0]


# Published weights


OFFLINE = """
import sys
from click.testing import CliRunner
from prunekit.cli.group import main
for name in sys.argv[1:]:
    done = CliRunner().invoke(main, ["run", f"{name}.toml", "--out", name])
    print(done.exit_code)
    sys.stderr.write(done.stderr)
"""


@pytest.mark.slow
def test_without_network_one_message_comes_before_any_training(here):
    for number, model in enumerate(("test_resnet", "hf-hub:timm/test_vit.r160_in1k")):
        text = recipe(model, {}).replace('use = "timm"', 'use = "timm"\npretrained = true')
        Path(f"{number}.toml").write_text(text)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(here / "hub")}
    done = subprocess.run([sys.executable, "-c", OFFLINE, "0", "1"], capture_output=True, text=True,
                          env=environment)  # fmt: skip
    assert done.stdout.split() == ["1", "1"], done.stderr
    assert "epoch" not in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("prunekit:")]
    assert len(told) == 2
    for line in told:
        assert line.startswith("prunekit: the run failed: the files of timm's")
        assert "cannot be fetched (LocalEntryNotFoundError); go online once, or write" in line


def test_a_local_folder_gives_its_weights(tmp_path):
    """Written by timm; with other classes its classifier starts anew."""
    torch.manual_seed(3)
    theirs = timm.create_model("test_vit", num_classes=5, img_size=32, patch_size=8)
    timm.models.save_for_hf(theirs, str(tmp_path / "saved"), safe_serialization=True)
    model = f"local-dir:{tmp_path / 'saved'}"
    state = theirs.state_dict()
    same = build(model, classes=5, pretrained=True).state_dict()
    assert all(torch.equal(state[name], value) for name, value in same.items())
    other = build(model, classes=3, pretrained=True).state_dict()
    assert other["head.weight"].shape == (3, 64)
    assert all(torch.equal(state[n], v) for n, v in other.items() if not n.startswith("head."))
    fresh = build(model, classes=5).state_dict()
    assert not torch.equal(fresh["patch_embed.proj.weight"], state["patch_embed.proj.weight"])
    # What others are loaded over is not read.
    (tmp_path / "saved/model.safetensors").unlink()
    assert build(model, classes=5, pretrained=True, fresh=False)
    with pytest.raises(UserError, match="No suitable checkpoints found"):
        build(model, classes=5, pretrained=True)


def test_content_of_a_local_folder_is_an_input(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (folder / name).write_text("x")
    options = TimmOptions(f"local-dir:{folder}")
    assert COMPONENT.files(options) == [folder / "config.json", folder / "model.safetensors"]
    assert COMPONENT.files(TimmOptions("resnet18")) == []
    use = Use(COMPONENT, options)
    assert describe(use)["model"] == f"local-dir:{folder}"


# Export


@pytest.mark.parametrize(
    "options", [*FAMILIES.values(), ("test_resnet", {"normalize": False})], ids=str
)
def test_export_is_what_timm_reads(call, options, here):
    model, kwargs = options
    text = recipe(model, {k: v for k, v in kwargs.items() if k != "normalize"})
    if "normalize" in kwargs:
        text = text.replace('use = "timm"', 'use = "timm"\nnormalize = false')
    short = text.replace("epochs = 2", 'pruner = "lwm"')
    Path("r.toml").write_text(short)
    plan = make_plan(load_recipe(Path("r.toml")), load_registry())
    (run,) = Engine(Store(here / "s"), open_compute("cpu"), lambda e: None, smoke=True).run(
        plan, here / "out"
    )
    call("export", "out", "--format", "timm", "--out", "theirs/net")
    told = json.loads(Path("theirs/net/config.json").read_text())
    assert "sparsity 0.5" in told["pretrained_cfg"]["description"]

    theirs = timm.create_model(f"local-dir:{here / 'theirs/net'}", pretrained=True).eval()
    from prunekit.api import load

    ours = load(run.path).model
    x = torch.rand(4, 3, 32, 32)
    mean, deviation = (
        torch.tensor(theirs.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std")
    )
    with torch.no_grad():
        assert torch.equal(theirs((x - mean) / deviation), ours(x))
        # And back.
        again = build(f"local-dir:{here / 'theirs/net'}", pretrained=True).eval()
        assert torch.equal(again(x), ours(x))
    assert "exists already" in call(
        "export", "out", "--format", "timm", "--out", "theirs/net", code=2
    )[1]  # fmt: skip


def test_a_format_that_an_architecture_has_not(call, here):
    Path("r.toml").write_text(recipe("test_resnet", {}).replace("epochs = 2", 'pruner = "lwm"'))
    call("run", "r.toml", "--smoke", "--out", "out")
    told = call("export", "out", "--format", "onnx", "--out", "x", code=2)[1]
    assert told == "prunekit: architecture 'timm' has no format 'onnx'; there are: hydra, timm\n"
