"""Normalisation inside, and which weights are better left dense."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from prunekit.errors import RunError
from prunekit.models.building import find_fragile, normalize_inputs
from prunekit.pruning.layers import find_prunable


def conv(inputs, outputs, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, **options)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_normalized_by_hand():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 1, bias=False))
    net[1].weight.data = torch.tensor([[1.0, 10.0]])
    keys = list(net.state_dict())
    assert normalize_inputs(net, [0.5, 0.25], [0.5, 0.25]) is net
    x = torch.tensor([1.0, 0.5]).view(1, 2, 1, 1)
    assert net(x).item() == 11.0  # (1 - 0.5) / 0.5 + 10 (0.5 - 0.25) / 0.25
    assert list(net.state_dict()) == keys
    # Wherever the network goes, and however it is called.
    assert copy.deepcopy(net).double()(x.double()).item() == 11.0
    assert functional_call(net, dict(net.named_parameters()), (x,)).item() == 11.0
    net.load_state_dict(net.state_dict())
    assert torch.jit.trace(net, x)(x).item() == 11.0


@pytest.mark.parametrize(
    ("layers", "fragile"),
    [
        # Plain convolutions: none, grouped ones neither.
        ([conv(3, 4), conv(4, 4, groups=2), nn.Linear(4, 2)], []),
        # Depthwise ones, and the first.
        ([conv(3, 4), conv(4, 4, groups=4), conv(4, 8, 1), nn.Linear(8, 2)], ["0", "1"]),
        # Patches, and the classifier.
        ([conv(3, 4, 2, stride=2), nn.Linear(4, 4), nn.Linear(4, 2)], ["0", "2"]),
        # A pointwise convolution cuts no patches.
        ([conv(3, 4, 1), nn.Linear(4, 2)], []),
        # One grey channel in one group is not depthwise.
        ([conv(1, 4), nn.Linear(4, 2)], []),
        ([nn.Linear(4, 2)], []),
    ],
)
def test_fragile_weights(layers, fragile):
    net = nn.Sequential(*layers)
    assert find_fragile(net) == tuple(f"{name}.weight" for name in fragile)


def test_named_classifiers_and_what_cannot_be_pruned():
    net = nn.Sequential(conv(3, 4, 2, stride=2), nn.Linear(4, 2), nn.Linear(4, 2))
    assert find_fragile(net, ["1", "2"]) == ("0.weight", "1.weight", "2.weight")
    nn.utils.parametrizations.weight_norm(net[0])
    assert find_fragile(net) == ("2.weight",)
    with pytest.raises(RunError, match="matches no prunable weight"):
        find_prunable(net, ["0.weight"])
