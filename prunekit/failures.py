"""Any exception -> one line for the user, naming the plugin it came from."""

from __future__ import annotations

import traceback

import torch

from prunekit.errors import UserError
from prunekit.plan import Run

MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


def explain(error: BaseException, run: Run) -> str:
    """What went wrong and what to do, without a traceback (`--debug` shows that)."""
    if isinstance(error, UserError):
        return str(error)
    text = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in MEMORY)
    ):
        return (
            f"memory ran out; lower dataset.batch_size (now {run.data.batch_size}) with --set "
            f"dataset.batch_size={max(run.data.batch_size // 2, 1)}, or take a smaller network"
        )
    return f"{_find_owner(error, run)}{reason} (--debug shows where)"


def release(error: BaseException) -> None:
    """Let go of all tensors that an error's traceback holds; the lines it shows stay."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


def _find_owner(error: BaseException, run: Run) -> str:
    """The plugin whose code is the innermost of the traceback, of those this run uses."""
    owners = {use.component.package: use for use in run.uses()}
    owners.pop("prunekit", None)
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in owners:
            return f"plugin {owners[package].plugin} failed: "
    return ""
