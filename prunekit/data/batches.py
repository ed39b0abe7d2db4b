"""Images in memory as uint8, batched, cropped and flipped where they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunekit.contracts import Augmenting, Data, Split
from prunekit.data import seeds
from prunekit.errors import UserError


@dataclass(frozen=True)
class Arrays:
    """A split in memory: uint8 images (N, C, H, W), int64 labels (N,).

    Images that are only judged may be floats in [0, 1].
    """

    images: Tensor
    labels: Tensor

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        if indices:
            # Moved together: a copy for each batch would have the device wait.
            sizes = [len(index) for index in indices]
            for index in move(torch.cat(list(indices)), self.images.device).split(sizes):
                yield self.images[index]


@dataclass(frozen=True)
class Subset:
    """The images of another split that `index` (M,) names, in that order."""

    split: Split
    index: Tensor
    labels: Tensor

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        return self.split.batches([self.index[index] for index in indices])


@dataclass(frozen=True)
class AugmentingSubset(Subset):
    """A subset of a split that augments where it decodes."""

    def augmented_batches(
        self, indices: Sequence[Tensor], names: Sequence[str], batch_seeds: Sequence[int]
    ) -> Iterator[Tensor]:
        inner: Any = self.split
        chosen = [self.index[index] for index in indices]
        streamed: Iterator[Tensor] = inner.augmented_batches(chosen, names, batch_seeds)
        return streamed


def subset(split: Split, index: Tensor) -> Split:
    """A part of a split; arrays are copied, so that what is left out frees its memory."""
    if isinstance(split, Arrays):
        return Arrays(split.images[index], split.labels[index])
    return (AugmentingSubset if isinstance(split, Augmenting) else Subset)(
        split, index, split.labels[index]
    )


def to_device(split: Split, device: torch.device) -> Split:
    """Move a split that is in memory to the device; one that streams stays where it is."""
    if isinstance(split, Arrays):
        return Arrays(split.images.to(device), split.labels)
    return split


def hold_out(split: Split, fraction: float, part: float, seed: int) -> tuple[Split, Split]:
    """(training part, validation part): `fraction` of all images is used, `part` of it held out.

    The choice depends on `seed` alone, never on the run's seed: runs of a sweep share it.

    Raises `UserError` where one of the parts would be empty.
    """
    n = len(split.labels)
    order = torch.randperm(n, generator=seeds.generator(seed, "hold-out"))
    order = order[: round(fraction * n)]
    held = round(part * len(order))
    if held == len(order) or (part and not held):
        raise UserError(
            f"validation = {part} of {len(order)} training images leaves {len(order) - held} to "
            f"train on and {held} to validate with; give a part that leaves some of each"
        )
    # Sorted, so that the part of a small set is a subset in its own order.
    return subset(split, order[held:].sort().values), subset(split, order[:held].sort().values)


def fingerprint(data: Data) -> str:
    """SHA-256 over the images and labels of both parts, or what the data set says of itself."""
    if data.fingerprint:
        return data.fingerprint
    digest = hashlib.sha256()
    for split in (data.train, data.test):
        if not isinstance(split, Arrays):
            raise UserError("a data set that is not in memory must give its own fingerprint")
        digest.update(str(tuple(split.images.shape)).encode())
        digest.update(split.images.contiguous().cpu().numpy().tobytes())
        digest.update(split.labels.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def move(values: Tensor, device: torch.device | str) -> Tensor:
    """On the device. A GPU goes on with its work meanwhile: for that, memory has to be pinned."""
    if torch.device(device).type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def to_pixels(images: Tensor, device: torch.device | str) -> Tensor:
    """uint8 (B, C, H, W), or floats in [0, 1] -> float32 in [0, 1] on the device."""
    moved = move(images, device)
    return moved.float() if moved.is_floating_point() else moved.float().div_(255)


def augment(images: Tensor, names: Sequence[str], generator: torch.Generator) -> Tensor:
    """Augment uint8 images (B, C, H, W), each in its own way, where they lie.

    "crop" pads by an eighth of the height with zeros and crops back at random; "flip" mirrors left
    and right with probability 1/2. Offsets are drawn on the CPU from `generator`, so that they do
    not depend on the device.

    Raises `UserError` for "resized-crop", which only splits that decode files can do.
    """
    if "resized-crop" in names:
        raise UserError('augment "resized-crop" is for images that stream from files; write "crop"')
    device = images.device
    if "crop" in names:
        b, _, h, w = images.shape
        pad = max(h // 8, 1)
        rows = move(torch.randint(2 * pad + 1, (b,), generator=generator), device)
        columns = move(torch.randint(2 * pad + 1, (b,), generator=generator), device)
        # (B, C, 2 pad + 1, 2 pad + 1, H, W): a view of all windows, of which one each is copied.
        windows = F.pad(images, (pad, pad, pad, pad)).unfold(2, h, 1).unfold(3, w, 1)
        images = windows[torch.arange(b, device=device), :, rows, columns]
    if "flip" in names:
        flips = move(torch.rand(len(images), generator=generator) < 0.5, device)
        images = torch.where(flips[:, None, None, None], images.flip(3), images)
    return images.contiguous()


@dataclass(frozen=True)
class Extra:
    """A second source of training images: `ratio` of them join each labeled one of a batch, or they
    take the place of a `fraction` of its images, of all but one at most."""

    split: Split
    ratio: float = 1.0
    fraction: float | None = None

    def count(self, size: int) -> tuple[int, int]:
        """(labeled images, extra images) of a batch of that size."""
        if self.fraction is None:
            return size, round(self.ratio * size)
        extra = min(round(self.fraction * size), size - 1)
        return size - extra, extra

    def indices(self, counts: Sequence[int], seed: int) -> list[Tensor]:
        """The extra images of batches with that many of them: shuffled, round after round."""
        n = len(self.split.labels)
        rounds = -(-sum(counts) // n)
        order = [torch.empty(0, dtype=torch.int64)]
        for number in range(rounds):
            order.append(torch.randperm(n, generator=seeds.generator(seed, "extra", number)))
        return list(torch.cat(order)[: sum(counts)].split(counts))


@dataclass(frozen=True)
class Feed:
    """The batches that a stage trains on and is validated with, (x, y) on the device.

    `augment` names augmentations; `limit` is the most batches of a pass (smoke), and `judged` the
    most validation images.
    """

    train: Split
    validation: Split
    size: int
    device: torch.device
    augment: tuple[str, ...] = ()
    extra: Extra | None = None
    limit: int | None = None
    judged: int | None = None

    def count(self) -> int:
        """Batches of an epoch, without a last one of a single image: batch normalization fails."""
        n = len(self.train.labels)
        return _limit(n // self.size + (n % self.size > 1), self.limit)

    def count_validation(self) -> int:
        images = _limit(len(self.validation.labels), self.judged)
        return _limit(-(-images // self.size), self.limit)

    def epoch(self, seed: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of shuffled, augmented batches, decided by `seed`: a pass over `train`, or as
        many images where a fraction of each batch is `extra`.

        Images of `extra` come behind those of each batch. `skip` leaves out the first batches (of
        a resumed epoch) and changes nothing in the others.
        """
        order = torch.randperm(len(self.train.labels), generator=seeds.generator(seed, "order"))
        chunks = list(order.split(self.size)[: self.count()])
        sources = [(self.train, chunks, "augment")]
        if self.extra is not None:
            counts = [self.extra.count(len(chunk)) for chunk in chunks]
            own = [chunk[:n] for chunk, (n, _) in zip(chunks, counts, strict=True)]
            indices = self.extra.indices([n for _, n in counts], seed)
            sources = [
                (self.train, own, "augment"),
                (self.extra.split, indices, "augment-extra"),
            ]
        streams = []
        for source, chosen, word in sources:
            drawn = [seeds.derive_seed(seed, word, n) for n in range(skip, len(chosen))]
            streams.append(_augmented(source, chosen[skip:], self.augment, drawn))
        for number, images in enumerate(zip(*streams, strict=True), start=skip):
            labels = [source.labels[chosen[number]] for source, chosen, _ in sources]
            x = torch.cat([move(part, self.device) for part in images]) if self.extra else images[0]
            yield to_pixels(x, self.device), move(torch.cat(labels), self.device)

    def validate(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The validation images in their own order, or some of them, evenly spaced."""
        index = spread(len(self.validation.labels), self.judged)
        return islice(eval_batches(self.validation, self.size, self.device, index), self.limit)


def spread(n: int, images: int | None) -> Tensor:
    """Indices of so many of n images, evenly spaced; of all for None, or more than there are.

    The first ones would be of a few classes where a data set is sorted.
    """
    images = _limit(n, images)
    return torch.arange(images) * n // max(images, 1)


def _limit(n: int, limit: int | None) -> int:
    return n if limit is None else min(n, limit)


def _augmented(
    split: Split, indices: Sequence[Tensor], names: Sequence[str], batch_seeds: Sequence[int]
) -> Iterator[Tensor]:
    """Augmented uint8 batches; a split that streams may do it where it decodes."""
    if names and isinstance(split, Augmenting):
        yield from split.augmented_batches(indices, names, batch_seeds)
        return
    for images, seed in zip(split.batches(indices), batch_seeds, strict=True):
        yield augment(images, names, torch.Generator().manual_seed(seed))


def eval_batches(
    split: Split, size: int, device: torch.device, index: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in their own order, or those of `index` (M,), as batches (x, y) on the device."""
    chunks = list((torch.arange(len(split.labels)) if index is None else index).split(size))
    for index, batch in zip(chunks, split.batches(chunks), strict=True):
        yield to_pixels(batch, device), move(split.labels[index], device)
