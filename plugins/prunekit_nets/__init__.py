"""Networks for small images: VGG, ResNets, linear networks, and the CNNs of verified training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prunekit import ArchitectureComponent, hookimpl, option

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
    """Options of every network in this plugin."""

    initialize: Initialization = option(
        "kaiming-normal",
        help="initial weights; signed-constant: equal magnitude, random signs",
    )
    keep_ratio: float | None = option(
        None,
        help="divide initial weights by its square root: to train a sparse network from scratch",
        above=0,
        high=1,
    )


@dataclass(frozen=True)
class CnnOptions(NetOptions):
    """Options of the small CNNs."""

    batch_norm: bool = option(
        False, help="batch normalization after every convolution; the papers use none"
    )


def _declare(
    name: str, summary: str, build: str, paper: str = "", options: type = NetOptions
) -> ArchitectureComponent:
    return ArchitectureComponent(
        name=name, summary=summary, build=f"prunekit_nets.{build}", options=options, paper=paper
    )


@hookimpl
def prunekit_architectures() -> Iterable[ArchitectureComponent]:
    """Declare the networks."""
    summary = "3 convolutions, 2 linear layers; fast"
    yield _declare("small-cnn", summary, "small_cnns:small_cnn", options=CnnOptions)
    for layers in range(1, 5):
        summary = "One linear layer" if layers == 1 else f"{layers} linear layers, no ReLU"
        yield _declare(f"lin-{layers}", summary, f"linear:lin_{layers}")
    for data in ("cifar", "mnist"):
        for size, convolutions in (("small", 2), ("large", 4)):
            summary = f"The {size} CNN of verified training, {convolutions} convolutions"
            build = f"small_cnns:{data}_{size}"
            yield _declare(f"{data}-{size}", summary, build, VERIFIED_PAPER, CnnOptions)
    summary = "The residual CNN of verified training, 16 blocks, no normalization"
    build = "verified_resnet:cifar_resnet_verified"
    yield _declare("cifar-resnet-verified", summary, build, SCALED_PAPER)
    summary = "VGG with 4 convolutions, with strides in place of pooling; for certified bounds"
    build = "small_cnns:vgg4_without_maxpool"
    yield _declare("vgg4-without-maxpool", summary, build, VGG_PAPER)
    for depth in VGG_DEPTHS:
        summary = f"VGG-{depth} for small images" if depth > 8 else f"VGG with {depth} convolutions"
        name, build = f"vgg{depth}", f"vgg:vgg{depth}"
        yield _declare(name, summary, build, VGG_PAPER)
        yield _declare(f"{name}-bn", f"{summary}, batch normalization", f"{build}_bn", VGG_PAPER)
    for depth in RESNET_DEPTHS:
        summary, build = f"ResNet-{depth} for small images", f"resnet:cifar_resnet{depth}"
        yield _declare(f"cifar-resnet{depth}", summary, build, RESNET_PAPER)
    for depth, width in WIDE_RESNETS:
        summary = f"Wide ResNet, {depth} layers, {width} times as wide"
        build = f"wide_resnet:wrn_{depth}_{width}"
        yield _declare(f"wrn-{depth}-{width}", summary, build, WIDE_RESNET_PAPER)
