"""Data sets with a folder of images for each class, decoded by worker processes during training."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import functional

from prunekit import derive_seed
from prunekit.contexts import DatasetContext
from prunekit.contracts import Data
from prunekit.errors import DataMissingError, RunError, UserError, explain_briefly, relative
from prunekit_vision import (
    IMAGENET_CLASSES,
    STREAM_AUGMENT,
    FolderOptions,
    ImageNetOptions,
    StreamOptions,
    find_root,
)
from prunekit_vision.listing import (
    Listing,
    hash_images,
    list_images,
    normalize,
    tell_order,
)

LOOKED_AT = 500
"""Files of a split that are opened to tell of transparency and animation."""
UPRIGHT = Image.Transpose
TURNS = {2: UPRIGHT.FLIP_LEFT_RIGHT, 3: UPRIGHT.ROTATE_180, 4: UPRIGHT.FLIP_TOP_BOTTOM}
TURNS |= {5: UPRIGHT.TRANSPOSE, 6: UPRIGHT.ROTATE_270, 7: UPRIGHT.TRANSVERSE, 8: UPRIGHT.ROTATE_90}
"""EXIF's orientation (tag 274) -> what shows the image upright."""

Key = tuple[int, int | None]
"""An image's number in the split, and the seed of its augmentation; None without augmentation."""


@dataclass(frozen=True, eq=False)
class Decoder:
    """Decodes files to square uint8 images (3, size, size), for torch's `DataLoader`.

    Without augmentation, the shorter side is resized to 8/7 of `size` and the center is cropped;
    for 224 pixels these are the usual 256 and 224. "resized-crop" crops 8 to 100 % of the area at
    an aspect ratio from 3:4 to 4:3 and resizes it; "flip" flips horizontally with probability 1/2.
    For a file that cannot be read, an error is returned, which the main process raises: an
    exception raised in a worker would have many lines.
    """

    root: Path
    # An array of bytes, because each worker process would copy a list of a million strings.
    paths: np.ndarray
    size: int
    augment: tuple[str, ...] = ()

    def __getitem__(self, key: Key) -> Tensor | RunError:
        number, seed = key
        path = self.root / os.fsdecode(self.paths[number])
        try:
            with Image.open(path) as file:
                image = _turn(_to_rgb(file), file)
        # For damaged files, PIL may raise anything.
        except Exception as error:
            reason = explain_briefly(error)
            return RunError(
                f"{relative(path)} cannot be read as an image ({reason}); delete or replace it"
            )
        pixels: Tensor = functional.pil_to_tensor(self._cut(image, seed))
        return pixels

    def _cut(self, image: Image.Image, seed: int | None) -> Image.Image:
        # torchvision draws from the global generator, which belongs to the training step.
        with torch.random.fork_rng(devices=(), enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            if "resized-crop" in self.augment:
                image = transforms.RandomResizedCrop(self.size)(image)
            else:
                image = functional.resize(image, [round(self.size * 8 / 7)])
                image = functional.center_crop(image, [self.size])
            if "flip" in self.augment:
                image = transforms.RandomHorizontalFlip()(image)
            return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """8 bits a channel, on white; PIL alone would clip 16 bits to white instead of scaling them.

    Raises `ValueError` for pixels of which no value means white.
    """
    # PIL opens 16 bits of grey as 32: PGM, scaled from any maximum to 65535; PNG in some versions.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        levels = np.rint(np.asarray(image) / 257).astype(np.uint8)
        if getattr(image, "tag_v2", {}).get(262) == 0:  # zero is white; PIL inverts 8 bits alone
            levels = 255 - levels
        return Image.fromarray(levels).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"no value of its {image.mode}-mode pixels means white")
    if _may_be_transparent(image):
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return image.convert("RGB")


def _may_be_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _turn(image: Image.Image, file: Image.Image) -> Image.Image:
    """Upright, as the EXIF data of its file say; damaged ones say nothing."""
    try:
        with warnings.catch_warnings(action="ignore"):
            turn = TURNS.get(file.getexif().get(274, 1))
    except Exception:  # PIL raises whatever its parsers do
        return image
    return image if turn is None else image.transpose(turn)


@dataclass(frozen=True, eq=False)
class Folder:
    """A split that is read from disk: the files `paths` below `root`, with labels (N,)."""

    root: Path
    paths: np.ndarray
    labels: Tensor
    size: int
    workers: int

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """For each index tensor (B,), uint8 images (B, 3, size, size), resized and center-cropped.

        Raises `RunError` if a file cannot be read.
        """
        keys = ([(number, None) for number in index.tolist()] for index in indices)
        return self._decode(Decoder(self.root, self.paths, self.size), keys)

    def augmented_batches(
        self, indices: Sequence[Tensor], augment: Sequence[str], batch_seeds: Sequence[int]
    ) -> Iterator[Tensor]:
        """The same images, augmented; the seed of a batch and an image's number decide how.

        `augment` names the augmentations (see `Decoder`). Raises `RunError` if a file cannot be
        read.
        """
        keys = (
            [(number, derive_seed(seed, number)) for number in index.tolist()]
            for index, seed in zip(indices, batch_seeds, strict=True)
        )
        return self._decode(Decoder(self.root, self.paths, self.size, tuple(augment)), keys)

    def _decode(self, decoder: Decoder, keys: Iterable[Sequence[Key]]) -> Iterator[Tensor]:
        loader: DataLoader[Tensor | RunError] = DataLoader(
            decoder,  # type: ignore[arg-type]  # any object with __getitem__ works
            batch_sampler=keys,  # type: ignore[arg-type]  # any iterable of keys works
            num_workers=min(self.workers, _count_processors()),
            collate_fn=_stack,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_interrupts,
            # Otherwise the loader would draw a number from the training step's generator.
            generator=torch.Generator(),
        )
        for batch in loader:
            if isinstance(batch, RunError):
                raise batch
            yield batch


def _stack(images: Sequence[Tensor | RunError]) -> Tensor | RunError:
    """The batch (B, 3, size, size) of the images, or the first error among them."""
    for image in images:
        if isinstance(image, RunError):
            return image
    return torch.stack(images)  # type: ignore[arg-type]  # there are no errors among them


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the main process, which ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _count_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_folders(name: str, root: Path, options: StreamOptions) -> Data:
    """The data set in `root`: `train` for training, and `test` or `val` for testing only.

    Of both, `test` is taken if it has class folders (ImageNet's has none, and `val` is taken), and
    the other is told. `name` is that of the component in messages. Warns where numbers in the names
    of classes decide their order, and of files left out, transparency and animation.

    Raises `DataMissingError` if a folder is missing, and `UserError` if the two folders do not have
    the same classes.
    """
    parts = ("val", "test") if name == "imagenet" else ("test", "val")
    tests = [root / part for part in parts if (root / part).is_dir()]
    # Images without labels may lie in `test`.
    tests.sort(key=lambda folder: not any(entry.is_dir() for entry in folder.iterdir()))
    if not (root / "train").is_dir() or not tests:
        raise DataMissingError(
            f"{name} was not found: {relative(root)} needs the folders train and val (or test), "
            "each with a folder for each class; if the data is elsewhere, set root"
        )
    train, test = list_images(root / "train"), list_images(tests[0])
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        if sorted(map(normalize, train.classes)) == sorted(map(normalize, test.classes)):
            raise UserError(
                f"{relative(train.folder)} and {relative(test.folder)} write the same class in two "
                f"ways that look alike (Unicode NFC and NFD), {odd[0]!a}; rename one of them"
            )
        raise UserError(
            f"{relative(train.folder)} and {relative(test.folder)} have different classes: "
            f"{odd[0]!r} is only in one of them ({len(odd)} such); both need the same folders"
        )
    tell_order(train.classes)
    if name != "imagenet" and len(tests) > 1:
        warnings.warn(
            f"{relative(tests[1])} is not used: {relative(tests[0])} is the test set, and images "
            "to validate with are held out of train (validation in [dataset])",
            stacklevel=2,
        )
    for listing in (train, test):
        _tell_kinds(listing)
    return Data(
        _to_split(train, options),
        _to_split(test, options),
        shape=(3, options.size, options.size),
        classes=len(train.classes),
        augment=STREAM_AUGMENT,
        fingerprint=hash_images(train, test),
    )


def _tell_kinds(listing: Listing) -> None:
    """Warn where images, of `LOOKED_AT` at most, have an alpha channel or several frames."""
    alpha, moving = [], []
    chosen = listing.paths[:: -(-len(listing.paths) // LOOKED_AT)]
    for path in chosen:
        # Damaged files are told when they are decoded.
        with suppress(Exception), Image.open(listing.folder / path) as file:
            alpha += [path] if _may_be_transparent(file) else []
            # Phones write a second picture behind the first (MPO).
            moving += [path] if file.format != "MPO" and getattr(file, "is_animated", False) else []
    for found, what in (
        (alpha, "may be transparent in parts, which are shown on white"),
        (moving, "have several frames, of which the first is taken"),
    ):
        if found:
            warnings.warn(
                f"{len(found)} of {len(chosen)} images looked at in {relative(listing.folder)} "
                f"{what}, such as {found[0]}",
                stacklevel=2,
            )


def _to_split(listing: Listing, options: StreamOptions) -> Folder:
    paths = np.array([os.fsencode(path) for path in listing.paths])
    labels = torch.tensor(listing.labels)
    return Folder(listing.folder, paths, labels, options.size, options.workers)


def image_folder(options: FolderOptions, context: DatasetContext) -> Data:
    """The user's own images; see `load_folders` for the folders and errors."""
    return load_folders("image-folder", options.root, options)


def imagenet(options: ImageNetOptions, context: DatasetContext) -> Data:
    """ImageNet with its 1000 classes, which the user has to download.

    See `load_folders` for the folders and errors. Also raises `UserError` if the number of classes
    is not 1000.
    """
    root = options.root or find_root() / "imagenet"
    data = load_folders("imagenet", root, options)
    if data.classes != IMAGENET_CLASSES:
        raise UserError(
            f"{relative(root)} has {data.classes} classes, but imagenet has {IMAGENET_CLASSES}; "
            'for your own images, write use = "image-folder"'
        )
    return data
