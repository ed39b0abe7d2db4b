"""What layers do with channels: convolutions, matrix products, attention, batch normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.graph.channels import NONE, Trail, align
from prunekit.graph.operators import BLANKS, ENTRYWISE, MOVES, PLANES, REDUCTIONS, act, mix, move
from prunekit.graph.tracing import CONSTANT, Call, Rule, Tracer


def find_rule(call: Call) -> Rule | None:
    """The rule of an operator; None where there is none."""
    name = call.name
    if name in RULES:
        return RULES[name]
    if name.startswith("_scaled_dot_product_"):
        return attend
    if torch.Tag.pointwise in call.func.tags or name in ENTRYWISE:
        return act
    if call.func._schema.is_mutable or call.func._overloadname == "dtype":
        return None
    if name in BLANKS:
        return lambda tracer, call: True
    if name in MOVES:
        return move
    return mix if name in PLANES or name in REDUCTIONS else None


def convolve(tracer: Tracer, call: Call) -> bool:
    """(input, weight, bias, stride, padding, dilation, transposed, output padding, groups)"""
    source, kernel, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    trail, name = tracer.trail(source), tracer.weight(kernel)
    if tracer.trail(kernel) or (transposed and groups > 1):
        return False
    if groups == 1:
        tracer.read(source, 1, name, turned=transposed)
        return _produce(tracer, call.out, name, bias, 1)
    blocks = torch.full((groups,), NONE, device=source.device)
    zero = torch.ones(groups, dtype=torch.bool, device=source.device)
    if trail:
        # One decision about all that a group of the convolution takes, and gives.
        inputs, whole = (v.view(groups, -1) for v in tracer.planes(trail, 1))
        blocks, zero = inputs.amax(1), whole.all(1)
        mixed = (inputs == NONE).any(1)
        tracer.decisions.join(inputs, blocks[:, None].expand_as(inputs))
        tracer.decisions.keep(inputs[mixed], "its convolution takes what cannot be removed")
        blocks = blocks.masked_fill(mixed, NONE)
    tracer.take(name, blocks, tracer.taken)
    outputs = blocks.repeat_interleave(call.out.shape[1] // groups)
    if name in tracer.channels:
        own = tracer.channels[name]
        tracer.decisions.join(own, outputs)
        tracer.decisions.keep(own[outputs == NONE], "its convolution has groups of inputs")
        return _produce(tracer, call.out, name, bias, 1)
    if trail:
        # A kernel that stays: of nothing it makes its bias.
        spread = align(outputs, call.out, 1)
        site = tracer.follow(tracer.entries(bias), outputs) if bias is not None else ""
        kept = zero.repeat_interleave(len(outputs) // groups) & (bias is None or bool(site))
        sites = frozenset({site}) if site else trail.sites
        tracer.put(call.out, Trail(spread, align(kept.float(), call.out, 1), sites))
    return True


def _produce(tracer: Tracer, out: Tensor, name: str, bias: Tensor | None, axis: int) -> bool:
    """The output of a layer whose outputs, its bias among them, can be removed."""
    entries = tracer.entries(bias)
    if name not in tracer.channels:
        if entries:
            tracer.apart.add(entries.vector)
        return True
    tracer.uses[name] += 1
    own = tracer.channels[name]
    gone = bias is None or bool(tracer.follow(entries, own))
    zero = torch.full_like(own, float(gone))
    sites = frozenset({tracer.owner(name) or "~"})
    tracer.put(out, Trail(align(own, out, axis), align(zero, out, axis), sites))
    return True


def multiply(tracer: Tracer, call: Call) -> bool:
    """mm(a, b), addmm(bias, a, b), bmm(a, b), baddbmm(bias, a, b), linear(a, weight, bias)."""
    bias: Tensor | None = None
    if call.name == "linear":
        a, b, bias = (*call.args, None)[:3]
    else:
        *first, a, b = call.args[:3] if "add" in call.name else call.args[:2]
        bias = first[0] if first else None
    name = tracer.weight(b)
    if tracer.weight(a) or (bias is not None and tracer.trail(bias)):
        return False
    # A linear layer multiplies by its weight turned, and anything else is another use of it.
    whole = bool(name) and (call.name == "linear" or not isinstance(b, torch.nn.Parameter))
    if whole or call.name == "linear":
        tracer.read(a, -1, name)
        return tracer.trail(b) is None and _produce(tracer, call.out, name, bias, -1)
    if name:
        return False
    if entries := tracer.entries(bias):
        tracer.apart.add(entries.vector)
    return _multiply(tracer, call, a, b, bias is None)


def _multiply(tracer: Tracer, call: Call, a: Tensor, b: Tensor, plain: bool) -> bool:
    """(b, n, k) times (b, k, m), or without b, of matrices that are no weights."""
    decisions = tracer.decisions
    blank = torch.full((), NONE, device=a.device)
    pair = []
    for tensor in (a, b):
        trail = tracer.trail(tensor)
        known = trail or Trail(blank.expand(tensor.shape), blank.expand(tensor.shape))
        three = [v if v.dim() == 3 else v[None] for v in known[:2]]
        pair.append(Trail(three[0], (three[1] > 0).float(), known.sites))
    left, right = pair
    labelled = [trail for trail in pair if bool((trail.channels >= 0).any())]
    if left.channels.shape[0] > 1 and any(decisions.varies(t.channels, [0]) for t in labelled):
        # A head of attention is one decision, whatever it multiplies.
        for trail in labelled:
            rows = trail.channels.flatten(1)
            decisions.join(rows, rows.amax(1, keepdim=True).expand_as(rows))
            mixed = (rows == NONE).any(1)
            decisions.keep(rows[mixed], "its head takes what cannot be removed")
        if len(labelled) == 2:
            decisions.join(*(t.channels.flatten(1).amax(1) for t in pair))
    along = [decisions.varies(left.channels, [2]), decisions.varies(right.channels, [1])]
    inner = [left.channels.movedim(2, 1).flatten(2), right.channels.flatten(2)]
    whole = [left.zero.movedim(2, 1).flatten(2), right.zero.flatten(2)]
    if all(along):
        for values in inner:
            decisions.join(values, values.amax(2, keepdim=True).expand_as(values))
        decisions.join(*(values.amax(2) for values in inner))
    for trail, values, zero, other, varies in (
        (left, inner[0], whole[0], 1, along[0]),
        (right, inner[1], whole[1], 0, along[1]),
    ):
        if varies:
            gone = zero.amin(2) > 0
            if all(along):
                gone |= whole[other].amin(2) > 0
            decisions.keep(values[~gone], CONSTANT)
            tracer.see(trail)
    rows = blank.expand(left.channels.shape[:2]) if along[0] else left.channels[:, :, 0]
    columns = blank.expand(right.channels.shape[::2]) if along[1] else right.channels[:, 0]
    shape = (rows.shape[0], rows.shape[1], columns.shape[1])
    rows, columns = rows[:, :, None].expand(shape), columns[:, None].expand(shape)
    both = (rows >= 0) & (columns >= 0) & (decisions.roots(rows) != decisions.roots(columns))
    for values in (rows, columns):
        decisions.keep(values[both], "meets another channel in a product")
    sites = frozenset[str]().union(*(t.sites for t, v in zip(pair, along, strict=True) if not v))
    zero = torch.zeros(shape, device=a.device)
    if not along[0]:
        zero = zero + left.zero.amin(2)[:, :, None] * (rows >= 0)
    if not along[1]:
        zero = zero + right.zero.amin(1)[:, None] * (columns >= 0)
    channels = torch.maximum(rows, columns).reshape(call.out.shape)
    zero = ((zero > 0) & plain).float().reshape(call.out.shape)
    tracer.put(call.out, Trail(channels, zero, sites))
    return True


def attend(tracer: Tracer, call: Call) -> bool:
    """softmax(q k') v of each head (b, h, n, d): one decision a head."""
    *pair, value = call.args[:3]
    trails = [tracer.trail(t) for t in (*pair, value)]
    known = [trail for trail in trails if trail]
    if len(known) < 3 or any(tracer.trail(t) for t in call.tensors[3:]) or value.dim() != 4:
        return False
    heads = [trail.channels.flatten(2) for trail in known]
    if len({values.shape[:2] for values in heads}) > 1:
        return False
    first = heads[0].amax(2)
    for values in heads:
        if bool((values < 0).any()):
            return False
        tracer.decisions.join(values, first[:, :, None].expand_as(values))
    zero = known[2].zero.amin((2, 3), keepdim=True)
    out = call.outputs[0]
    sites = known[0].sites | known[1].sites | known[2].sites
    tracer.put(out, Trail(first[:, :, None, None].expand(out.shape), zero, sites))
    return True


def normalize(tracer: Tracer, call: Call) -> bool:
    """(input, scale, shift, running mean, running variance, training, ...): batch normalization."""
    source, scale, shift = call.args[:3]
    trail = tracer.trail(source)
    if trail is None:
        return False
    channels, zero = tracer.planes(trail, 1)
    sites = {
        tracer.follow(tracer.entries(v), channels, multiplies=v is scale)
        for v in (scale, shift)
        if v is not None
    }
    out = call.outputs[0]
    if scale is None:
        # Zeros stay so by their own statistics, and not by those of earlier images.
        own = call.args[5] is True and shift is None
        zero = zero & own
    else:
        zero = torch.full_like(zero, "" not in sites)
    kept = trail.sites if not sites or "" in sites else frozenset(sites)
    tracer.put(out, Trail(align(channels, out, 1), align(zero.float(), out, 1), kept))
    return True


RULES: dict[str, Rule] = {
    "convolution": convolve,
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "linear"), multiply),
    **dict.fromkeys(
        (
            "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm",
            "_native_batch_norm_legit_no_training", "miopen_batch_norm",
        ),
        normalize,
    ),
}  # fmt: skip
