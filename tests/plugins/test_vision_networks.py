"""torchvision's ResNets: its keys and sizes, normalised inside."""

from __future__ import annotations

import pytest
import torch
from prunekit_vision import prunekit_architectures
from torch import nn
from torchvision import models

from prunekit.component import NoOptions, Use
from prunekit.contracts import Context
from prunekit.errors import UserError
from prunekit.testing import check_component

COMPONENTS = {component.name: component for component in prunekit_architectures()}


def build(name: str, shape: tuple[int, int, int] = (3, 64, 64), classes: int = 1000) -> nn.Module:
    use: Use[nn.Module] = Use("architecture", COMPONENTS[name], NoOptions(), "vision")
    return use.build(Context(shape=shape, classes=classes))


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


def test_contract_and_grey_images() -> None:
    for component in COMPONENTS.values():
        check_component("architecture", component, shape=(3, 64, 64))
    with pytest.raises(UserError) as error:
        build("imagenet-resnet18", (1, 28, 28))
    assert str(error.value) == (
        "imagenet-resnet18 takes images with 3 channels, these are 1 x 28 x 28; choose another "
        'architecture, such as "cifar-resnet18"'
    )
