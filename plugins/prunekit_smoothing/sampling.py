"""What a network says of noisy copies of images. Noise is drawn by counting, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit import derive_seed
from prunekit_smoothing import CHUNK

NO_CLASS = -1
"""What an output that is not a number votes for."""


@dataclass(frozen=True)
class Chunk:
    """`size` samples of an image: chunk `number` of those that serve a purpose."""

    row: int
    """Of the image in the tensor that is sampled from."""
    image: int
    """Its number in the whole evaluation."""
    number: int
    size: int


@dataclass(frozen=True)
class Sampler:
    """Classes that the network gives x + N(0, sigma^2), not clamped.

    The noise of a chunk follows from the seed, the purpose, the image's number and the chunk's:
    whatever was sampled before, and with what else, a chunk comes out the same. (On a CPU torch
    takes 32 bits of a seed. That two of an image's hundred chunks share theirs has a probability
    of 1e-6, small against the certificate's alpha.)
    """

    model: nn.Module
    sigma: float
    seed: int
    batch: int

    @property
    def together(self) -> int:
        """Chunks in a forward pass."""
        return max(1, self.batch // CHUNK)

    def sample(
        self, x: Tensor, chunks: Sequence[Chunk], purpose: str
    ) -> Iterator[list[tuple[Chunk, Tensor]]]:
        """Chunks with the classes (size,) of their samples, on the CPU, as forward passes end.

        Images x are (B, C, H, W); a forward pass takes `batch` noisy ones at most.
        """
        for start in range(0, len(chunks), self.together):
            part = chunks[start : start + self.together]
            sizes = [chunk.size for chunk in part]
            noisy = x.new_empty(sum(sizes), *x.shape[1:])
            for chunk, images in zip(part, noisy.split(sizes), strict=True):
                seed = derive_seed(self.seed, "certify", purpose, chunk.image, chunk.number)
                generator = torch.Generator(x.device).manual_seed(seed)
                images.normal_(0, self.sigma, generator=generator).add_(x[chunk.row])
            classes = torch.cat([self.classify(images) for images in noisy.split(self.batch)])
            yield list(zip(part, classes.cpu().split(sizes), strict=True))

    def classify(self, noisy: Tensor) -> Tensor:
        """Classes (B,) int64; `NO_CLASS` where a logit is not a number."""
        logits = self.model(noisy)
        return logits.argmax(1).masked_fill(logits.isnan().any(1), NO_CLASS)
