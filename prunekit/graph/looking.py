"""How to look at a forward pass, operator by operator, and leave no trace of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prunekit.evaluation import eval_mode, own_generators


class Look(TorchDispatchMode):
    """Is told of every operator that torch runs inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import the compiler, which takes seconds


def _as_written() -> AbstractContextManager[Any]:
    """Compiled networks run operator by operator inside; without a compiler there are none."""
    compiler = "torch._dynamo" in sys.modules
    stance: Any = torch.compiler.set_stance("force_eager") if compiler else nullcontext()
    return stance  # type: ignore[no-any-return]


def is_frozen(module: nn.Module) -> bool:
    """Whether it is a normalization of which nothing is trained: its statistics stay, too."""
    if not isinstance(module, nn.modules.batchnorm._NormBase):
        return False
    own = [parameter.requires_grad for parameter in module.parameters()]
    return bool(own) and not any(own)


@contextmanager
def undisturbed(model: nn.Module, *, train: bool = False) -> Iterator[None]:
    """Inside, every operator is one that can be seen, and the network in evaluation mode.

    Or in that of training: all but normalizations of which nothing is trained.

    Afterwards its parameters, buffers and modes, and all random generators, are what they were.
    """
    # Copied without a look at the values: sparse tensors, say, cannot be compared.
    values = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    owned = [(m._buffers, n, b) for m in model.modules() for n, b in m._buffers.items()]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fast path of attention is one operator, inside of which nothing can be seen.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), own_generators(), eval_mode(model), _as_written():
            for module in model.modules() if train else ():
                module.training = not is_frozen(module)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for own, name, buffer in owned:
            own[name] = buffer
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
