"""How the network's operators run: each takes what torch's takes, or gives None and leaves it to
torch.

`running` is the mode that saw the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunekit_sparse.index import Geometry
from prunekit_sparse.memory import is_inner
from prunekit_sparse.pending import Finish, Pending, settle

if TYPE_CHECKING:
    from prunekit_sparse.running import Running


def _layers() -> Any:
    """Imported for the first layer that is sparse: numba takes a second."""
    from prunekit_sparse import layers

    return layers


def _fits(x: Any) -> bool:
    """Whether it is an activation that kernels can take."""
    return isinstance(x, Tensor) and x.dtype == torch.float32 and x.device.type == "cpu"


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, *rest = value
    return first, rest[0] if rest else first


def conv2d(
    running: Running,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    if input.dim() != 4 or not (_fits(input) and _fits(weight)):
        return None
    n, c, h, w = input.shape
    rows, columns = _pair(stride)
    if isinstance(padding, str) or groups != 1 or rows != columns:
        asked = f"padding {padding!r}" if isinstance(padding, str) else f"stride {(rows, columns)}"
        running.leave(weight, f"{groups} groups" if groups != 1 else asked)
        return None
    o, _, kh, kw = weight.shape
    geometry = Geometry(c, h, w, o, (kh, kw), rows, _pair(padding), _pair(dilation))
    index = running.find(weight, geometry, n)
    if index is None:
        return None
    x = settle(input)
    own, kept_only = running.own(weight), running.is_kept_only(weight)

    def begin(bias: Tensor | None, scale: Tensor | None = None) -> Finish:
        def finish(residual: Tensor | None, relu: bool) -> Tensor:
            made: Tensor = _layers().Convolution.apply(
                x, own, bias, residual, scale, index, relu, kept_only
            )
            return made

        return finish

    def fold(scale: Tensor, shift: Tensor) -> Finish:
        return begin(shift if bias is None else shift + bias * scale, scale)

    foldable = fold if bias is None or not bias.requires_grad else None
    return running.wait(Pending((n, o, *geometry.out), begin(bias), (x, own, bias), foldable))


def linear(
    running: Running, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    if input.dim() != 2 or not (_fits(input) and _fits(weight)):
        return None
    geometry = Geometry(weight.shape[1], 1, 1, len(weight))
    index = running.find(weight, geometry, len(input))
    if index is None:
        return None
    x = settle(input)[:, :, None, None]
    kept_only = running.is_kept_only(weight)
    y: Tensor = _layers().Convolution.apply(
        x, running.own(weight), bias, None, None, index, False, kept_only
    )
    return y[:, :, 0, 0]


def batch_norm(
    running: Running,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if not isinstance(input, Pending) or not input.open:
        return None
    if not training:
        if input.fold is None or running_mean is None or running_var is None:
            return None
        if any(p is not None and p.requires_grad for p in (weight, bias)):
            return None
        scale = (running_var + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -running_mean * scale if bias is None else bias - running_mean * scale
        reads = (*input.reads, running_mean, running_var, weight, bias)
        return running.wait(Pending(input.shape, input.fold(scale, shift), reads))
    if weight is None or bias is None:
        return None
    x = settle(input)
    count = x.numel() // x.shape[1]
    if count < 2:
        return None

    counted = False

    def finish(residual: Tensor | None, relu: bool) -> Tensor:
        nonlocal counted
        y, mean, variance = _layers().Normalization.apply(x, weight, bias, residual, relu, eps)
        if running_mean is not None and running_var is not None and not counted:
            counted = True
            with torch.no_grad():
                running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
                unbiased = variance * (count / (count - 1))
                running_var.mul_(1 - momentum).add_(unbiased, alpha=momentum)
        made: Tensor = y
        return made

    return running.wait(Pending(x.shape, finish, (x, weight, bias, running_mean, running_var)))


def relu(running: Running, input: Tensor, inplace: bool = False) -> Tensor | None:
    if not isinstance(input, Pending) or input.finish is None or input.clipped:
        return None
    if inplace:
        input.clipped = True
        return input
    # Not kept: what is pending may still be asked for without the ReLU.
    return input.finish(input.residual, True)


def relu_(running: Running, input: Tensor) -> Tensor | None:
    return relu(running, input, inplace=True)


def add(
    running: Running, input: Any, other: Any, *, alpha: Any = 1, out: Any = None
) -> Tensor | None:
    if alpha != 1 or out is not None:
        return None
    for one, two in ((input, other), (other, input)):
        if _takes(one, two):
            found = Pending(one.shape, one.finish, tuple(one.reads))
            found.residual = settle(two)
            found.reads.append(found.residual)
            return running.wait(found)
    return None


def add_(running: Running, input: Any, other: Any, *, alpha: Any = 1) -> Tensor | None:
    if alpha != 1 or not _takes(input, other):
        return None
    input.residual = settle(other)
    input.reads.append(input.residual)
    made: Tensor = input
    return made


def _takes(one: Any, two: Any) -> bool:
    """Whether the pass that computes `one` can add `two`."""
    if not (isinstance(one, Pending) and one.open and one.finish is not None):
        return False
    return two is not one and _fits(two) and two.shape == one.shape


def max_pool2d(
    running: Running,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    if ceil_mode or return_indices or not _lies_inner(input):
        return None
    sizes = [_pair(kernel_size), _pair(stride or kernel_size), _pair(padding)]
    if _pair(dilation) != (1, 1) or any(a != b for a, b in sizes) or sizes[0][0] > 15:
        return None
    made: Tensor = _layers().MaxPooling.apply(settle(input), *(a for a, _ in sizes))
    return made


def avg_pool2d(
    running: Running,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor | None:
    k = _pair(kernel_size)
    if divisor_override or _pair(padding) != (0, 0) or _pair(stride or kernel_size) != k:
        return None
    h, w = input.shape[-2:]
    return _average(input, h // k[0], w // k[1]) if (h % k[0], w % k[1]) == (0, 0) else None


def adaptive_avg_pool2d(running: Running, input: Tensor, output_size: Any) -> Tensor | None:
    p, q = _pair(output_size)
    h, w = input.shape[-2:]
    if p is None or q is None or h % p or w % q:
        return None
    return _average(input, p, q)


def _average(input: Tensor, p: int, q: int) -> Tensor | None:
    """Means of equal windows, which torch's own pooling would copy first."""
    if not _lies_inner(input):
        return None
    x = settle(input)
    n, c, h, w = x.shape
    found: Tensor = x.view(n, c, p, h // p, q, w // q).mean((3, 5))
    return found


def _lies_inner(x: Tensor) -> bool:
    return isinstance(x, Pending) or (_fits(x) and x.dim() == 4 and is_inner(x))


OPERATORS: dict[Any, Callable[..., Tensor | None]] = {
    torch.conv2d: conv2d,
    F.linear: linear,
    F.batch_norm: batch_norm,
    F.relu: relu,
    torch.relu: relu,
    Tensor.relu: relu,
    torch.relu_: relu_,
    Tensor.relu_: relu_,
    torch.add: add,
    Tensor.add: add,
    Tensor.__add__: add,
    Tensor.__radd__: add,
    Tensor.add_: add_,
    Tensor.__iadd__: add_,
    F.max_pool2d: max_pool2d,
    torch.max_pool2d: max_pool2d,
    F.avg_pool2d: avg_pool2d,
    F.adaptive_avg_pool2d: adaptive_avg_pool2d,
}
"""Function of torch -> what runs in its place."""
