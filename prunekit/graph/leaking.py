"""Gates that let a little through, where a removed channel lets nothing: is it one function?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunekit.graph.channels import align
from prunekit.graph.looking import Look, undisturbed

LEAK = 1e-6
"""What a removed channel lets through while scores are learned.

Exactly nothing would meet the zero derivative of a ReLU at 0, and no removed channel could ever
come back.
"""
TOLERATED = 0.01
"""How much of the largest entry of a tensor may be due to the leak."""

Gates = Mapping[str, tuple[int, Tensor]]
"""Module -> (dimension of channels in its output, the unit of each, -1 where it has none)."""


class _Told(Look):
    """Tells of each tensor of floats that an operator makes: its name, and the tensor."""

    def __init__(self, tell: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.strip("_")
        # What is empty holds anything.
        for tensor in tree_leaves(out) if not func.is_view and "empty" not in name else ():
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                self._tell(name, tensor)
        return out


def find_leaks(model: nn.Module, example: Tensor, groups: Sequence[Gates]) -> dict[int, str]:
    """Number of a group -> the operator that makes much of what its closed gates let through.

    One that looks at no scale does: a sign, a normalization by statistics of the image. `groups`
    have the unit of each channel behind modules. Every other unit is closed, to nothing and to
    `LEAK`, on a random image of the shape of `example` (1, C, H, W), in evaluation mode.
    """
    image = torch.rand(example.shape, generator=torch.Generator().manual_seed(0)).to(example)

    def look(closed: Collection[int], value: float, tell: Callable[[str, Tensor], None]) -> None:
        modules, hooks = dict(model.named_modules()), []
        try:
            for number, group in enumerate(groups):
                for name, (dim, units) in group.items():
                    shut = (units % 2 == 1) & (units > 0) & (number in closed)
                    gate = partial(_multiply, dim, torch.ones(len(units)).masked_fill(shut, value))
                    hooks.append(modules[name].register_forward_hook(gate))
            with undisturbed(model), _Told(tell):
                model(image)
        finally:
            for hook in hooks:
                hook.remove()

    def find(closed: Collection[int]) -> str:
        zeros: list[Tensor] = []
        look(closed, 0, lambda _, made: zeros.append(made.clone()))
        expected, found = iter(zip(zeros, sizes, strict=False)), list[str]()

        def compare(name: str, made: Tensor) -> None:
            zero, size = next(expected, (made, 0.0))
            same = zero.shape == made.shape
            apart = torch.where(zero == made, 0, zero - made) if same else made.new_ones(1)
            # What is nothing with open gates, behind a ReLU, may be something with closed ones.
            size = max(size, float(zero.abs().max()))
            if not found and not float(apart.abs().max()) <= TOLERATED * size:
                found.append(name)

        look(closed, LEAK, compare)
        return found[0] if found else ""

    sizes: list[float] = []
    if not groups:
        return {}
    look((), 1, lambda _, made: sizes.append(float(made.nan_to_num(torch.inf).abs().max())))
    leaks: dict[int, str] = {}
    if find(range(len(groups))):
        for number in range(len(groups)):
            # Beside those that are known to be good: two may leak only together.
            if name := find({*range(number + 1)} - leaks.keys()):
                leaks[number] = name
    return leaks


def _multiply(dim: int, factor: Tensor, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """The forward hook of a module with a gate: a factor (C,) along a dimension of its output."""
    return output * align(factor.to(output), output, dim)
