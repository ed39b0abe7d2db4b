"""Small convolutional networks with layers that bound propagation supports well."""

from __future__ import annotations

from functools import partial

from torch import nn

from prunekit.contexts import ArchitectureContext
from prunekit_nets import CnnOptions, NetOptions
from prunekit_nets.initialization import initialize
from prunekit_nets.inputs import require_size


def finish(network: nn.Sequential, options: CnnOptions) -> nn.Sequential:
    """Return the network with initial weights, and with batch normalization if the options say so.

    Batch normalization is inserted after every convolution.
    """
    layers: list[nn.Module] = []
    for layer in network:
        layers.append(layer)
        if options.batch_norm and isinstance(layer, nn.Conv2d):
            layers.append(nn.BatchNorm2d(layer.out_channels))
    network = nn.Sequential(*layers)
    initialize(network, options)
    return network


def small_cnn(options: CnnOptions, context: ArchitectureContext) -> nn.Sequential:
    """3x3 convolutions with 16, 32 and 32 channels, linear layers with 32 and K outputs.

    The second and third convolution halve the size, rounding up: with 10 classes and one channel,
    there are 18,506 parameters for 8x8 images and 64,586 for 28x28 images. Images may have any
    size.
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
    return finish(network, options)


def build_small(name: str, options: CnnOptions, context: ArchitectureContext) -> nn.Sequential:
    """4x4 convolutions of stride 2 with 16 and 32 channels, linear layers with 100 and K outputs.

    Raises `UserError` for images below 4x4 pixels; `name` is
    that of the component in the message.
    """
    require_size(name, context, 4)
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
    return finish(network, options)


cifar_small, mnist_small = partial(build_small, "cifar-small"), partial(build_small, "mnist-small")


def build_large(name: str, options: CnnOptions, context: ArchitectureContext) -> nn.Sequential:
    """3x3 convolutions alternating with 4x4 ones of stride 2, with 32, 32, 64 and 64 channels.

    Linear layers with 512, 512 and K outputs follow. Raises `UserError`
    for images below 4x4 pixels; `name` is that of the component in the message.
    """
    require_size(name, context, 4)
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
    return finish(network, options)


cifar_large, mnist_large = partial(build_large, "cifar-large"), partial(build_large, "mnist-large")


def vgg4_without_maxpool(options: NetOptions, context: ArchitectureContext) -> nn.Sequential:
    """3x3 convolutions with 64, 64, 128 and 128 channels; every second one has stride 2.

    Linear layers with 256, 256 and K outputs follow. Unlike in `vgg4`, the convolutions have
    biases. Images may have any size.
    """
    channels, height, width = context.shape
    for _ in range(2):
        height, width = (height + 1) // 2, (width + 1) // 2
    network = nn.Sequential(
        nn.Conv2d(channels, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(128, 128, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128 * height * width, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, context.classes),
    )
    initialize(network, options)
    return network
