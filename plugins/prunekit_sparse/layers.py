"""Layers on the kernels, differentiable: convolution, normalization, pooling.

Activations are float32 (N, C, H, W) with images innermost; others are copied. A gradient that is
itself to be differentiated is computed by torch's operators, on all weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from prunekit_sparse import loops, pixels
from prunekit_sparse.index import Index, Part
from prunekit_sparse.memory import Array, empty, flat, inner, share

NONE = np.empty(0, np.float32)


def differentiate(
    plain: Callable[..., Tensor], inputs: Sequence[Tensor | None], gradient: Tensor
) -> list[Tensor | None]:
    """The gradients of plain(*inputs) at the inputs that take one, to be differentiated again."""
    y = plain(*inputs)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True, allow_unused=True))
    return [None if x is None or not x.requires_grad else next(found) for x in inputs]


class Convolution(torch.autograd.Function):
    """max(0, scale * conv(x, w) + bias + residual) on the kept weights of an index.

    `scale` (O,) and `residual` may be None, max(0, .) is for `relu`. With `kept_only`, removed
    weights get a gradient of zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        scale: Tensor | None,
        index: Index,
        relu: bool,
        kept_only: bool,
    ) -> Tensor:
        ctx.index, ctx.relu, ctx.kept_only, ctx.scale = index, relu, kept_only, scale
        given, x, g = x, inner(x), index.geometry
        values = index.values
        if scale is not None:
            values = values * scale.numpy()[index.outputs]
        y = empty((len(x), g.outputs, *g.out))
        start = np.zeros(g.outputs, np.float32) if bias is None else bias.detach().numpy()
        other = NONE if residual is None else flat(inner(residual))
        _convolve(index.forward, x, y, values, (g.stride, 1), start, other, relu)
        ctx.values = values
        ctx.save_for_backward(given, weight, bias, residual, y if relu else None)
        return y

    @staticmethod
    def plain(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, other: Any) -> Tensor:
        """The same by torch's operators."""
        g = ctx.index.geometry
        weight = weight.view(g.outputs, g.channels, *g.kernel)
        if ctx.scale is not None:
            weight = weight * ctx.scale.view(-1, 1, 1, 1)
        y = F.conv2d(x, weight, bias, g.stride, g.padding, g.dilation)
        y = y if other is None else y + other
        return y.relu() if ctx.relu else y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, bias, residual, y = ctx.saved_tensors
        if torch.is_grad_enabled():
            parts = (x, weight, bias, residual)
            plain = lambda *own: Convolution.plain(ctx, *own)  # noqa: E731
            return *differentiate(plain, parts, gradients[0]), None, None, None, None
        index: Index = ctx.index
        g, (for_x, for_weight, for_bias, for_residual, *_) = index.geometry, ctx.needs_input_grad
        dz = _through_relu(inner(gradients[0]), y)
        dx = dw = None
        if for_x:
            dx = empty(x.shape)
            none = np.zeros(g.channels, np.float32)
            for part in index.backward:
                _convolve(part, dz, dx, ctx.values, (1, g.stride), none, NONE, False)
        if for_weight:
            own = dz if ctx.scale is None else dz * ctx.scale.view(-1, 1, 1)
            correlate = _correlate if ctx.kept_only else _correlate_all
            dw = correlate(index, inner(x), own).view_as(weight)
        db = dz.sum((0, 2, 3)) if for_bias else None
        return dx, dw, db, dz if for_residual else None, None, None, None, None


def _convolve(
    part: Part,
    x: Tensor,
    y: Tensor,
    values: Array,
    strides: tuple[int, int],
    bias: Array,
    residual: Array,
    relu: bool,
) -> None:
    """`loops.convolve` over all rows of a part; `values` are those of all kept weights."""
    (n, _, h, w), (_, o, p, q), (rows, columns) = x.shape, y.shape, part.grid
    own = values[part.entries]
    sizes = (h, w, o, p, q, n, columns, *strides, *part.phase, span_of(n, columns))
    args = (flat(x), flat(y), part.ptr, part.places, own, part.shifts, bias, residual, relu, sizes)
    work = rows * columns * n * (len(own) + o)
    share(lambda begin, end: loops.convolve(*args, begin, end), rows, work)


def span_of(images: int, columns: int) -> int:
    """Columns to compute at a time: what is written should stay in the first cache."""
    return max(1, min(columns, 4096 // images))


def _correlate(index: Index, x: Tensor, dz: Tensor) -> Tensor:
    """The gradient of kept weights, and zero for the others; flat."""
    g, part = index.geometry, index.forward
    found = np.empty(len(part.entries), np.float32)
    sizes = (g.height, g.width, g.outputs, *g.out, len(x), g.stride)
    args = (flat(x), flat(dz), found, part.ptr, part.places, part.shifts, sizes)
    work = len(found) * g.out[0] * g.out[1] * len(x)
    share(lambda begin, end: loops.correlate(*args, begin, end), g.outputs, work)
    dw = torch.zeros(g.weights)
    dw.numpy()[index.positions[part.entries]] = found
    return dw


def _correlate_all(index: Index, x: Tensor, dz: Tensor) -> Tensor:
    """The gradient of all weights."""
    g = index.geometry
    if g.taps == 1 and (g.height, g.width) == g.out == (1, 1) and g.padding == (0, 0):
        return dz.flatten(1).t() @ x.flatten(1)
    shape = (g.outputs, g.channels, *g.kernel)
    own = (g.stride, g.padding, g.dilation)
    return conv2d_weight(x.contiguous(), shape, dz.contiguous(), *own)  # type: ignore[no-any-return]


def _through_relu(dy: Tensor, y: Tensor | None) -> Tensor:
    """The gradient before a ReLU with output y; dy itself where there was none."""
    if y is None:
        return dy
    dz = empty(y.shape)
    args = flat(dy), flat(y), flat(dz)
    share(lambda a, b: pixels.clip_gradient(*args, a, b), dy.numel(), dy.numel())
    return dz


class Normalization(torch.autograd.Function):
    """max(0, batch normalization of x + residual) by the batch's statistics; mean and variance.

    The variance is the biased one. `residual` may be None, max(0, .) is for `relu`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        residual: Tensor | None,
        relu: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given, x = x, inner(x)
        y, c = empty(x.shape), x.shape[1]
        mean, inverse, variance = (torch.empty(c) for _ in range(3))
        other = NONE if residual is None else flat(inner(residual))
        affine = (gamma.detach().numpy(), beta.detach().numpy())
        found = (mean.numpy(), inverse.numpy(), variance.numpy())
        args = (flat(x), flat(y), *affine, other, relu, *found, x.numel() // c, eps)
        share(lambda a, b: pixels.normalize(*args, a, b), c, x.numel())
        ctx.relu, ctx.eps = relu, eps
        ctx.save_for_backward(given, gamma, beta, residual, mean, inverse, y if relu else None)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, gamma, beta, residual, mean, inverse, y = ctx.saved_tensors
        if torch.is_grad_enabled():

            def plain(x: Tensor, gamma: Tensor, beta: Tensor, other: Tensor | None) -> Tensor:
                z = F.batch_norm(x, None, None, gamma, beta, True, 0, ctx.eps)
                z = z if other is None else z + other
                return z.relu() if ctx.relu else z

            parts = (x, gamma, beta, residual)
            return *differentiate(plain, parts, gradients[0]), None, None
        dz = _through_relu(inner(gradients[0]), y)
        dx, dgamma, dbeta = empty(x.shape), torch.empty_like(mean), torch.empty_like(mean)
        c = len(mean)
        own = (flat(inner(x)), flat(dz), flat(dx), gamma.detach().numpy())
        found = (dgamma.numpy(), dbeta.numpy(), x.numel() // c)
        args = (*own, mean.numpy(), inverse.numpy(), *found)
        share(lambda a, b: pixels.normalize_backward(*args, a, b), c, x.numel())
        return dx, dgamma, dbeta, dz if ctx.needs_input_grad[3] else None, None, None


class MaxPooling(torch.autograd.Function):
    """Max pooling of square windows; of equal pixels the first gets the gradient, as in torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
        given, x = x, inner(x)
        n, c, h, w = x.shape
        p, q = ((d + 2 * padding - kernel) // stride + 1 for d in (h, w))
        y = empty((n, c, p, q))
        chosen = np.empty(y.numel(), np.uint8)
        sizes = (h, w, p, q, n, kernel, stride, padding)
        args = (flat(x), flat(y), chosen, sizes)
        share(lambda a, b: pixels.pool(*args, a, b), c, x.numel())
        ctx.chosen, ctx.sizes = chosen, sizes
        ctx.save_for_backward(given)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = lambda x: F.max_pool2d(x, *ctx.sizes[-3:])  # noqa: E731
            return *differentiate(plain, (x,), gradients[0]), None, None, None
        dx = empty(x.shape).zero_()
        args = (flat(inner(gradients[0])), ctx.chosen, flat(dx), ctx.sizes)
        share(lambda a, b: pixels.pool_backward(*args, a, b), x.shape[1], x.numel())
        return dx, None, None, None
