"""What operators do with channels: a rule for each kind of them.

A rule tells the tracer what it knows of the output, and returns False where it does not know.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunekit.graph.channels import NONE, PAD, Entries, Trail, at_first, slim
from prunekit.graph.tracing import CONSTANT, Call, Tracer

VIEWS = {"view", "_unsafe_view", "_reshape_alias", "reshape"}
TURNS = {"t", "transpose"}
MOVES = VIEWS | TURNS | {
    "permute", "expand", "squeeze", "unsqueeze", "slice", "select", "unbind", "split", "chunk",
    "split_with_sizes", "narrow", "cat", "stack", "alias", "detach", "flip", "roll", "index",
    "index_select", "repeat", "unfold", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
    "replication_pad2d", "upsample_nearest1d", "upsample_nearest2d", "movedim", "diagonal",
}  # fmt: skip
ENTRYWISE = {
    "_to_copy", "hardswish", "_prelu_kernel", "rsub", "log_sigmoid_forward", "contiguous",
    "native_dropout",
}  # fmt: skip
"""Operators that act entry by entry although torch does not tag them so."""
BLANKS = {
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty",
    "new_zeros", "new_ones", "new_full", "sym_size", "sym_numel", "sym_stride",
}  # fmt: skip
"""Operators that take nothing of a tensor but its shape."""
PLANES = {
    "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "avg_pool2d": 2, "avg_pool3d": 3,
    "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3, "adaptive_max_pool2d": 2,
    "avg_pool1d": 1, "adaptive_avg_pool1d": 1, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2,
    "_upsample_bilinear2d_aa": 2, "upsample_linear1d": 1,
}  # fmt: skip
"""Operators that mix the entries of as many last dimensions."""
REDUCTIONS = {
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "linalg_vector_norm", "logsumexp",
    "_safe_softmax", "_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "prod",
}  # fmt: skip
"""Operators that mix the entries of the dimensions that they are given."""


def move(tracer: Tracer, call: Call) -> bool:
    """Entries change places: so do the numbers of their channels."""
    if call.name in TURNS and (weight := tracer.weight(call.args[0])):
        if call.args[0].dim() > 2:
            return False
        tracer.turned[call.out] = weight
        return True
    if any(tracer.weight(t) in tracer.uses for t in call.tensors):
        return False
    args = list(call.args)
    fill = 0
    if call.name == "constant_pad_nd":
        fill = args[2] if len(args) > 2 else 0
        args = args[:2]

    def redo(take: Callable[[Tensor], Tensor], default: float, padding: float) -> list[Tensor]:
        def change(tensor: Tensor) -> Tensor:
            floats = tensor.is_floating_point()
            known = tracer.trail(tensor) or tracer.entries(tensor)
            blank = torch.full_like(tensor, default, dtype=torch.float32) if floats else tensor
            return take(tensor) if known else blank

        if call.name in VIEWS:
            return [change(call.args[0]).reshape(call.out.shape)]
        more = (padding,) if call.name == "constant_pad_nd" else ()
        return Call(call.func, (*args, *more), call.kwargs, None).again(change)

    trails = [trail for t in call.tensors if (trail := tracer.trail(t))]
    if trails:
        if any(tracer.entries(t) for t in call.tensors):
            return False
        padding = NONE if fill else PAD
        channels = redo(lambda t: tracer.trail(t).channels, NONE, padding)  # type: ignore[union-attr]
        zeros = redo(lambda t: tracer.trail(t).zero, 0, 0)  # type: ignore[union-attr]
        sites = frozenset[str]().union(*(trail.sites for trail in trails))
        for out, c, z in zip(call.outputs, channels, zeros, strict=True):
            tracer.put(out, Trail(c, z, sites))
        return True
    found = [entries for t in call.tensors if (entries := tracer.entries(t))]
    if not found:
        return True
    if len(call.tensors) > 1 or call.name == "constant_pad_nd":
        return False
    moved = redo(lambda t: tracer.entries(t).index, NONE, NONE)  # type: ignore[union-attr]
    for out, index in zip(call.outputs, moved, strict=True):
        tracer.parts[out] = Entries(found[0].vector, index)
    return True


def act(tracer: Tracer, call: Call) -> bool:
    """Entries are computed from entries at the same place: their channels go together.

    What removed channels become is tried: zeros for what they are zero in, anything else for what
    stays, whose values may change.
    """
    if any(tracer.weight(t) in tracer.uses for t in call.tensors):
        return False
    decisions, shape = tracer.decisions, call.outputs[0].shape
    trails: dict[int, Trail] = {}
    for tensor in call.tensors:
        if trail := tracer.trail(tensor):
            channels, zero = trail.channels.expand(shape), trail.zero.expand(shape)
            trails[id(tensor)] = Trail(channels, zero, trail.sites)
    for tensor in call.tensors:
        padded = (1,) * (len(shape) - tensor.dim()) + tuple(tensor.shape)
        spread = [d for d, size in enumerate(padded) if size < shape[d]]
        others = [trail for key, trail in trails.items() if key != id(tensor)]
        if id(tensor) in trails and any(decisions.varies(o.channels, spread) for o in others):
            # One channel that scales or shifts all others is no part of their decisions.
            decisions.keep(trails.pop(id(tensor)).channels, "acts on other channels")
    if not trails:
        return not any(tracer.entries(t) for t in call.tensors)
    (first, *rest) = trails.values()
    channels = first.channels
    for trail in rest:
        decisions.join(channels, trail.channels)
        channels = torch.maximum(channels, trail.channels)
    sites = frozenset[str]().union(*(trail.sites for trail in trails.values()))

    def try_zeros(*, removed: bool = True, vectors: bool = False) -> Tensor:
        draw = torch.Generator().manual_seed(0)

        def change(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point() and id(tensor) not in trails:
                return tensor.clone()
            if vectors and tracer.entries(tensor):
                return torch.zeros_like(tensor)
            anything = torch.randn(tensor.shape, generator=draw).to(tensor)
            if id(tensor) not in trails or not removed:
                return anything
            trail = tracer.trail(tensor)
            assert trail is not None
            gone = (trail.channels == PAD) | ((trail.zero > 0) & (trail.channels >= 0))
            return anything.masked_fill(gone, 0)

        return call.again(change)[0] == 0

    zero = try_zeros()
    entries = [found for t in call.tensors if (found := tracer.entries(t))]
    if entries and not bool(zero[channels >= 0].all()):
        alone = try_zeros(vectors=True)
        scale = bool(try_zeros(removed=False, vectors=True).all())
        if len(entries) == 1 and (site := tracer.follow(entries[0], channels, multiplies=scale)):
            zero, sites = alone, frozenset({site})
    else:
        for found in entries:
            # Zeros need none of it, but what goes with channels elsewhere goes with these as well.
            if found.vector not in tracer.followed or not tracer.follow(found, channels):
                tracer.apart.add(found.vector)
    if bool((slim(channels) == PAD).any()):
        channels = torch.where((channels == PAD) & ~zero, NONE, channels)
    for out in call.outputs:
        tracer.put(out, Trail(channels, fold(zero), sites))
    return True


def mix(tracer: Tracer, call: Call) -> bool:
    """Entries along some dimensions are mixed: pooling, means, a softmax."""
    source = call.args[0]
    trail = tracer.trail(source)
    if trail is None or any(t is not source for t in call.tensors):
        return False
    if call.name in PLANES:
        dims = list(range(source.dim() - PLANES[call.name], source.dim()))
    else:
        given = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else None)
        given = call.args[2] if call.name == "linalg_vector_norm" else given
        listed = [given] if isinstance(given, int) else list(given or range(source.dim()))
        if not all(type(d) is int for d in listed):
            return False
        dims = [d % source.dim() for d in listed]
    others = [d for d in range(source.dim()) if d not in dims]
    if tracer.decisions.varies(trail.channels, others):
        # Not all channels at once: those that meet at each of the other places go together.
        whole = at_first(trail.channels, dims)
        tracer.decisions.join(trail.channels, whole.expand_as(trail.channels))
    if tracer.decisions.varies(trail.channels, dims):
        if call.name != "sum":
            return False
        channels = trail.channels >= 0
        tracer.decisions.keep(trail.channels[channels & (trail.zero == 0)], CONSTANT)
        tracer.see(trail)
        return True
    channels, whole = at_first(trail.channels, dims), trail.zero.amin(dims, keepdim=True)
    results = call.again(torch.zeros_like)
    for out, result in zip(call.outputs, results, strict=True):
        shape = out.shape if channels.dim() == out.dim() else channels.shape
        zero = fold(result == 0) if channels.dim() == out.dim() else (result == 0).all().float()
        found = Trail(channels.expand(shape), (whole * zero).expand(shape), trail.sites)
        if channels.dim() != out.dim():
            found = Trail(found[0].reshape(out.shape), found[1].reshape(out.shape), found[2])
        tracer.put(out, found)
    return True


def fold(values: Tensor) -> Tensor:
    """As float32, and a single entry where all of them are 1, so that it takes no memory."""
    return values.new_ones((), dtype=torch.float32) if bool(values.all()) else values.float()
