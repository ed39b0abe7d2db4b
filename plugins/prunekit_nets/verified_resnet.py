"""The residual network of verified training (Wong et al., NeurIPS 2018).

It has no normalization layers, so that bounds stay tight.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from prunekit.contexts import ArchitectureContext
from prunekit_nets import NetOptions
from prunekit_nets.initialization import initialize
from prunekit_nets.inputs import require_size

BLOCKS = (6, 5, 5)
"""Numbers of blocks with 16, 32 and 64 channels: HYDRA's network with N = 5 and factor = 1."""


class Join(nn.Module):
    """The second half of a block: a convolution, plus a shortcut from the block's input."""

    def __init__(self, shortcut: nn.Conv2d, convolution: nn.Conv2d) -> None:
        super().__init__()
        # The original code has these keys, the positions of the two inputs in its list of results.
        self.Ws = nn.ModuleDict({"0": shortcut, "2": convolution})

    def forward(self, before: Tensor, x: Tensor) -> Tensor:
        """The shortcut applied to `before` plus the convolution applied to x; (B, C, H, W)."""
        out: Tensor = self.Ws["0"](before) + self.Ws["2"](x)
        return out


class Residual(nn.Sequential):
    """A sequence of layers in which a `Join` also receives the input of its block."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] to logits (B, K)."""
        results = [x]
        for layer in self:
            inputs = (results[-3], results[-1]) if isinstance(layer, Join) else results[-1:]
            results = [*results[-2:], layer(*inputs)]
        return results[-1]


def _block(inputs: int, outputs: int, *, halve: bool) -> list[nn.Module]:
    if halve:
        first = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)
        shortcut = nn.Conv2d(inputs, outputs, 2, stride=2)
    else:
        first = nn.Conv2d(inputs, outputs, 3, padding=1)
        shortcut = nn.Conv2d(inputs, outputs, 1)
    return [
        nn.Sequential(OrderedDict(Ws=nn.Sequential(first))),
        nn.ReLU(),
        Join(shortcut, nn.Conv2d(outputs, outputs, 3, padding=1)),
        nn.ReLU(),
    ]


def cifar_resnet_verified(options: NetOptions, context: ArchitectureContext) -> Residual:
    """A convolution, 16 residual blocks, and linear layers with 1000 and K outputs.

    Every layer has a bias; every shortcut is a convolution. State-dict keys `0`, `2.Ws.0`,
    `4.Ws.0`, `4.Ws.2`, ... Raises `UserError` for images below 4x4 pixels.
    """
    require_size("cifar-resnet-verified", context, 4)
    channels, height, width = context.shape
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU()]
    inputs = 16
    for position, count in enumerate(BLOCKS):
        outputs = 16 * 2**position
        for number in range(count):
            layers += _block(inputs, outputs, halve=position > 0 and number == 0)
            inputs = outputs
    layers += [
        nn.Flatten(),
        nn.Linear(inputs * (height // 4) * (width // 4), 1000),
        nn.ReLU(),
        nn.Linear(1000, context.classes),
    ]
    network = Residual(*layers)
    initialize(network, options)
    return network
