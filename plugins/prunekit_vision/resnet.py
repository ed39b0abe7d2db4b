"""torchvision's ResNets for pixels in [0, 1], with ImageNet's normalization inside."""

from __future__ import annotations

from functools import partial

from torch import nn
from torchvision import models

from prunekit import NoOptions, normalize_inputs
from prunekit.contexts import ArchitectureContext
from prunekit.errors import UserError

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
"""ImageNet's means and standard deviations per channel, as used by all published networks."""


def build_resnet(depth: int, options: NoOptions, context: ArchitectureContext) -> nn.Module:
    """The ResNet of this depth, with torchvision's initial weights (normal, variance 2 / fan_out).

    Source: He et al., CVPR 2016. Raises `UserError` if images do not have three channels.
    """
    channels, height, width = context.shape
    if channels != 3:
        raise UserError(
            f"imagenet-resnet{depth} needs images with 3 channels, but these are {channels} x "
            f'{height} x {width}; choose another architecture, such as "cifar-resnet{depth}"'
        )
    network: nn.Module = models.get_model(f"resnet{depth}", num_classes=context.classes)
    return normalize_inputs(network, MEAN, DEVIATION)


imagenet_resnet18 = partial(build_resnet, 18)
imagenet_resnet34 = partial(build_resnet, 34)
imagenet_resnet50 = partial(build_resnet, 50)
