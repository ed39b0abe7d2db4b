"""Exceptions -> one line for the user, which names the plugin that failed."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from prunekit.catalog.containment import held
from prunekit.errors import EscapeError, Interrupted, RunError, UserError, describe, lacks_memory
from prunekit.recipe.plan import Run

OURS = re.compile(r"\(prunekit(?: \S+)?\)$")
"""Matches the end of the name of a plugin that comes with prunekit."""


def explain(error: BaseException, run: Run) -> str:
    """What went wrong and what to do, in one line; `--debug` shows the traceback."""
    if isinstance(error, UserError):
        return str(error)
    text = describe(error).strip().splitlines()
    reason = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    if isinstance(error, EscapeError):
        reason = str(error)
    if lacks_memory(error):
        return (
            f"memory ran out; lower dataset.batch_size (now {run.data.batch_size}) with --set "
            f"dataset.batch_size={max(run.data.batch_size // 2, 1)}, or take a smaller network"
        )
    if owner := _find_owner(error, run):
        return f"{owner} failed: {reason} (--debug shows where)"
    # What another plugin returned may fail in our code, such as a function with other arguments.
    foreign = dict.fromkeys(u.plugin for u in run.uses() if not OURS.search(u.plugin))
    used = f"plugins in use: {', '.join(foreign)}; " if foreign else ""
    return f"{reason} ({used}--debug shows where)"


@contextmanager
def explained(run: Run) -> Iterator[None]:
    """Turn what a plugin raises inside into a `RunError` of one line that names the plugin."""
    try:
        with held():
            yield
    except (UserError, Interrupted):
        raise
    except Exception as error:
        raise RunError(explain(error, run)) from error


def release(error: BaseException) -> None:
    """Free the tensors that an error's traceback refers to. The traceback can still be printed."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


def _find_owner(error: BaseException, run: Run) -> str:
    """What failed: the innermost in the traceback of the run's plugins and the user's network.

    "" if neither is there.
    """
    owners = {name: use for use in run.uses() for name in use.component.needs}
    owners |= {use.component.package: use for use in run.uses()}
    owners.pop("prunekit", None)
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in owners:
            return f"plugin {owners[package].plugin}"
        if frame.f_code.co_name == "forward" and package not in ("torch", "prunekit"):
            return f"the network ({frame.f_code.co_qualname})"
    return ""
