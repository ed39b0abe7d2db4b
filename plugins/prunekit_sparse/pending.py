"""An activation that is not computed yet, because what comes next may go into the same pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from prunekit.errors import RunError

Finish = Callable[[Tensor | None, bool], Tensor]
"""finish(residual, relu): compute it, with what is to be added, and whether a ReLU follows."""


class Fold(Protocol):
    """What computes a convolution and scale * . + shift of its channels (O,) in one."""

    def __call__(self, scale: Tensor, shift: Tensor) -> Finish: ...


class Pending(Tensor):
    """Looks like a float32 tensor (N, C, H, W), and becomes one when it is asked for its values."""

    @staticmethod
    def __new__(cls, shape: Any, *args: Any, **kwargs: Any) -> Pending:
        wanted = torch.is_grad_enabled()
        made: Pending = Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.float32, requires_grad=wanted
        )
        if wanted:
            with torch._C.DisableTorchFunctionSubclass():
                made.register_hook(_lose)  # type: ignore[no-untyped-call]
        return made

    def __init__(
        self, shape: Any, finish: Finish, reads: tuple[Tensor | None, ...], fold: Fold | None = None
    ) -> None:
        self.finish: Finish | None = finish
        self.fold = fold
        self.reads = [t for t in reads if t is not None]
        self.residual: Tensor | None = None
        self.clipped = False
        self.value: Tensor | None = None

    @property
    def open(self) -> bool:
        """Whether nothing follows it yet."""
        return self.value is None and self.residual is None and not self.clipped

    def settle(self) -> Tensor:
        """Its values (N, C, H, W)."""
        if self.value is None:
            assert self.finish is not None
            self.value = self.finish(self.residual, self.clipped)
            self.finish = self.fold = self.residual = None
            self.reads = []
        return self.value

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(settle, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RunError(LOST)


LOST = (
    "this network hands an activation to code that torch's functions do not see (an autograd "
    'Function, a scripted module); write sparse = "off" in [compute]'
)


def _lose(gradient: Tensor) -> None:
    """A gradient came to a tensor that has none: it would be lost."""
    raise RunError(LOST)


def settle(x: Any) -> Any:
    """The values of what is pending; anything else as it is."""
    return x.settle() if isinstance(x, Pending) else x


def _looks() -> Iterator[Callable[..., Any]]:
    """Functions that ask for no values."""
    yield from (Tensor.dim, Tensor.size, Tensor.numel, Tensor.__len__, Tensor.is_floating_point)
    yield from (Tensor.ndimension, Tensor.nelement, Tensor.is_complex)
    for name in ("shape", "ndim", "dtype", "device", "layout", "is_cuda"):
        yield getattr(Tensor, name).__get__


LOOKS = frozenset(_looks())
