"""Images in a folder for each class, decoded by worker processes while the network is at work."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import functional

from prunekit import derive_seed
from prunekit.contracts import Context, Data
from prunekit.errors import DataMissingError, RunError, UserError, relative
from prunekit_vision import (
    IMAGENET_CLASSES,
    STREAM_AUGMENT,
    FolderOptions,
    ImageNetOptions,
    StreamOptions,
)

ENDINGS = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
)

Key = tuple[int, int | None]
"""An image's place in the split, and the seed of its augmentation; None where there is none."""


@dataclass(frozen=True, eq=False)
class Decoder:
    """Makes square uint8 images (3, size, size) of the files, for torch's `DataLoader`.

    Without augmentation the shorter side becomes 8/7 of `size` and the middle is cut out, for 224
    pixels the usual 256 and 224. "resized-crop" cuts out 8 to 100 % of the area at a ratio of 3:4
    to 4:3 and resizes that; "flip" mirrors left and right with probability 1/2. A file that cannot
    be read becomes an error, raised where it is waited for: a worker's exception is many lines.
    """

    root: Path
    # Bytes in one array: worker processes would each copy a list of a million strings.
    paths: np.ndarray
    size: int
    augment: tuple[str, ...] = ()

    def __getitem__(self, key: Key) -> Tensor | RunError:
        number, seed = key
        path = self.root / os.fsdecode(self.paths[number])
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        # PIL raises whatever a wrong byte leads to.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            return RunError(
                f"{relative(path)} cannot be read as an image ({reason}); delete or replace it"
            )
        return functional.pil_to_tensor(self._cut(image, seed))

    def _cut(self, image: Image.Image, seed: int | None) -> Image.Image:
        # torchvision draws from the global generator, which is the training step's.
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


@dataclass(frozen=True, eq=False)
class Folder:
    """A split that is read from disk: files below `root`, labels (N,)."""

    root: Path
    paths: np.ndarray
    labels: Tensor
    size: int
    workers: int

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """uint8 images (B, 3, size, size), resized and cut out of the middle."""
        keys = ([(number, None) for number in index.tolist()] for index in indices)
        return self._decode(Decoder(self.root, self.paths, self.size), keys)

    def augmented_batches(
        self, indices: Sequence[Tensor], augment: Sequence[str], batch_seeds: Sequence[int]
    ) -> Iterator[Tensor]:
        """The same images, each augmented in its own way, which the seed of its batch decides."""
        keys = (
            [(number, derive_seed(seed, number)) for number in index.tolist()]
            for index, seed in zip(indices, batch_seeds, strict=True)
        )
        return self._decode(Decoder(self.root, self.paths, self.size, tuple(augment)), keys)

    def _decode(self, decoder: Decoder, keys: Iterable[Sequence[Key]]) -> Iterator[Tensor]:
        loader: DataLoader[Tensor | RunError] = DataLoader(
            decoder,  # type: ignore[arg-type]  # anything with items by key will do
            batch_sampler=keys,  # type: ignore[arg-type]  # as any iterable over keys
            num_workers=min(self.workers, _count_processors()),
            collate_fn=_stack,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_interrupts,
            # Else it would draw a number from the training step's generator.
            generator=torch.Generator(),
        )
        for batch in loader:
            if isinstance(batch, RunError):
                raise batch
            yield batch


def _stack(images: Sequence[Tensor | RunError]) -> Tensor | RunError:
    for image in images:
        if isinstance(image, RunError):
            return image
    return torch.stack(images)  # type: ignore[arg-type]  # none is an error


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C is for the main process, which ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _count_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Listing:
    """The files of one part: paths relative to its folder, in order, and their classes' numbers."""

    folder: Path
    classes: tuple[str, ...]
    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


def list_images(folder: Path) -> Listing:
    """All images in the folders of `folder`, however deep; a class is a folder's name.

    Raises `UserError` where there are fewer than two classes, or one without images.
    """
    classes = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
    if len(classes) < 2:
        raise UserError(
            f"{relative(folder)} has {len(classes)} folders; put the images of each class in a "
            "folder of its own in there, with the class's name"
        )
    listing = Listing(folder, classes)
    for label, name in enumerate(classes):
        before = len(listing.paths)
        for path, size in _walk(folder / name):
            listing.paths.append(os.path.relpath(path, folder))
            listing.labels.append(label)
            listing.sizes.append(size)
        if len(listing.paths) == before:
            raise UserError(
                f"{relative(folder / name)} has no images ({', '.join(sorted(ENDINGS))}); put some "
                "there, or delete the folder"
            )
    return listing


def _walk(folder: Path) -> Iterator[tuple[str, int]]:
    """The images in a folder and those below, sorted by path, with their sizes in bytes."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _walk(Path(entry.path))
        elif os.path.splitext(entry.name)[1].lower() in ENDINGS:
            yield entry.path, entry.stat().st_size


def load_folders(name: str, root: Path, options: StreamOptions) -> Data:
    """The data set in `root`: `train` is learned from, `val` (or else `test`) is only judged on.

    The fingerprint is that of the paths and sizes of all files: to read them all takes hours.

    Raises `DataMissingError` where one of the folders is not there, `UserError` where they do not
    have the same classes.
    """
    tests = [root / part for part in ("val", "test") if (root / part).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise DataMissingError(
            f"{name} is not here: {relative(root)} has to have the folders train and val (or "
            "test), each with a folder for each class; say where it is with root"
        )
    train, test = list_images(root / "train"), list_images(tests[0])
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"{relative(train.folder)} and {relative(test.folder)} have not the same classes: "
            f"{odd[0]!r} is only in one of them ({len(odd)} such); give both the same folders"
        )
    digest = hashlib.sha256()
    for part in (train, test):
        for path, size in zip(part.paths, part.sizes, strict=True):
            digest.update(f"{part.folder.name}/{Path(path).as_posix()}\0{size}\n".encode())
    return Data(
        _to_split(train, options),
        _to_split(test, options),
        shape=(3, options.size, options.size),
        classes=len(train.classes),
        augment=STREAM_AUGMENT,
        fingerprint=digest.hexdigest(),
    )


def _to_split(listing: Listing, options: StreamOptions) -> Folder:
    paths = np.array([os.fsencode(path) for path in listing.paths])
    labels = torch.tensor(listing.labels)
    return Folder(listing.folder, paths, labels, options.size, options.workers)


def image_folder(options: FolderOptions, context: Context) -> Data:
    """Anybody's images; see `load_folders`."""
    return load_folders("image-folder", options.root, options)


def imagenet(options: ImageNetOptions, context: Context) -> Data:
    """ImageNet's 1000 classes; see `load_folders`. It has to be fetched by hand."""
    below = Path(os.environ.get("PRUNEKIT_DATA") or ".data").expanduser()
    root = options.root or below / "imagenet"
    data = load_folders("imagenet", root, options)
    if data.classes != IMAGENET_CLASSES:
        raise UserError(
            f"{relative(root)} has {data.classes} classes, imagenet has {IMAGENET_CLASSES}; for "
            'images of your own write use = "image-folder"'
        )
    return data
