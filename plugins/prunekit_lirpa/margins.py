"""Boxes of images, and the margins that bounds over a box are about."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from prunekit.contracts import Threat
from prunekit.errors import UserError

CERTAIN = 1e-5
"""A margin counts as proved only above this value: below it, rounding could be the cause."""
UNIT = 2.0**-23
"""The distance of 1 from the next larger number in float32, in which networks are used."""


@dataclass(frozen=True)
class Box:
    """All images between `lower` and `upper`, both (B, C, H, W) in [0, 1]."""

    lower: Tensor
    upper: Tensor


def surround(x: Tensor, eps: float) -> Box:
    """The box of all images in [0, 1] within `eps` (pixel units, L-infinity) of x (B, C, H, W).

    >>> surround(torch.tensor([[[[0.5, 1.0]]]]), 0.25).upper.tolist()
    [[[[0.75, 1.0]]]]
    """
    return Box((x - eps).clamp(0, 1), (x + eps).clamp(0, 1))


def check_threat(threat: Threat | None, owner: str) -> float:
    """The radius of the threat, in pixel units.

    Raises `UserError` if there is no threat; `owner` is the name of the component in the message.
    """
    if threat is None:
        raise UserError(f'{owner} needs a radius; write [threat] with norm = "linf", eps = "2/255"')
    return threat.eps


def compare_classes(y: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (B, K - 1, K) that turn logits into margins f_y - f_j, one row per class j != y.

    Labels y are (B,); the rows are in the order of the classes.

    >>> compare_classes(torch.tensor([1]), 3).tolist()
    [[[-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]]]
    """
    unit = torch.eye(classes, dtype=dtype, device=y.device)
    rows = unit[y][:, None] - unit
    return rows[unit[y] == 0].view(len(y), classes - 1, classes)


def robust_cross_entropy(lower: Tensor) -> Tensor:
    """Mean cross-entropy of the worst logits that lower bounds of margins (B, K - 1) allow.

    The worst logits are 0 at the label and minus the bound elsewhere (Wong and Kolter, ICML 2018,
    theorem 2).
    """
    worst = F.pad(-lower, (1, 0))
    return F.cross_entropy(worst, torch.zeros(len(lower), dtype=torch.long, device=lower.device))


def is_certain(lower: Tensor, least: Tensor | float = CERTAIN) -> Tensor:
    """Whether every lower bound of a margin (B, K - 1) is above `least`: booleans (B,).

    `least` is a number, or (B,). NaN is not above it.
    """
    least = torch.as_tensor(least, dtype=lower.dtype, device=lower.device)
    return (lower > least.view(-1, 1)).all(1)


def allow_rounding(logits: Tensor, operations: int) -> Tensor:
    """The least margin (B,) that the rounding of a network in float32 does not put in doubt.

    It is `CERTAIN`, or more for large logits (B, K): each operation of the network may round by one
    part in 2^23.
    """
    return (logits.abs().amax(1) * UNIT * operations).clamp(min=CERTAIN)
