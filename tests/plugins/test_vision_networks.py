"""torchvision's networks: its keys and sizes, normalised inside."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from prunekit_vision import ModelOptions, prunekit_architectures
from prunekit_vision.models import build_model, list_names, load_published
from prunekit_vision.resnet import DEVIATION, MEAN
from torch import nn
from torchvision import models

from prunekit.catalog.component import NoOptions, Use
from prunekit.contexts import ArchitectureContext
from prunekit.contracts import Clock, Scores
from prunekit.errors import OptionError, UserError
from prunekit.pruning.layers import find_prunable, find_unprunable
from prunekit.pruning.masks import apply_masks
from prunekit.pruning.selection import Selection, select_masks
from prunekit.testing import check_component, example_context
from prunekit.training.masking import LearnedScores

CLOCK = Clock(0, 10, 0, 2)

COMPONENTS = {c.name: c for c in prunekit_architectures() if c.name.startswith("imagenet-")}


def build(name: str, shape: tuple[int, int, int] = (3, 64, 64), classes: int = 1000) -> nn.Module:
    use: Use[nn.Module] = Use(COMPONENTS[name], NoOptions(), "vision")
    return use.build(example_context(ArchitectureContext, shape=shape, classes=classes))


@pytest.mark.parametrize(
    ("name", "parameters"),
    # The published 11.7, 21.8 and 25.6 millions.
    [
        ("imagenet-resnet18", 11_689_512),
        ("imagenet-resnet34", 21_797_672),
        ("imagenet-resnet50", 25_557_032),
    ],
)
def test_parameters_and_keys_are_torchvisions(name: str, parameters: int) -> None:
    with torch.device("meta"):
        network = build(name)
        original = getattr(models, name.removeprefix("imagenet-"))()
    assert sum(p.numel() for p in network.parameters()) == parameters
    state = original.state_dict()
    assert list(network.state_dict()) == list(state)
    assert all(state[key].shape == value.shape for key, value in network.state_dict().items())


def test_images_are_normalised_inside() -> None:
    torch.manual_seed(0)
    network, original = build("imagenet-resnet18", classes=7), models.resnet18(num_classes=7)
    original.load_state_dict(network.state_dict())
    network.eval(), original.eval()
    x = torch.rand(2, 3, 64, 64)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(network(x), original((x - mean) / deviation))
    # The constants go where the network goes.
    assert network.double()(x.double()).dtype == torch.float64


@pytest.mark.slow
def test_contract_and_grey_images() -> None:
    for component in COMPONENTS.values():
        check_component(component, shape=(3, 64, 64))
    with pytest.raises(UserError) as error:
        build("imagenet-resnet18", (1, 28, 28))
    assert str(error.value) == (
        "imagenet-resnet18 needs images with 3 channels, but these are 1 x 28 x 28; choose another "
        'architecture, such as "cifar-resnet18"'
    )


# Any model of torchvision's


def build_any(
    model: str, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10, **options: Any
) -> Any:
    torch.manual_seed(0)
    fresh = options.pop("fresh", True)
    context = example_context(ArchitectureContext, shape=shape, classes=classes, fresh=fresh)
    return build_model(ModelOptions(model, **options), context)


def test_any_model_has_its_keys_and_is_normalised_inside() -> None:
    network = build_any("mobilenet_v3_small", classes=7).eval()
    original = models.mobilenet_v3_small(num_classes=7).eval()
    original.load_state_dict(network.state_dict())
    x = torch.rand(2, 3, 32, 32)
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
    with torch.no_grad():
        torch.testing.assert_close(network(x), original((x - mean) / deviation))
    bare = build_any("mobilenet_v3_small", classes=7, normalize=False).eval()
    bare.load_state_dict(network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(bare(x), original(x))
    # Depthwise convolutions and the first.
    assert len(network.leave_dense) == 12
    assert network.leave_dense[0] == "features.0.0.weight"


def test_a_transformer_is_built_for_the_size() -> None:
    with torch.device("meta"):
        network = build_any("vit_b_16", (3, 64, 64))
    assert network.image_size == 64
    assert network.leave_dense == ("conv_proj.weight", "heads.head.weight")
    assert find_unprunable(network) == {"encoder.pos_embedding": "Encoder"}


@pytest.mark.parametrize("training", [True, False])
def test_packed_attention_of_a_transformer_is_pruned(training: bool) -> None:
    """Learned and masked networks agree, in eval mode too, where torch has a path of its own."""
    torch.manual_seed(0)
    network = models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)
    nn.init.normal_(network.heads.head.weight)  # torchvision's starts at zero
    weights = find_prunable(network)
    packed = [name for name in weights if name.endswith("in_proj_weight")]
    assert len(packed) == 2
    scores = Scores({name: torch.rand_like(weight) for name, weight in weights.items()})
    masks = select_masks(scores, Selection(0.5))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        dense = network.train(training)(x)
        variables = LearnedScores(network, scores, Selection(0.5), {}, "train")
        with variables.effective(CLOCK):
            learned = network.train(training)(x)
        variables.detach()
        torch.testing.assert_close(network.train(training)(x), dense)
        apply_masks(network, masks)
        torch.testing.assert_close(network.train(training)(x), learned)
        assert not torch.allclose(dense, learned, atol=1e-2)


class Published:
    """Weights as torchvision has them, for 1000 classes, without a network."""

    name = "IMAGENET1K_V1"
    meta: ClassVar[dict[str, Any]] = {"categories": list(range(1000))}

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def get_state_dict(self, **options: Any) -> dict[str, torch.Tensor]:
        assert options["weights_only"]
        assert options["check_hash"]
        return dict(self.state)


@pytest.mark.parametrize("classes", [7, 1000])
def test_published_weights_are_loaded_and_the_classifier_replaced(classes: int) -> None:
    theirs = models.densenet121().state_dict()
    # The files have older keys, and no counters.
    files = {re.sub(r"(denselayer\d+\.(norm|conv))([12])\.", r"\1.\3.", k): v
             for k, v in theirs.items() if not k.endswith("num_batches_tracked")}  # fmt: skip
    assert not files.keys() >= theirs.keys()
    network = models.densenet121(num_classes=classes)
    own = {name: value.clone() for name, value in network.state_dict().items()}
    load_published(network, cast(Any, Published(files)), "densenet121", classes)
    for name, value in network.state_dict().items():
        kept = classes != 1000 and name.startswith("classifier")
        assert torch.equal(value, own[name] if kept else theirs[name]), name


def test_published_weights_that_do_not_fit() -> None:
    theirs = Published({"fc.weight": torch.zeros(1000, 3), "odd": torch.zeros(1)})
    with pytest.raises(UserError, match=r"weights IMAGENET1K_V1 of .* do not fit .*: bias, fc"):
        load_published(nn.Linear(3, 7), cast(Any, theirs), "linear", 7)


def test_without_network_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UserError) as error:
        build_any("resnet18", weights="DEFAULT")
    assert str(error.value) == (
        "the weights IMAGENET1K_V1 of torchvision's 'resnet18' are not in the cache and cannot be "
        'fetched (URLError); go online once, or leave out weights, or write init = "FILE" with a '
        "file of these weights"
    )
    # What others are loaded over is not fetched.
    assert build_any("resnet18", weights="DEFAULT", fresh=False)


def refuse(*arguments: Any, **options: Any) -> None:
    raise urllib.error.URLError("no network")


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("resnet19", {}, "torchvision has no classifier 'resnet19'; did you mean 'resnet1"),
        ("fcn_resnet50", {}, "no classifier 'fcn_resnet50'"),
        ("resnet18", {"weights": "V7"}, "no weights 'V7'; there are: IMAGENET1K_V1, DEFAULT"),
        ("resnet18", {"kwargs": {"depth": 3}}, r"with kwargs {'depth': 3}: .*'depth'"),
        ("resnet18", {"shape": (1, 28, 28)}, "but these are 1 x 28 x 28; write use = .timm"),
        ("googlenet", {"kwargs": {"init_weights": False}}, "kwargs = { aux_logits = false }"),
    ],
)
def test_mistakes(model: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        build_any(model, **options)
    assert "\n" not in str(error.value)


def test_options_that_cannot_be() -> None:
    with pytest.raises(OptionError, match="kwargs cannot hold weights: write it outside kwargs"):
        ModelOptions("resnet18", kwargs={"weights": "DEFAULT"})


def test_names_are_those_of_classifiers() -> None:
    names = list_names()
    assert {"resnet18", "vit_b_16", "convnext_tiny"} <= set(names)
    assert not [name for name in names if "rcnn" in name or "fcn" in name]
