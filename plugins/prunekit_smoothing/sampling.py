"""The classes that a network assigns to noisy copies of images.

Noise is drawn in chunks, each from its own seed, so it does not depend on the order of sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit import derive_seed
from prunekit_smoothing import CHUNK

NO_CLASS = -1
"""The class of an output with NaN or infinity."""


@dataclass(frozen=True)
class Chunk:
    """`size` samples of an image: the chunk `number` of those drawn for one purpose."""

    row: int
    """Row of the image in the tensor that is sampled from."""
    image: int
    """Number of the image in the whole evaluation."""
    number: int
    size: int


@dataclass(frozen=True)
class Sampler:
    """The classes that the network assigns to x + N(0, sigma^2), in pixel units, not clamped.

    The noise of a chunk depends only on the seed, the purpose, the image's number and the chunk's
    number, not on what was sampled before or in the same forward pass. (On a CPU, torch uses only
    32 bits of a seed. The probability that two of an image's hundred chunks share a seed is 1e-6,
    small compared with the certificate's alpha.)
    """

    model: nn.Module
    sigma: float
    seed: int
    batch: int

    @property
    def together(self) -> int:
        """Number of chunks in a forward pass."""
        return max(1, self.batch // CHUNK)

    def sample(
        self, x: Tensor, chunks: Sequence[Chunk], purpose: str
    ) -> Iterator[list[tuple[Chunk, Tensor]]]:
        """Yields after each forward pass its chunks with the classes (size,) of their samples.

        Images x are (B, C, H, W); a forward pass has at most `batch` noisy images; classes are on
        the CPU.
        """
        for start in range(0, len(chunks), self.together):
            part = chunks[start : start + self.together]
            sizes = [chunk.size for chunk in part]
            noisy = x.new_empty(sum(sizes), *x.shape[1:])
            for chunk, images in zip(part, torch.split(noisy, sizes), strict=True):
                seed = derive_seed(self.seed, "certify", purpose, chunk.image, chunk.number)
                generator = torch.Generator(x.device).manual_seed(seed)
                images.normal_(0, self.sigma, generator=generator).add_(x[chunk.row])
            classes = torch.cat(
                [self.classify(images) for images in torch.split(noisy, self.batch)]
            )
            yield list(zip(part, torch.split(classes.cpu(), sizes), strict=True))

    def classify(self, noisy: Tensor) -> Tensor:
        """Classes (B,) int64 of noisy images (B, C, H, W); `NO_CLASS` if a logit is no number."""
        logits: Tensor = self.model(noisy)
        return logits.argmax(1).masked_fill(~logits.isfinite().all(1), NO_CLASS)
