"""Pre-activation wide ResNets, with the state-dict keys of the TRADES code."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

from prunekit.contexts import ArchitectureContext
from prunekit_nets import NetOptions
from prunekit_nets.initialization import initialize


class Block(nn.Module):
    """Two 3x3 convolutions, each after batch normalization and ReLU, and a shortcut.

    If the number of channels changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = (
            None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        active = self.relu1(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        out: Tensor = shortcut + self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return out


def _stack(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    layers = [Block(inputs, outputs, stride)]
    layers += [Block(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(OrderedDict(layer=nn.Sequential(*layers)))


def build_wide_resnet(
    depth: int, width: int, options: NetOptions, context: ArchitectureContext
) -> nn.Sequential:
    """WRN-depth-width without dropout, for images of any size (global average pooling before `fc`).

    Three stacks of (depth - 4) / 6 blocks with 16, 32 and 64 times `width` channels (Zagoruyko and
    Komodakis, BMVC 2016, table 1); state-dict keys `conv1`, `block1.layer.0.conv1`, ..., `bn1`,
    `fc`.
    """
    blocks = (depth - 4) // 6
    network = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(context.shape[0], 16, 3, padding=1, bias=False),
            block1=_stack(blocks, 16, 16 * width, stride=1),
            block2=_stack(blocks, 16 * width, 32 * width, stride=2),
            block3=_stack(blocks, 32 * width, 64 * width, stride=2),
            bn1=nn.BatchNorm2d(64 * width),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(64 * width, context.classes),
        )
    )
    initialize(network, options)
    return network


wrn_28_1 = partial(build_wide_resnet, 28, 1)
wrn_28_4 = partial(build_wide_resnet, 28, 4)
wrn_28_10 = partial(build_wide_resnet, 28, 10)
wrn_34_10 = partial(build_wide_resnet, 34, 10)
wrn_40_2 = partial(build_wide_resnet, 40, 2)
