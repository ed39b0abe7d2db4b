"""torchvision's ResNets, which take pixels in [0, 1] and normalise them themselves."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from prunekit.component import NoOptions
from prunekit.contracts import Context
from prunekit.errors import UserError

# Of the pixels of ImageNet's training images; every published ImageNet network has these.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class NormalizingResNet(ResNet):
    """torchvision's network behind (x - mean) / deviation; its state-dict keys are unchanged."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, depth: int, classes: int) -> None:
        block = Bottleneck if depth >= 50 else BasicBlock
        super().__init__(block, list(BLOCKS[depth]), num_classes=classes)
        # They follow the network to its device, but stay out of its state dict.
        self.register_buffer("mean", torch.tensor(MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer(
            "deviation", torch.tensor(DEVIATION).reshape(3, 1, 1), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - self.mean) / self.deviation)


def build_resnet(depth: int, options: NoOptions, context: Context) -> NormalizingResNet:
    """The ResNet of this depth, with torchvision's start (normal, variance 2 / fan_out).

    Raises `UserError` where images have not three colours.
    """
    channels, height, width = context.shape
    if channels != 3:
        raise UserError(
            f"imagenet-resnet{depth} takes images with 3 channels, these are {channels} x {height} "
            f'x {width}; choose another architecture, such as "cifar-resnet{depth}"'
        )
    return NormalizingResNet(depth, context.classes)


imagenet_resnet18 = partial(build_resnet, 18)
imagenet_resnet34 = partial(build_resnet, 34)
imagenet_resnet50 = partial(build_resnet, 50)
