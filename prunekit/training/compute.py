"""Where a training runs: its device, and the meaning of fp32 there."""

from __future__ import annotations

import torch

from prunekit.errors import UserError


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
