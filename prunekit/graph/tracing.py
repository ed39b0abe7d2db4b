"""Where channels go: one forward pass, and what every operator does with the channels it takes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from prunekit.errors import lacks_memory
from prunekit.graph.channels import NONE, Decisions, Entries, Trail, at_first, slim
from prunekit.graph.looking import Look, undisturbed

CONSTANT = "a removed channel would leave a constant"


@dataclass(frozen=True)
class Call:
    """An operator that was called."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @property
    def name(self) -> str:
        """As in aten, without what says that it works in place."""
        return str(self.func._schema.name).removeprefix("aten::").rstrip("_")

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    @property
    def outputs(self) -> list[Tensor]:
        return [t for t in tree_leaves(self.out) if isinstance(t, Tensor)]

    def again(self, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """What it returns for other tensors in the place of its own."""
        args, kwargs = tree_map(
            lambda x: change(x) if isinstance(x, Tensor) else x, (self.args, self.kwargs)
        )
        found = tree_leaves(self.func(*args, **kwargs))
        return [t for t in found if isinstance(t, Tensor)]


Rule: TypeAlias = "Callable[[Tracer, Call], bool]"


class Tracer(Look):
    """Follows the output channels of `weights` (names) through a forward pass of the model.

    Every operator is told from what it does: one that moves entries moves the channels' numbers,
    one that acts entry by entry is tried on zeros. What is not known keeps all channels that it
    takes, so that nothing is removed on a guess.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Collection[str],
        find_rule: Callable[[Call], Rule | None],
    ) -> None:
        super().__init__()
        self._find_rule = find_rule
        named = dict(model.named_parameters())
        self.names = {id(parameter): name for name, parameter in named.items()}
        self.lengths = {name: len(value) for name, value in named.items() if value.dim()}
        self._trained = {name for name, parameter in named.items() if parameter.requires_grad}
        self.channels: dict[str, Tensor] = {}
        count = 0
        for name in weights:
            size, device = named[name].shape[0], named[name].device
            self.channels[name] = torch.arange(count, count + size, device=device).float()
            count += size
        self.decisions = Decisions(count)
        self.uses, self.calls = dict.fromkeys(weights, 0), dict.fromkeys(weights, 0)
        self.followed: dict[str, list[tuple[Tensor, Tensor]]] = {}
        """Vector -> (indices of its entries, the channels that they go with)."""
        self.scales: frozenset[str] = frozenset()
        """Those of the followed vectors that multiply; the others are added."""
        self.apart: set[str] = set()
        """Vectors that are used, too, where none of their entries could go with a channel."""
        self.sites: dict[str, tuple[int, Tensor]] = {}
        """Module -> the dimension of channels in its output, and the channels."""
        self.seen: dict[str, None] = {}
        """Sites whose output is read, in the order of reading."""
        self.readers: dict[str, Tensor] = {}
        """Weight -> the channel (I,) that each of its inputs reads."""
        self.taken: dict[str, Tensor] = {}
        """The same of kernels that are turned, or have groups: a channel for each group."""
        self._stack: list[tuple[str, nn.Module]] = []
        self._trails: Any = WeakTensorKeyDictionary()
        self.parts: Any = WeakTensorKeyDictionary()
        """Tensor -> the entries of a vector that it is made of."""
        self.turned: Any = WeakTensorKeyDictionary()
        """Tensor -> the matrix that it is, turned by `t`."""

    def run(self, model: nn.Module, example: Tensor) -> None:
        """Send an image (1, C, H, W) through the model, and two in train mode; it stays as it is.

        What only happens in train mode, or with several images, counts as well.
        """
        self._look(model, example)
        self.decisions.mode = ", in train mode"
        counts = dict(self.uses), dict(self.calls)
        try:
            self._look(model, torch.cat([example] * 2), train=True)
        except Exception as error:  # networks may raise anything, and need not train
            if lacks_memory(error):
                raise
            self.uses, self.calls = counts
        self.decisions.mode = ""
        for name, count in self.uses.items():
            if not count or count != self.calls[name]:
                apart = "its weight is used apart from its layer"
                why = apart if count else "no layer takes it as it is"
                self.decisions.keep(self.channels[name], why)
        for vector in self.apart & self.followed.keys():
            for _, channels in self.followed[vector]:
                self.decisions.keep(channels, f"{vector} is used elsewhere too")

    def _look(self, model: nn.Module, images: Tensor, *, train: bool = False) -> None:
        hooks: list[Any] = []
        self._stack.clear()
        for name, module in model.named_modules():
            enter = module.register_forward_pre_hook(
                lambda module, _, name=name: self._stack.append((name, module))
            )
            hooks += [enter, module.register_forward_hook(self._leave)]
        try:
            with undisturbed(model, train=train), self:
                out = model(images)
        finally:
            for hook in hooks:
                hook.remove()
        for tensor in tree_leaves(out):
            if trail := self.trail(tensor):
                self.decisions.keep(trail.channels, "the output of the network")

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """If its own parameters made the output of the module, a gate may stand behind it."""
        name, _ = self._stack.pop()
        trail = self.trail(output)
        if trail is None or trail.sites != {f"~{name}"}:
            return
        for dim in dict.fromkeys((1, output.dim() - 1)):
            others = [d for d in range(output.dim()) if d != dim]
            if self.decisions.varies(trail.channels, others):
                continue
            found = at_first(trail.channels, others).flatten()
            place = (-1 if dim == output.dim() - 1 else dim, found)
            known = self.sites.setdefault(name, place)
            if known[0] == place[0] and known[1].shape == found.shape:
                self.decisions.join(known[1], found)
                self._trails[output] = trail._replace(sites=frozenset({name}))
                for weight in {self.names.get(id(p)) for p in module._parameters.values()}:
                    if weight in self.calls:
                        self.calls[weight] += 1
            return

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        call = Call(func, args, kwargs or {}, func(*args, **(kwargs or {})))
        if any(self.trail(t) or self.entries(t) or self.weight(t) for t in call.tensors):
            self._follow(call)
        return call.out

    def _follow(self, call: Call) -> None:
        target = call.args[0] if call.func._schema.is_mutable else None
        before = self.trail(target)
        rule = self._find_rule(call)
        try:
            known = rule is not None and rule(self, call)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if lacks_memory(error):
                raise
            known = False  # an operator in a way that its rule does not foresee
        for tensor in call.tensors if not known else ():
            if trail := self.trail(tensor):
                self.decisions.keep(trail.channels, f"meets {call.name}")
            if entries := self.entries(tensor):
                self.apart.add(entries.vector)
            if (weight := self.weight(tensor)) in self.uses:
                self.uses[weight] += 1
        after = self.trail(target)
        if target is None or after is None or (before and before.same(after)):
            return
        # Something was written in place: what is known of other views of that memory is not so.
        place = target.untyped_storage().data_ptr()
        views = [t for t in self._trails if t.untyped_storage().data_ptr() == place]
        if len(views) > 1 or target._is_view():
            for tensor in views:
                self.decisions.keep(self._trails[tensor].channels, f"written into by {call.name}")

    # What rules ask and tell

    def trail(self, tensor: Any) -> Trail | None:
        found: Trail | None = self._trails.get(tensor) if isinstance(tensor, Tensor) else None
        return found

    def entries(self, tensor: Any) -> Entries | None:
        """The entries of a vector that a tensor is made of."""
        if isinstance(tensor, nn.Parameter) and tensor.dim() == 1 and id(tensor) in self.names:
            index = torch.arange(len(tensor), device=tensor.device)
            return Entries(self.names[id(tensor)], index.float())
        found: Entries | None = self.parts.get(tensor) if isinstance(tensor, Tensor) else None
        return found

    def weight(self, tensor: Any) -> str:
        """The name of the matrix or kernel, turned by `t` or not, that a tensor is; or nothing."""
        if isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
            return self.names.get(id(tensor), "")
        found: str = self.turned.get(tensor, "") if isinstance(tensor, Tensor) else ""
        return found

    def put(self, out: Tensor, trail: Trail) -> None:
        """`out` has these channels; what is expanded to its shape may be smaller."""
        channels, zero = trail.channels.expand(out.shape), trail.zero.expand(out.shape)
        if bool((channels >= 0).any()):
            self._trails[out] = Trail(channels, zero, trail.sites)

    def see(self, trail: Trail) -> None:
        """Somebody reads these entries, and relies on gates at their sites."""
        if any(site.startswith("~") for site in trail.sites):
            self.decisions.keep(trail.channels, "read before its layer is done")
        self.seen |= dict.fromkeys(sorted(trail.sites))  # in one order in every process

    def planes(self, trail: Trail, axis: int) -> tuple[Tensor, Tensor]:
        """(channel, whether it is zero) for each index along an axis, whose entries go together."""
        axis %= trail.channels.dim()
        channels, zero = (slim(values, axis).movedim(axis, 0) for values in trail[:2])
        zero = ((zero > 0) | (channels < 0)).flatten(1)
        channels = channels.flatten(1)
        found = channels.amax(1)
        self.decisions.join(channels, found[:, None].expand_as(channels))
        mixed = (channels == NONE).any(1) & (found >= 0)
        self.decisions.keep(channels[mixed], "shares its place with what cannot be removed")
        return found.masked_fill(mixed, NONE), zero.all(1)

    def read(self, source: Tensor, axis: int, reader: str, *, turned: bool = False) -> None:
        """A layer takes all entries along an axis, each with weights of its own."""
        channels = torch.full((source.shape[axis],), NONE, device=source.device)
        if trail := self.trail(source):
            channels, zero = self.planes(trail, axis)
            self.decisions.keep(channels[~zero], CONSTANT)
            self.see(trail)
        self.take(reader, channels, self.taken if turned else self.readers)

    def take(self, reader: str, channels: Tensor, known: dict[str, Tensor]) -> None:
        """What a weight multiplies in one call is cut off only with what it does in all others."""
        if not reader:
            return
        first = known.setdefault(reader, channels)
        self.decisions.join(first, channels)
        for values in (first, channels):
            apart = values[(first < 0) != (channels < 0)]
            self.decisions.keep(apart, f"{reader} takes what cannot be removed, too")

    def owner(self, parameter: str) -> str:
        """The site of the innermost module that runs and has the parameter; nothing without one."""
        for name, module in reversed(self._stack):
            if any(self.names.get(id(p)) == parameter for p in module._parameters.values()):
                return f"~{name}"
        return ""

    def follow(self, entries: Entries | None, channels: Tensor, *, multiplies: bool = False) -> str:
        """Let entries go with the channels at their places; the site behind them, or nothing."""
        if entries is None:
            return ""
        site = self.owner(entries.vector)
        if not site or entries.vector not in self._trained:
            return ""
        self.scales |= {entries.vector} if multiplies else set()
        index = entries.index.expand(channels.shape).flatten()
        channels = channels.flatten()
        first = torch.full((int(index.max()) + 1,), NONE, device=index.device)
        first = first.scatter_reduce(0, index.long(), channels, "amax")
        self.decisions.join(channels, first[index.long()])
        if bool(((channels < 0) & (first[index.long()] >= 0)).any()):
            self.apart.add(entries.vector)
        self.followed.setdefault(entries.vector, []).append((index, channels))
        return site

    def collect_followed(self) -> dict[str, Tensor]:
        """Vector -> the channel (C,) that each of its entries goes with."""
        found = {}
        for name, parts in self.followed.items():
            channels = torch.full((self.lengths[name],), NONE, device=parts[0][0].device)
            for index, values in parts:
                channels.scatter_reduce_(0, index.long(), values, "amax")
            found[name] = channels
        return found
