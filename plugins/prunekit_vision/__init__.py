"""The usual small data sets: from an `.npz` file, from torchvision's files, or downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from prunekit.component import Component, Facts, hookimpl, option


@dataclass(frozen=True)
class VisionOptions:
    """Where the files are."""

    root: Path | None = option(
        None, help="folder of the files; default: $PRUNEKIT_DATA, else .data where you are"
    )
    download: bool = option(True, help="fetch the files into the folder if they are not there")


@dataclass(frozen=True)
class VisionSet:
    """One of torchvision's data sets.

    `torchvision` is its class there, `files` the folder that class keeps its files in.
    """

    name: str
    summary: str
    facts: Facts
    torchvision: str
    files: str
    paper: str


_CIFAR_PAPER = "Krizhevsky, technical report, University of Toronto 2009"
_CIFAR_AUGMENT = ("crop", "flip")

VISION_SETS = (
    VisionSet(
        "cifar10", "60,000 colour photographs of 10 things, 32x32",
        Facts((3, 32, 32), 10, train=50_000, test=10_000, augment=_CIFAR_AUGMENT),
        "CIFAR10", "cifar-10-batches-py", _CIFAR_PAPER,
    ),
    VisionSet(
        "cifar100", "60,000 colour photographs of 100 things, 32x32",
        Facts((3, 32, 32), 100, train=50_000, test=10_000, augment=_CIFAR_AUGMENT),
        "CIFAR100", "cifar-100-python", _CIFAR_PAPER,
    ),
    # Not augmented: a mirrored digit is none, and the shoes of Fashion-MNIST all point one way.
    VisionSet(
        "mnist", "70,000 handwritten digits, 28x28",
        Facts((1, 28, 28), 10, train=60_000, test=10_000),
        "MNIST", "MNIST", "LeCun et al., Proceedings of the IEEE 1998",
    ),
    VisionSet(
        "fashion-mnist", "70,000 pictures of clothes and shoes, 28x28",
        Facts((1, 28, 28), 10, train=60_000, test=10_000),
        "FashionMNIST", "FashionMNIST", "Xiao et al. 2017, arXiv 1708.07747",
    ),
)  # fmt: skip


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
            needs=("torchvision",),
            paper=known.paper,
            facts=_tell(known.facts),
        )
