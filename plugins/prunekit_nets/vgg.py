"""VGG for small images, with the layers and state-dict keys of HYDRA's networks.

Convolutions have no bias, even without batch normalization; features are averaged to 2x2 and passed
to three linear layers.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import nn

from prunekit.contexts import ArchitectureContext
from prunekit_nets import NetOptions
from prunekit_nets.initialization import initialize
from prunekit_nets.inputs import require_size

STAGES: dict[int, tuple[tuple[int, ...], ...]] = {
    2: ((64,), (64,), ()),
    4: ((64,) * 2, (128,) * 2, ()),
    6: ((64,) * 2, (128,) * 2, (256,) * 2, ()),
    8: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, ()),
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
}
"""Depth -> channels of the 3x3 convolutions in each stage; max pooling between the stages."""


def build_vgg(
    depth: int, options: NetOptions, context: ArchitectureContext, *, batch_norm: bool = False
) -> nn.Sequential:
    """The VGG of this depth; state-dict keys `features.N`, `classifier.N`.

    Raises `UserError` if pooling would leave nothing of the image.
    """
    stages = STAGES[depth]
    name = f"vgg{depth}-bn" if batch_norm else f"vgg{depth}"
    require_size(name, context, 2 ** (len(stages) - 1))
    inputs = context.shape[0]
    features: list[nn.Module] = []
    for position, stage in enumerate(stages):
        if position > 0:
            features.append(nn.MaxPool2d(2))
        for outputs in stage:
            features.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
            if batch_norm:
                features.append(nn.BatchNorm2d(outputs))
            features.append(nn.ReLU())
            inputs = outputs
    classifier = nn.Sequential(
        nn.Linear(inputs * 2 * 2, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, context.classes),
    )
    network = nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*features),
            pool=nn.AdaptiveAvgPool2d((2, 2)),
            flatten=nn.Flatten(),
            classifier=classifier,
        )
    )
    initialize(network, options)
    return network


vgg2, vgg2_bn = partial(build_vgg, 2), partial(build_vgg, 2, batch_norm=True)
vgg4, vgg4_bn = partial(build_vgg, 4), partial(build_vgg, 4, batch_norm=True)
vgg6, vgg6_bn = partial(build_vgg, 6), partial(build_vgg, 6, batch_norm=True)
vgg8, vgg8_bn = partial(build_vgg, 8), partial(build_vgg, 8, batch_norm=True)
vgg11, vgg11_bn = partial(build_vgg, 11), partial(build_vgg, 11, batch_norm=True)
vgg13, vgg13_bn = partial(build_vgg, 13), partial(build_vgg, 13, batch_norm=True)
vgg16, vgg16_bn = partial(build_vgg, 16), partial(build_vgg, 16, batch_norm=True)
