"""Masks whose gradient goes straight through to what they follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: Tensor, soft: Tensor) -> Tensor:
        return mask.to(soft.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def straight_through(mask: Tensor, soft: Tensor) -> Tensor:
    """The bool `mask` as numbers, its gradient going straight through to `soft`; shapes are equal.

    With w_eff = w * straight_through(mask, |s|): ds = dL/dw_eff * w * sign(s) (HYDRA, section 3).

    >>> soft = torch.tensor([0.2, 0.9], requires_grad=True)
    >>> straight_through(torch.tensor([False, True]), soft).sum().backward()
    >>> soft.grad
    tensor([1., 1.])
    """
    through: Tensor = _StraightThrough.apply(mask, soft)
    return through


BLOCK = 65_536
"""On a CPU, so many signs are made at once: fresh memory for all costs more than the products."""


class MaskedWeight(torch.autograd.Function):
    """w * straight_through(mask, |s| + rate), without the tensors in between."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, mask: Tensor, score: Tensor, rate: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(weight, score)
        ctx.shape = None if rate is None else rate.shape
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor, Tensor | None]:
        weight, score = ctx.saved_tensors
        soft = gradients[0] * weight
        rate = None if ctx.shape is None else soft.sum_to_size(ctx.shape)
        if torch.is_grad_enabled():  # it is differentiated itself
            return None, None, soft * score.sign(), rate
        rows = max(BLOCK * len(soft) // soft.numel(), 1) if soft.device.type == "cpu" else len(soft)
        for part, some in zip(soft.split(rows), score.split(rows), strict=True):
            part.mul_(some.sign())
        return None, None, soft, rate
