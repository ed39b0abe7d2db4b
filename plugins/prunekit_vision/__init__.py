"""Common data sets and ImageNet networks, from torchvision: declarations.

Small data sets are read from an `.npz` file or torchvision's files, or downloaded; large ones are
folders of images, decoded by worker processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prunekit import ArchitectureComponent, DatasetComponent, Facts, hookimpl, option
from prunekit.errors import OptionError, relative


def find_root() -> Path:
    """The folder of all data sets: $PRUNEKIT_DATA if set, otherwise `.data`."""
    return Path(os.environ.get("PRUNEKIT_DATA") or ".data").expanduser()


@dataclass(frozen=True)
class VisionOptions:
    """Options of torchvision's small data sets: where the files are."""

    root: Path | None = option(
        None, help="folder with the files; default: $PRUNEKIT_DATA if set, otherwise .data"
    )
    download: bool = option(True, help="download the files into the folder if they are missing")


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """Options of data sets that decode image files: how they do it."""

    size: int = option(224, help="height and width of the images", unit="pixels", low=8, smoke=32)
    workers: int = option(
        8, help="processes that decode images; at most one per processor is used", low=0, smoke=0
    )


@dataclass(frozen=True, kw_only=True)
class ImageNetOptions(StreamOptions):
    """Options of `imagenet`."""

    root: Path | None = option(
        None,
        help="folder with train and val; default: imagenet in $PRUNEKIT_DATA if set, else in .data",
    )


@dataclass(frozen=True, kw_only=True)
class FolderOptions(StreamOptions):
    """Options of `image-folder`."""

    root: Path = option(help="folder with train and test (or val), with a folder for each class")


@dataclass(frozen=True, kw_only=True)
class VisionSet:
    """One of torchvision's data sets.

    `torchvision` is the name of its class there. `files` is the folder in which that class keeps
    its files, or the files themselves if they are in no folder.
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
_SVHN_PAPER = "Netzer et al., NIPS Workshop on Deep Learning and Unsupervised Feature Learning 2011"

VISION_SETS = (
    VisionSet(
        name="cifar10",
        summary="60,000 color photographs in 10 classes, 32x32",
        facts=Facts((3, 32, 32), 10, train=50_000, test=10_000, augment=_CIFAR_AUGMENT),
        torchvision="CIFAR10",
        files=("cifar-10-batches-py",),
        paper=_CIFAR_PAPER,
    ),
    VisionSet(
        name="cifar100",
        summary="60,000 color photographs in 100 classes, 32x32",
        facts=Facts((3, 32, 32), 100, train=50_000, test=10_000, augment=_CIFAR_AUGMENT),
        torchvision="CIFAR100",
        files=("cifar-100-python",),
        paper=_CIFAR_PAPER,
    ),
    # Without the half million images of its part "extra". Not flipped: digits are not symmetric.
    VisionSet(
        name="svhn",
        summary="99,289 color photographs of house numbers, 32x32",
        facts=Facts((3, 32, 32), 10, train=73_257, test=26_032, augment=("crop",)),
        torchvision="SVHN",
        files=("train_32x32.mat", "test_32x32.mat"),
        paper=_SVHN_PAPER,
        needs=("scipy",),
    ),
    # Not flipped: digits are not symmetric, and all shoes in Fashion-MNIST point the same way.
    VisionSet(
        name="mnist",
        summary="70,000 handwritten digits, 28x28",
        facts=Facts((1, 28, 28), 10, train=60_000, test=10_000),
        torchvision="MNIST",
        files=("MNIST",),
        paper="LeCun et al., Proceedings of the IEEE 1998",
    ),
    VisionSet(
        name="fashion-mnist",
        summary="70,000 pictures of clothes and shoes, 28x28",
        facts=Facts((1, 28, 28), 10, train=60_000, test=10_000),
        torchvision="FashionMNIST",
        files=("FashionMNIST",),
        paper="Xiao et al. 2017, arXiv 1708.07747",
    ),
)

IMAGENET_PAPER = "Russakovsky et al., IJCV 2015, arXiv 1409.0575"
IMAGENET_CLASSES = 1000
RESNET_PAPER = "He et al., CVPR 2016, arXiv 1512.03385"
RESNET_DEPTHS = (18, 34, 50)

MODEL_DETAILS = """\
Any classifier of torchvision (prunekit list architectures --match 'vit_*'). The number of classes
comes from the data set; if published weights have a different number, the last layer keeps its
random initial weights. Images need three channels; ViT and MaxViT are built for the images' size.
Images are normalized inside, with the mean and deviation of ImageNet. GoogLeNet and Inception need
kwargs = { aux_logits = false }.

Unless a prune stage sets exclude, the same layers are left dense as in timm's models: see
prunekit show timm.
"""
MODEL_TAKEN = {
    "num_classes": "it comes from the data set",
    "weights": "write it outside kwargs",
    "progress": "it has no effect",
}
"""Arguments of torchvision's models that `kwargs` cannot hold, with the reason."""


@dataclass(frozen=True)
class ModelOptions:
    """Options of the architecture `torchvision`."""

    model: str = option(help='torchvision\'s name, such as "resnet18" or "vit_b_16"')
    weights: str | None = option(
        None, help='start from published weights, "DEFAULT" or by name ("IMAGENET1K_V1")'
    )
    normalize: bool = option(True, help="normalize images with ImageNet's mean and deviation")
    kwargs: dict[str, Any] = option({}, help="further arguments of the model")

    def __post_init__(self) -> None:
        for name in self.kwargs.keys() & MODEL_TAKEN.keys():
            raise OptionError("kwargs", f"kwargs cannot hold {name}: {MODEL_TAKEN[name]}")


FOLDER_DETAILS = """\
The names of the class folders, in order, are the classes 0, 1, 2, ...; runs of digits count as
numbers, so that folder 2 comes before folder 10. Files and folders whose names begin with a dot are
left out. Grey images of 16 bits become 8 bits; images of 32 bits and of floats are refused, because
no value of theirs means white. What is transparent is shown on white, photographs are turned as
their metadata say (torchvision's ImageFolder does neither), and of several frames the first counts.
Where there are both test and val, test is the test set and val is not used."""

STREAM_AUGMENT = ("resized-crop", "flip")


def _describe_imagenet(options: ImageNetOptions) -> Facts:
    shape = (3, options.size, options.size)
    return Facts(shape, IMAGENET_CLASSES, train=1_281_167, test=50_000, augment=STREAM_AUGMENT)


def _tell(facts: Facts) -> Callable[[VisionOptions], Facts]:
    return lambda options: facts


def describe_missing(known: VisionSet, options: VisionOptions) -> str:
    """Where the files of a small data set were looked for in vain; "" if they are there."""
    root = options.root or find_root()
    own = [root / f"{known.name}.npz"]
    if any(path.exists() for path in (*own, *find_folders(known, root))):
        return ""
    return (
        f"{known.name} was not found: there is no {relative(own[0])}, no {known.files[0]} in "
        f"{relative(root)} or its folder torchvision"
    )


def find_folders(known: VisionSet, root: Path) -> list[Path]:
    """The folders that have torchvision's files of a data set."""
    folders = (root, root / "torchvision")
    return [f for f in folders if any((f / name).exists() for name in known.files)]


def describe_missing_folders(name: str, options: ImageNetOptions | FolderOptions) -> str:
    """Which folders of images are not there; "" if they are. `name` is that of the component."""
    root = options.root or find_root() / "imagenet"
    if (root / "train").is_dir() and any((root / part).is_dir() for part in ("val", "test")):
        return ""
    return (
        f"{name} was not found: {relative(root)} needs the folders train and val (or test), each "
        "with a folder for each class"
    )


@hookimpl
def prunekit_datasets() -> Iterable[DatasetComponent]:
    """Declare torchvision's data sets and those in folders of images."""
    for known in VISION_SETS:
        yield DatasetComponent(
            name=known.name,
            summary=known.summary,
            build=f"prunekit_vision.loading:{known.name.replace('-', '_')}",
            options=VisionOptions,
            sources=("prunekit_arrays",),
            needs=("torchvision", *known.needs),
            paper=known.paper,
            facts=_tell(known.facts),
            missing=partial(describe_missing, known),
        )
    yield DatasetComponent(
        name="imagenet",
        summary="1.3 million photographs in 1000 classes, from the folders train and val",
        build="prunekit_vision.folders:imagenet",
        options=ImageNetOptions,
        needs=("torchvision", "PIL"),
        paper=IMAGENET_PAPER,
        facts=_describe_imagenet,
        missing=partial(describe_missing_folders, "imagenet"),
    )
    yield DatasetComponent(
        name="image-folder",
        summary="Your own images, in a folder for each class",
        build="prunekit_vision.folders:image_folder",
        options=FolderOptions,
        needs=("torchvision", "PIL"),
        details=FOLDER_DETAILS,
        missing=partial(describe_missing_folders, "image-folder"),
    )


@hookimpl
def prunekit_architectures() -> Iterable[ArchitectureComponent]:
    """Declare torchvision's classifiers."""
    yield ArchitectureComponent(
        name="torchvision",
        summary="Any image classifier in torchvision: ResNet, ConvNeXt, ViT, EfficientNet, ...",
        build="prunekit_vision.models:build_model",
        options=ModelOptions,
        needs=("torchvision",),
        details=MODEL_DETAILS,
        catalog="prunekit_vision.models:list_names",
    )
    for depth in RESNET_DEPTHS:
        yield ArchitectureComponent(
            name=f"imagenet-resnet{depth}",
            summary=f"torchvision's ResNet-{depth} for color images, with ImageNet's normalization",
            build=f"prunekit_vision.resnet:imagenet_resnet{depth}",
            needs=("torchvision",),
            paper=RESNET_PAPER,
        )
