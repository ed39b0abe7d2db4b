"""Where and how a run computes: its device, its threads, and the meaning of fp32 there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prunekit.errors import UserError


@dataclass(frozen=True)
class Compute:
    """A device in single precision, one process, and the number of threads on a CPU."""

    device: torch.device
    threads: int = field(default_factory=torch.get_num_threads)

    def key(self) -> dict[str, Any]:
        """The part of it that decides the bits of a result; threads are only recorded."""
        return {"device": self.device.type, "precision": "fp32", "ranks": 1}

    def describe(self) -> dict[str, Any]:
        """What is recorded with a result."""
        return {"device": str(self.device), "threads": self.threads, "precision": "fp32"}

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device."""
        return model.to(self.device)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, torch uses so many threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def open_compute(device: str = "auto", threads: int | None = None) -> Compute:
    """What [compute] of a recipe says, on this machine. Raises `UserError` as `find_device`."""
    return Compute(find_device(device), threads or torch.get_num_threads())


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
