"""Data sets made of arrays: the digits that ship with prunekit, and your own `.npz` files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prunekit import DatasetComponent, Facts, NoOptions, hookimpl, option


@dataclass(frozen=True)
class NpzOptions:
    """Options of `npz`: a file with the arrays x_train, y_train, x_test, y_test."""

    file: Path = option(help="the .npz file: x_train, y_train, x_test, y_test", exists=True)
    classes: int | None = option(None, help="number of classes; default: as many as labels", low=2)
    channels: Literal["last", "first"] = option(
        "last", help="layout of color images: last is (N, H, W, C), first is (N, C, H, W)"
    )


@dataclass(frozen=True)
class ExtraOptions:
    """Options of `extra-images`: a file with images to train on, besides those of a data set."""

    file: Path = option(help=".npz, or the pickle of pseudo-labeled TinyImages", exists=True)


EXTRA_DETAILS = """\
A data set names them: `extra = { use = "extra-images", file = "..." }` in [dataset]. An .npz file
has the arrays x_extra and y_extra, or image and label, as files of generated images do. The pickle
of pseudo-labeled TinyImages is read without executing any code in it."""


def _describe_digits(options: NoOptions) -> Facts:
    return Facts((1, 8, 8), 10, train=1437, test=360)


@hookimpl
def prunekit_datasets() -> Iterable[DatasetComponent]:
    """Declare the data sets: the digits, `.npz` files, and extra training images."""
    yield DatasetComponent(
        name="digits",
        summary="1,797 real handwritten digits, 8x8, no download",
        build="prunekit_arrays.digits:build",
        paper="Alpaydin & Kaynak, UCI Machine Learning Repository 1998, doi 10.24432/C50P49",
        facts=_describe_digits,
    )
    yield DatasetComponent(
        name="npz",
        summary="Your own arrays, in an .npz file with the keys that Keras uses",
        build="prunekit_arrays.npz:build",
        options=NpzOptions,
    )
    yield DatasetComponent(
        name="extra-images",
        summary="Extra training images from a file, added to another data set by its key extra",
        build="prunekit_arrays.extra:build",
        options=ExtraOptions,
        details=EXTRA_DETAILS,
        paper="pseudo-labeled TinyImages: Carmon et al., NeurIPS 2019, arXiv 1905.13736",
    )
