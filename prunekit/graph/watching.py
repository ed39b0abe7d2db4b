"""Which weights multiply as they are: a forward pass, watched.

A weight whose removed entries shall count has to arrive at a convolution or matrix product with its
zeros. Layers that change it on the way (weight standardization, a mean taken off, a sum of kernels)
make other kernels of it, whose entries are not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map

from prunekit.errors import lacks_memory
from prunekit.graph.looking import Look, undisturbed

CHANGED = "changed before it multiplies"
UNUSED = "reaches no product"

PRODUCTS = {
    *("mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot"),
    *("linear", "mkldnn_linear", "convolution", "_convolution", "convolution_overrideable"),
    *("_scaled_mm", "_int_mm", "embedding", "_embedding_bag", "mkldnn_rnn_layer", "_cudnn_rnn"),
    *("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "_trilinear"),
}
"""Operators that multiply matrices; looking up rows is a product with unit vectors."""
MOVES = {
    *("cat", "stack", "flip", "roll", "constant_pad_nd", "index", "index_select", "gather"),
    *("repeat", "tril", "triu", "slice_scatter", "select_scatter", "pixel_shuffle"),
}
"""Operators that only move entries, or put others beside them."""

Trace = dict[str, Tensor | None]
"""Name of a weight -> which entries of a tensor are kept ones of it; None: it says nothing."""


class _Watch(Look):
    """Follows weights, by the memory that holds them, to where they meet the images.

    Views need no rule of their own then. An entry that is removed must be zero wherever it arrives,
    whatever was done to it: that is looked at, not concluded from the operators on the way.
    """

    def __init__(self, weights: Mapping[str, Tensor], images: Sequence[Tensor]) -> None:
        super().__init__()
        self.traces: dict[StorageWeakRef, Trace] = {}
        self.lit = {_place(image) for image in images}
        """Memory whose content follows from the images."""
        self.used: set[str] = set()
        self.changed: set[str] = set()
        for name, weight in weights.items():
            self._write(weight, name, weight.detach() != 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        traced = [(t, trace) for t in inputs if (trace := self._read(t))]
        lit = any(_place(t) in self.lit for t in inputs)
        name = str(getattr(func, "overloadpacket", func)).rpartition(".")[2]
        # A product with anything else, constants included, makes another kernel.
        for tensor, trace in traced if lit else ():
            for weight, kept in trace.items():
                self._arrive(weight, tensor, kept, name in PRODUCTS)
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if name.startswith("new_") or name.endswith("_like"):
            return out  # only the shape is that of the images, or of weights
        if lit:
            self.lit |= {_place(t) for t in made}
        elif traced:
            known_places = {_place(t) for t in inputs}
            mutable = getattr(getattr(func, "_schema", None), "is_mutable", False)
            for tensor in made:
                if mutable or _place(tensor) not in known_places:
                    for weight in {w for _, trace in traced for w in trace}:
                        self._write(tensor, weight, _follow(name, func, args, kwargs, weight, self))
        return out

    def _arrive(self, name: str, tensor: Tensor, kept: Tensor | None, product: bool) -> None:
        if kept is None and tensor.numel() == 1:
            return  # a norm, say: it scales what it meets
        intact = (
            product
            and kept is not None
            and not bool((tensor.detach() != 0).logical_and_(~kept).any())
        )
        (self.used if intact else self.changed).add(name)

    def _read(self, tensor: Tensor) -> Trace:
        place = _place(tensor)
        trace = self.traces.get(place, {}) if place else {}
        return {name: _view(whole, tensor) for name, whole in trace.items()}

    def _write(self, tensor: Tensor, name: str, kept: Tensor | None) -> None:
        place = _place(tensor)
        if place is None:
            return  # no memory of its own, as sparse tensors: what comes of it reaches no product
        trace = self.traces.setdefault(place, {})
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        whole = trace.get(name)
        if name not in trace:
            whole = torch.ones(size, dtype=torch.bool, device=tensor.device)
        into = _view(whole, tensor)
        if into is None or kept is None or kept.shape != tensor.shape:
            trace[name] = None
        else:
            into.copy_(kept)
            trace[name] = whole


def _place(tensor: Tensor) -> StorageWeakRef | None:
    """What tells memory apart, even after it was freed; None where a tensor has none."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None


def _view(whole: Tensor | None, tensor: Tensor) -> Tensor | None:
    """The entries of a tensor among those of its memory."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    if whole is None or whole.numel() != size:
        return None
    return whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def _follow(
    name: str, func: Any, args: Any, kwargs: Any, weight: str, watch: _Watch
) -> Tensor | None:
    """Which entries of an operator's output should be kept ones; None if there is no telling."""

    def replace(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        trace = watch._read(value)
        if trace.get(weight) is not None:
            return trace[weight]
        # Indices stay; beside the weight, nothing has to be zero.
        floating = value.is_floating_point() or value.is_complex()
        return torch.ones_like(value, dtype=torch.bool) if floating else value

    if name in PRODUCTS:
        return None  # sums of many entries
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    kept = [k for t in inputs if (k := watch._read(t).get(weight)) is not None]
    try:
        if name in MOVES:
            return func(*tree_map(replace, args), **tree_map(replace, kwargs)).bool()  # type: ignore[no-any-return]
        # An operator on entries: of a removed one, whatever it meets, nothing may be left.
        shape = torch.broadcast_shapes(*(t.shape for t in inputs))
        together = [k.expand(shape) for k in kept]
    except (RuntimeError, TypeError, AttributeError) as error:
        if lacks_memory(error):
            raise
        return None
    return torch.stack(together).all(0) if together else None


def watch_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    call: Callable[[], Any],
    images: Sequence[Tensor],
) -> dict[str, str]:
    """Name of a weight -> why its zeros are none of the network's; "" where they are.

    The weights (parameters of the model) get random values half of which are zero, then the other
    half, and `call` sends `images` through in evaluation mode. Afterwards weights and buffers, and
    all random generators, are as before. Raises what torch does when memory runs out: what can be
    pruned must not depend on how much of it is free.
    """
    generator = torch.Generator().manual_seed(0)
    masks, values = {}, {}
    for name, weight in weights.items():
        half = torch.randint(2, weight.shape, generator=generator, dtype=torch.uint8)
        masks[name] = half.bool().to(weight.device)
        if weight.numel() > 1:
            masks[name].view(-1)[0], masks[name].view(-1)[-1] = True, False
        # Of a size that networks start with.
        width = max(weight.numel() // max(len(weight), 1), 1)
        values[name] = torch.rand(weight.shape, generator=generator).sub_(0.5).mul_(3 * width**-0.5)
    used, changed = set(weights), set[str]()
    try:
        for first in (True, False):
            with undisturbed(model):
                for name, weight in weights.items():
                    weight.copy_(values[name])
                    weight.mul_(masks[name] if first else ~masks[name])
                with _Watch(weights, images) as watch:
                    call()
            used &= watch.used
            changed |= watch.changed
    except Exception as error:  # networks may raise anything
        if lacks_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        return dict.fromkeys(weights, f"cannot be watched: {type(error).__name__}: {reason}")
    return {n: CHANGED if n in changed else "" if n in used else UNUSED for n in weights}
