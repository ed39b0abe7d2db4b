"""Randomness by counting: every generator is seeded from what is about to be done.

Nothing random is ever stored, so nothing random can be restored wrongly: a step draws the same
numbers whether the run came to it without a break or was resumed right before it.
"""

from __future__ import annotations

import random
from hashlib import blake2b

import numpy as np
import torch


def derive_seed(*what: int | str) -> int:
    """A seed of 63 bits for what is named, for example (run seed, stage, epoch, step).

    >>> derive_seed(0, "order", 1) == derive_seed(0, "order", 1) != derive_seed(0, "order", 2)
    True
    """
    return int.from_bytes(blake2b(repr(what).encode(), digest_size=8).digest(), "big") >> 1


def seed_all(*what: int | str) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices) for what is named."""
    seed = derive_seed(*what)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator(*what: int | str) -> torch.Generator:
    """A CPU generator of its own for what is named."""
    return torch.Generator().manual_seed(derive_seed(*what))
