"""The usual data sets and ImageNet's networks, by way of torchvision.

Small sets are read from an `.npz` file, from torchvision's files, or downloaded; large ones are
folders of images, decoded by worker processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit import Component, Facts, hookimpl, option
from prunekit.errors import OptionError


@dataclass(frozen=True)
class VisionOptions:
    """Where the files are."""

    root: Path | None = option(
        None, help="folder of the files; default: $PRUNEKIT_DATA, else .data where you are"
    )
    download: bool = option(True, help="fetch the files into the folder if they are not there")


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How images are decoded."""

    size: int = option(224, help="height and width of the images", unit="pixels", low=8, smoke=32)
    workers: int = option(
        8, help="processes that decode images; never more than there are processors", low=0, smoke=0
    )


@dataclass(frozen=True, kw_only=True)
class ImageNetOptions(StreamOptions):
    """Where the folders are."""

    root: Path | None = option(
        None, help="folder of train and val; default: imagenet in $PRUNEKIT_DATA, else in .data"
    )


@dataclass(frozen=True, kw_only=True)
class FolderOptions(StreamOptions):
    """Where the folders are."""

    root: Path = option(help="folder of train and val (or test), each with a folder a class")


@dataclass(frozen=True)
class VisionSet:
    """One of torchvision's data sets.

    `torchvision` is its class there, `files` the folder that class keeps its files in, or the files
    that it keeps in no folder.
    """

    name: str
    summary: str
    facts: Facts
    torchvision: str
    files: tuple[str, ...]
    paper: str
    needs: tuple[str, ...] = ()


_CIFAR_PAPER = "Krizhevsky, technical report, University of Toronto 2009"
_CIFAR_AUGMENT = ("crop", "flip")

VISION_SETS = (
    VisionSet(
        "cifar10", "60,000 colour photographs of 10 things, 32x32",
        Facts((3, 32, 32), 10, train=50_000, test=10_000, augment=_CIFAR_AUGMENT),
        "CIFAR10", ("cifar-10-batches-py",), _CIFAR_PAPER,
    ),
    VisionSet(
        "cifar100", "60,000 colour photographs of 100 things, 32x32",
        Facts((3, 32, 32), 100, train=50_000, test=10_000, augment=_CIFAR_AUGMENT),
        "CIFAR100", ("cifar-100-python",), _CIFAR_PAPER,
    ),
    # Without the half million images of `extra`. Not flipped: a mirrored digit is none.
    VisionSet(
        "svhn", "99,289 colour photographs of house numbers, 32x32",
        Facts((3, 32, 32), 10, train=73_257, test=26_032, augment=("crop",)),
        "SVHN", ("train_32x32.mat", "test_32x32.mat"),
        "Netzer et al., NIPS Workshop on Deep Learning and Unsupervised Feature Learning 2011",
        needs=("scipy",),
    ),
    # Not augmented: a mirrored digit is none, and the shoes of Fashion-MNIST all point one way.
    VisionSet(
        "mnist", "70,000 handwritten digits, 28x28",
        Facts((1, 28, 28), 10, train=60_000, test=10_000),
        "MNIST", ("MNIST",), "LeCun et al., Proceedings of the IEEE 1998",
    ),
    VisionSet(
        "fashion-mnist", "70,000 pictures of clothes and shoes, 28x28",
        Facts((1, 28, 28), 10, train=60_000, test=10_000),
        "FashionMNIST", ("FashionMNIST",), "Xiao et al. 2017, arXiv 1708.07747",
    ),
)  # fmt: skip


IMAGENET_PAPER = "Russakovsky et al., IJCV 2015, arXiv 1409.0575"
IMAGENET_CLASSES = 1000
RESNET_PAPER = "He et al., CVPR 2016, arXiv 1512.03385"
RESNET_DEPTHS = (18, 34, 50)

MODEL_DETAILS = """\
Any classifier of torchvision's (prunekit list architectures --match 'vit_*'). The number of
classes comes from the data set: where published weights have another one, the last layer starts
anew. Images have three colours; their size is told to ViT and MaxViT. They are normalised inside,
as ImageNet's. GoogLeNet and Inception want kwargs = { aux_logits = false }.

What is left dense unless a prune stage says exclude is as of timm's models: see prunekit show timm.
"""
MODEL_TAKEN = {
    "num_classes": "it comes from the data set",
    "weights": "write it beside kwargs",
    "progress": "it changes nothing",
}
"""Arguments of torchvision's that are not for `kwargs`."""


@dataclass(frozen=True)
class ModelOptions:
    model: str = option(help='torchvision\'s name, such as "resnet18" or "vit_b_16"')
    weights: str | None = option(
        None, help='start from published weights, "DEFAULT" or by name ("IMAGENET1K_V1")'
    )
    normalize: bool = option(True, help="work on (x - mean) / deviation of ImageNet's pixels")
    kwargs: dict[str, Any] = option({}, help="more arguments of the model")

    def __post_init__(self) -> None:
        for name in self.kwargs.keys() & MODEL_TAKEN.keys():
            raise OptionError("kwargs", f"kwargs cannot hold {name}: {MODEL_TAKEN[name]}")


STREAM_AUGMENT = ("resized-crop", "flip")


def _describe_imagenet(options: ImageNetOptions) -> Facts:
    shape = (3, options.size, options.size)
    return Facts(shape, IMAGENET_CLASSES, train=1_281_167, test=50_000, augment=STREAM_AUGMENT)


def _tell(facts: Facts) -> Callable[[VisionOptions], Facts]:
    return lambda options: facts


@hookimpl
def prunekit_datasets() -> Iterable[Component]:
    for known in VISION_SETS:
        yield Component(
            name=known.name,
            summary=known.summary,
            build=f"prunekit_vision.loading:{known.name.replace('-', '_')}",
            options=VisionOptions,
            sources=("prunekit_arrays",),
            needs=("torchvision", *known.needs),
            paper=known.paper,
            facts=_tell(known.facts),
        )
    yield Component(
        name="imagenet",
        summary="1.3 million photographs of 1000 things, from the folders train and val",
        build="prunekit_vision.folders:imagenet",
        options=ImageNetOptions,
        needs=("torchvision", "PIL"),
        paper=IMAGENET_PAPER,
        facts=_describe_imagenet,
    )
    yield Component(
        name="image-folder",
        summary="Your own images, in a folder for each class",
        build="prunekit_vision.folders:image_folder",
        options=FolderOptions,
        needs=("torchvision", "PIL"),
    )


@hookimpl
def prunekit_architectures() -> Iterable[Component]:
    yield Component(
        name="torchvision",
        summary="Any image classifier of torchvision: ResNet, ConvNeXt, ViT, EfficientNet, ...",
        build="prunekit_vision.models:build_model",
        options=ModelOptions,
        needs=("torchvision",),
        details=MODEL_DETAILS,
        catalog="prunekit_vision.models:list_names",
    )
    for depth in RESNET_DEPTHS:
        yield Component(
            name=f"imagenet-resnet{depth}",
            summary=f"torchvision's ResNet-{depth}, for colour images, normalised as ImageNet's",
            build=f"prunekit_vision.resnet:imagenet_resnet{depth}",
            needs=("torchvision",),
            paper=RESNET_PAPER,
        )
