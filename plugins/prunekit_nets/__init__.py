"""Networks for small images: VGG, ResNets, linear ones, and the CNNs of verified training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prunekit import Component, hookimpl, option

VGG_DEPTHS = (2, 4, 6, 8, 11, 13, 16)
RESNET_DEPTHS = (18, 34, 50, 101, 152)
WIDE_RESNETS = ((28, 1), (28, 4), (28, 10), (34, 10), (40, 2))

VGG_PAPER = "Simonyan & Zisserman, ICLR 2015, arXiv 1409.1556; for CIFAR as in arXiv 2002.10509"
RESNET_PAPER = "He et al., CVPR 2016, arXiv 1512.03385"
WIDE_RESNET_PAPER = "Zagoruyko & Komodakis, BMVC 2016, arXiv 1605.07146"
VERIFIED_PAPER = "Wong & Kolter, ICML 2018, arXiv 1711.00851"
SCALED_PAPER = "Wong et al., NeurIPS 2018, arXiv 1805.12514"

Initialization = Literal["kaiming-normal", "kaiming-uniform", "signed-constant"]


@dataclass(frozen=True)
class NetOptions:
    """What every network of this plugin can be told."""

    initialize: Initialization = option(
        "kaiming-normal", help="how weights start; signed-constant: one size, random signs"
    )
    keep_ratio: float | None = option(
        None, help="divide the starting weights by its root: a sparse network from scratch",
        above=0, high=1,
    )  # fmt: skip


@dataclass(frozen=True)
class CnnOptions(NetOptions):
    """What the small CNNs can be told besides."""

    batch_norm: bool = option(
        False, help="batch normalisation behind every convolution; the papers' have none"
    )


def _declare(
    name: str, summary: str, build: str, paper: str = "", options: type = NetOptions
) -> Component:
    return Component(
        name=name, summary=summary, build=f"prunekit_nets.{build}", options=options, paper=paper
    )


@hookimpl
def prunekit_architectures() -> Iterable[Component]:
    yield _declare(
        "small-cnn", "3 convolutions, 2 linear layers; fast", "small_cnns:small_cnn",
        options=CnnOptions,
    )  # fmt: skip
    for layers in range(1, 5):
        summary = "One linear layer" if layers == 1 else f"{layers} linear layers, no ReLU"
        yield _declare(f"lin-{layers}", summary, f"linear:lin_{layers}")
    for data in ("cifar", "mnist"):
        yield _declare(
            f"{data}-small", "The small verified CNN, 2 convolutions", f"small_cnns:{data}_small",
            VERIFIED_PAPER, CnnOptions,
        )  # fmt: skip
        yield _declare(
            f"{data}-large", "The large verified CNN, 4 convolutions", f"small_cnns:{data}_large",
            VERIFIED_PAPER, CnnOptions,
        )  # fmt: skip
    yield _declare(
        "cifar-resnet-verified", "The residual verified CNN, 16 blocks, no normalisation",
        "verified_resnet:cifar_resnet_verified", SCALED_PAPER,
    )  # fmt: skip
    yield _declare(
        "vgg4-without-maxpool", "VGG with 4 convolutions, strides for poolings; for bounds",
        "small_cnns:vgg4_without_maxpool", VGG_PAPER,
    )  # fmt: skip
    for depth in VGG_DEPTHS:
        summary, build = f"VGG with {depth} convolutions", f"vgg:vgg{depth}"
        if depth > 8:
            summary = f"VGG-{depth} for small images"
        yield _declare(f"vgg{depth}", summary, build, VGG_PAPER)
        yield _declare(
            f"vgg{depth}-bn", f"{summary}, batch normalisation", f"{build}_bn", VGG_PAPER
        )
    for depth in RESNET_DEPTHS:
        yield _declare(
            f"cifar-resnet{depth}", f"ResNet-{depth} for small images",
            f"resnet:cifar_resnet{depth}", RESNET_PAPER,
        )  # fmt: skip
    for depth, width in WIDE_RESNETS:
        yield _declare(
            f"wrn-{depth}-{width}", f"Wide ResNet, {depth} layers, {width} times as wide",
            f"wide_resnet:wrn_{depth}_{width}", WIDE_RESNET_PAPER,
        )  # fmt: skip
