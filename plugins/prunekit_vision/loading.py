"""Finds the files of torchvision's data sets, or downloads them."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from prunekit_arrays.reading import read_npz, to_data

from prunekit.contexts import DatasetContext
from prunekit.contracts import Data
from prunekit.errors import DataMissingError, UserError, explain_briefly, relative
from prunekit_vision import (
    VISION_SETS,
    VisionOptions,
    VisionSet,
    describe_missing,
    find_folders,
    find_root,
)

SILENCE_SECONDS = 20
"""How long to wait for a server that does not answer."""


def load(known: VisionSet, options: VisionOptions, context: DatasetContext) -> Data:
    """Read `<root>/<name>.npz`, or torchvision's files in `<root>` or `<root>/torchvision`.

    Raises `DataMissingError` if there is neither and the files cannot be downloaded, and
    `UserError` if the files are damaged or hold another data set.
    """
    root = options.root or find_root()
    file = root / f"{known.name}.npz"
    folders = find_folders(known, root)
    if file.exists():
        data = read_npz(file, classes=known.facts.classes)
    elif folders:
        data = _read_files(known, folders[0])
    else:
        data = _fetch(known, options, root, file)
    if data.shape != known.facts.shape:
        raise UserError(
            f"{relative(file)} has images {data.shape}, but {known.name} has {known.facts.shape} "
            '(channels, height, width); for your own arrays, write use = "npz"'
        )
    return replace(data, augment=known.facts.augment)


def _fetch(known: VisionSet, options: VisionOptions, root: Path, file: Path) -> Data:
    reason = "download = false"
    if options.download:
        try:
            return _download(known, root)
        # urllib, zipfile, tarfile and torchvision each raise their own errors if a download fails.
        except Exception as error:
            reason = f"the download failed: {explain_briefly(error)}"
    raise DataMissingError(
        f"{describe_missing(known, options)}, and {reason}; put one of them there, or set "
        "root or PRUNEKIT_DATA to the folder that has it"
    )


def _download(known: VisionSet, root: Path) -> Data:
    root.mkdir(parents=True, exist_ok=True)
    # Download to a folder beside the final place, then rename: no other run sees incomplete files.
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{known.name}-") as folder:
        with _patience(SILENCE_SECONDS), _quiet():
            arrays = _call_torchvision(known, Path(folder), download=True)
        # Fails if another process was faster; its files are the same.
        with contextlib.suppress(OSError):
            for name in known.files:
                (Path(folder) / name).rename(root / name)
    return to_data(arrays, known.name, classes=known.facts.classes)


def _read_files(known: VisionSet, folder: Path) -> Data:
    names = " and ".join(relative(folder / name) for name in known.files)
    try:
        arrays = _call_torchvision(known, folder, download=False)
    # For damaged files, torchvision may raise anything, including AssertionError.
    except Exception as error:
        reason = explain_briefly(error)
        raise UserError(
            f"{names}: incomplete or damaged (torchvision: {reason}); delete it, and the next run "
            "downloads it again"
        ) from error
    return to_data(arrays, names, classes=known.facts.classes)


def _call_torchvision(known: VisionSet, folder: Path, *, download: bool) -> dict[str, np.ndarray]:
    """The arrays for `to_data`; torchvision checks the MD5 of CIFAR's pickles before opening."""
    from torchvision import datasets

    arrays = {}
    for part in ("train", "test"):
        if known.name == "svhn":
            found = datasets.SVHN(str(folder), split=part, download=download)
            # SVHN is stored as (N, C, H, W).
            images, labels = found.data.transpose(0, 2, 3, 1), found.labels
        else:
            found = getattr(datasets, known.torchvision)(
                str(folder), train=part == "train", download=download
            )
            images, labels = found.data, found.targets
        arrays[f"x_{part}"], arrays[f"y_{part}"] = np.asarray(images), np.asarray(labels)
    return arrays


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Inside, new sockets have a time limit, because torchvision does not set one."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, torchvision's messages go to stderr, and its progress bar only to a terminal."""
    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():
            sink = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(sink))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


cifar10, cifar100, svhn, mnist, fashion_mnist = (partial(load, known) for known in VISION_SETS)
