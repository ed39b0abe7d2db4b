"""Small convolutional networks without normalisation, as bound propagation likes them."""

from __future__ import annotations

from torch import nn

from prunekit.contracts import Context
from prunekit_nets import NetOptions
from prunekit_nets.initialization import initialize
from prunekit_nets.inputs import require_size


def small_cnn(options: NetOptions, context: Context) -> nn.Sequential:
    """3x3 convolutions with 16, 32 and 32 channels, linear layers with 32 and K outputs.

    The second and third convolution halve the size, rounding up: 8x8 images make 18,506
    parameters, 28x28 images 64,586 (10 classes, one channel). Images of any size will do.
    """
    channels, height, width = context.shape
    for _ in range(2):
        height, width = (height + 1) // 2, (width + 1) // 2
    network = nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * height * width, 32),
        nn.ReLU(),
        nn.Linear(32, context.classes),
    )
    initialize(network, options.initialize)
    return network


def cifar_small(options: NetOptions, context: Context) -> nn.Sequential:
    """4x4 convolutions of stride 2 with 16 and 32 channels, linear layers with 100 and K outputs.

    Raises `UserError` below 4x4 pixels.
    """
    require_size("cifar-small", context, 4)
    channels, height, width = context.shape
    network = nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), 100),
        nn.ReLU(),
        nn.Linear(100, context.classes),
    )
    initialize(network, options.initialize)
    return network


def cifar_large(options: NetOptions, context: Context) -> nn.Sequential:
    """3x3 convolutions and 4x4 ones of stride 2 in turn, with 32, 32, 64 and 64 channels.

    Linear layers with 512, 512 and K outputs. Raises `UserError` below 4x4 pixels.
    """
    require_size("cifar-large", context, 4)
    channels, height, width = context.shape
    network = nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, context.classes),
    )
    initialize(network, options.initialize)
    return network
