"""ResNets for small images, with the state-dict keys of common CIFAR ResNets and of HYDRA's.

The first convolution is 3x3 with stride 1, and no pooling follows it (He et al., CVPR 2016).
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

from prunekit.contexts import ArchitectureContext
from prunekit_nets import NetOptions
from prunekit_nets.initialization import initialize

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Depth -> numbers of blocks in the four stages, which have 64, 128, 256 and 512 channels."""
BOTTLENECKS = (50, 101, 152)
"""Depths whose blocks are bottlenecks."""


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """The identity if the shape stays the same, otherwise a 1x1 convolution."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
    )


class Basic(nn.Module):
    """The basic block: two 3x3 convolutions and a shortcut."""

    widening = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) to (B, width, H / stride, W / stride)."""
        inner = self.relu1(self.bn1(self.conv1(x)))
        out: Tensor = self.relu2(self.bn2(self.conv2(inner)) + self.shortcut(x))
        return out


class Bottleneck(nn.Module):
    """The bottleneck block: 1x1, 3x3 and 1x1 convolutions and a shortcut.

    The last convolution has four times as many channels as the others.
    """

    widening = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.widening * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) to (B, 4 * width, H / stride, W / stride)."""
        inner = self.relu1(self.bn1(self.conv1(x)))
        inner = self.relu2(self.bn2(self.conv2(inner)))
        out: Tensor = self.relu3(self.bn3(self.conv3(inner)) + self.shortcut(x))
        return out


def build_resnet(depth: int, options: NetOptions, context: ArchitectureContext) -> nn.Sequential:
    """The ResNet of this depth, for images of any size (global average pooling before `linear`).

    State-dict keys `conv1`, `bn1`, `layer1.0.conv1`, `layer2.0.shortcut.0`, ..., `linear`.
    """
    block = Bottleneck if depth in BOTTLENECKS else Basic
    stages: list[nn.Module] = []
    inputs = 64
    for position, count in enumerate(BLOCKS[depth]):
        width = 64 * 2**position
        blocks: list[nn.Module] = []
        for number in range(count):
            stride = 2 if position > 0 and number == 0 else 1
            blocks.append(block(inputs, width, stride))
            inputs = block.widening * width
        stages.append(nn.Sequential(*blocks))
    network = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(context.shape[0], 64, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(64),
            relu=nn.ReLU(),
            layer1=stages[0],
            layer2=stages[1],
            layer3=stages[2],
            layer4=stages[3],
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(inputs, context.classes),
        )
    )
    initialize(network, options)
    return network


cifar_resnet18 = partial(build_resnet, 18)
cifar_resnet34 = partial(build_resnet, 34)
cifar_resnet50 = partial(build_resnet, 50)
cifar_resnet101 = partial(build_resnet, 101)
cifar_resnet152 = partial(build_resnet, 152)
