"""Networks as they are, run on kernels: a mode that sees every operator they call.

conv2d        a Pending, on the layer's index, if kernels pay for it
batch_norm    in evaluation folded into it; in training a Pending of its own
add, relu     into the same pass over memory
pooling       with images innermost, as all these
others        torch's, on the values of what is pending
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from prunekit.contexts import BackendContext
from prunekit.evaluation import is_plain
from prunekit_sparse import NumbaOptions
from prunekit_sparse.costs import Costs, read_costs
from prunekit_sparse.index import Geometry, Index
from prunekit_sparse.operators import OPERATORS
from prunekit_sparse.pending import LOOKS, Pending


class Running(TorchFunctionMode):
    """The mode, with all that is known of the weights it saw.

    `costs` decides which layers run on kernels; None is all of them that can.
    """

    def __init__(self, costs: Costs | None) -> None:
        super().__init__()
        self._costs = costs
        self._indices: Any = WeakIdKeyDictionary()
        self._waiting: weakref.WeakSet[Any] = weakref.WeakSet()
        self._masks: dict[int, Tensor] = {}
        self._trained: set[int] = set()
        self._still = False
        self._names: dict[int, str] = {}
        self._chosen: dict[str, str] = {}
        self._depth = self._pass = 0

    @contextmanager
    def around(
        self, model: nn.Module, masks: Mapping[str, Tensor], *, still: bool
    ) -> Iterator[None]:
        """See `prunekit.steps.Backend`."""
        before = (self._masks, self._trained, self._still, self._names)
        named = dict(model.named_parameters())
        self._names = self._names | _name(model) | {id(p): name for name, p in named.items()}
        self._still = still or self._still
        if not still:
            self._masks = {id(named[n]): mask for n, mask in masks.items() if n in named}
            self._trained = {id(p) for p in named.values() if p.requires_grad} - self._masks.keys()
        self._pass += self._depth == 0
        self._depth += 1
        try:
            if self._depth > 1:
                yield
            else:
                with self:
                    yield
            for pending in list(self._waiting):
                pending.settle()
        finally:
            self._depth -= 1
            self._masks, self._trained, self._still, self._names = before

    def chosen(self) -> Mapping[str, str]:
        """See `prunekit.steps.Backend`."""
        found, self._chosen = self._chosen, {}
        return found

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if is_plain():
            return func(*args, **kwargs)
        operator = OPERATORS.get(func)
        if operator is not None and not torch._C._are_functorch_transforms_active():
            found = operator(self, *args, **kwargs)
            if found is not None:
                return found
        if self._waiting and func not in LOOKS:
            self._before_change(func, args, kwargs)
        if Pending in types:
            return Pending.__torch_function__(func, types, args, kwargs)
        return func(*args, **kwargs)

    def _before_change(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Compute what reads a tensor that `func` changes in place."""
        name = getattr(func, "__name__", "")
        inner = name.removeprefix("__").removesuffix("__")
        inplace = name.endswith("_") and not name.endswith("__")
        inplace |= name.startswith("__i") and inner not in ("invert", "init", "index")
        inplace |= inner == "setitem" or kwargs.get("inplace") is True or "out" in kwargs
        if not inplace and name != "__set__":
            return
        changed = kwargs.get("out", args[0] if args else None)
        if not isinstance(changed, Tensor) or isinstance(changed, Pending):
            return
        place = changed.untyped_storage().data_ptr()
        for pending in list(self._waiting):
            if any(t.untyped_storage().data_ptr() == place for t in pending.reads):
                pending.settle()

    # What operators ask.

    def wait(self, pending: Pending) -> Pending:
        """Remember that it is not computed."""
        self._waiting = weakref.WeakSet(p for p in self._waiting if p.value is None)
        self._waiting.add(pending)
        return pending

    def own(self, weight: Tensor) -> Tensor:
        """The weight, which takes no gradient while the network stands still."""
        return weight.detach() if self._still and weight.requires_grad else weight

    def is_kept_only(self, weight: Tensor) -> bool:
        """Whether removed weights need no gradient."""
        return id(weight) in self._masks

    def leave(self, weight: Tensor, why: str) -> None:
        """Note why a layer is dense."""
        name = self._names.get(id(weight))
        if name is not None and self._chosen.get(name) != "sparse":  # once, for some batch
            self._chosen[name] = why

    def find(self, weight: Tensor, geometry: Geometry, images: int) -> Index | None:
        """The kept weights of a layer; None where it is to be dense."""
        if id(weight) in self._trained:
            return None
        mask = self._masks.get(id(weight))
        pattern = weight if mask is None else mask
        # What is written into `.data` has no version: weights are looked at once a pass.
        state = (pattern._version, self._pass if mask is None else 0)
        known = self._indices.get(pattern)
        if known is None or known[0] != state:
            kept = np.flatnonzero(pattern.detach().reshape(-1).numpy())
            known = (state, kept, {})
            self._indices[pattern] = known
        _, kept, made = known
        if geometry not in made:
            made[geometry] = Index(kept, geometry)
        whole = weight.requires_grad and mask is None and not self._still
        if self._costs is None:
            pays = len(kept) < geometry.weights
        else:
            pays = self._costs.pays(geometry, len(kept), images, whole=whole)
        self.leave(weight, "sparse" if pays else f"density {len(kept) / geometry.weights:.2f}")
        if not pays:
            return None
        found: Index = made[geometry]
        found.read(weight, self._pass)
        return found


def _name(model: nn.Module) -> dict[int, str]:
    """id -> name of the weights that parametrizations make, as they are cached in a step."""
    return {
        id(getattr(module, own)): f"{prefix}.{own}".lstrip(".")
        for prefix, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for own in module.parametrizations
    }


@dataclass(frozen=True)
class Kernels:
    """The backend `numba`."""

    _running: Running

    def around(
        self, model: nn.Module, masks: Mapping[str, Tensor], *, still: bool
    ) -> AbstractContextManager[None]:
        """See `prunekit.steps.Backend`."""
        return self._running.around(model, masks, still=still)

    def chosen(self) -> Mapping[str, str]:
        """See `prunekit.steps.Backend`."""
        return self._running.chosen()


def build(options: NumbaOptions, context: BackendContext) -> Kernels:
    """The backend; `on` leaves no layer dense that kernels can take."""
    return Kernels(Running(None if context.everything else read_costs(options.costs)))
