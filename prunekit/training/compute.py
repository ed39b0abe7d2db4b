"""Where and how a run computes: its device, its threads, and the meaning of fp32 there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.contexts import BackendContext
from prunekit.errors import UserError
from prunekit.evaluation import BACKEND
from prunekit.steps import Backend


@dataclass(frozen=True)
class Sparse:
    """What layers with few kept weights run on, a `Use` of a backend, and the recipe's `sparse`."""

    use: Any
    mode: str

    def key(self) -> dict[str, Any]:
        """What decides which layers run on it, and how, beside options, sources and versions."""
        return {"sparse": f"{self.mode} ({self.use.component.name})"}

    def open(self, device: torch.device) -> Backend:
        """Build it."""
        everything = self.mode == "on"
        context = BackendContext(seed=0, folder=Path(), device=device, everything=everything)
        built: Backend = self.use.build(context)
        return built


@dataclass(frozen=True)
class Compute:
    """A device in single precision, one process, and the number of threads on a CPU."""

    device: torch.device
    threads: int = field(default_factory=torch.get_num_threads)
    sparse: Sparse | None = None

    def key(self) -> dict[str, Any]:
        """The part of it that decides the bits of a result; threads are only recorded."""
        sparse = {} if self.sparse is None else self.sparse.key()
        return {"device": self.device.type, "precision": "fp32", "ranks": 1, **sparse}

    def describe(self) -> dict[str, Any]:
        """What is recorded with a run."""
        sparse = {} if self.sparse is None else self.sparse.key()
        found = {"device": str(self.device), "threads": self.threads, "precision": "fp32"}
        return {**found, **sparse}

    def take_chosen(self) -> dict[str, Any]:
        """What is recorded with a result: that, and how layers ran since this was last asked."""
        if self.sparse is None or (backend := BACKEND.get()) is None:
            return self.describe()
        chosen = backend.chosen()
        dense = {name: why for name, why in chosen.items() if why != "sparse"}
        sparse = [name for name in chosen if name not in dense]
        return {**self.describe(), "sparse_layers": sparse, "dense_layers": dense}

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device."""
        return model.to(self.device)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, torch uses so many threads, and networks run on the backend."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        token = BACKEND.set(self.sparse.open(self.device) if self.sparse else None)
        try:
            yield
        finally:
            BACKEND.reset(token)
            torch.set_num_threads(before)


def open_compute(
    device: str = "auto", threads: int | None = None, mode: str = "off", use: Any = None
) -> Compute:
    """What [compute] of a recipe says, on this machine: its `sparse` is `mode`, `use` a backend.

    Raises `UserError` as `find_device`, and if the backend is not for the device but demanded.
    """
    found = find_device(device)
    sparse = None if use is None else Sparse(use, mode)
    if use is not None and found.type not in use.component.devices:
        if mode == "on":
            known = " or ".join(use.component.devices)
            raise UserError(
                f"backend {use.component.name!r} computes on {known}, not on {found.type}; write "
                'sparse = "auto" in [compute]'
            )
        sparse = None
    return Compute(found, threads or torch.get_num_threads(), sparse)


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is the fastest available. Raises `UserError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0].partition(" device type")[0][:80]
        raise UserError(
            f"no device {name!r} here ({reason}); write auto, cpu, cuda, cuda:1 or mps"
        ) from None
    if device.type == "cuda":
        # fp32 means fp32; and the same run gives the same bits.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    return device
