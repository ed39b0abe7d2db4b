"""Code of plugins, run so that what it does to the process does not outlast it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from types import FrameType
from typing import Any

from prunekit.errors import EscapeError, PluginError, UserError, explain_briefly


@contextmanager
def held() -> Iterator[None]:
    """What would end the program, such as `SystemExit`, is raised as `EscapeError`.

    A user's Ctrl-C ends it still, and so does `os._exit`, which nothing in this process can hold.
    """
    with _watching() as interrupted:
        try:
            yield
        except Exception:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and interrupted():
                raise
            escape = EscapeError(explain_briefly(error))
            # The traceback says which plugin it was.
            raise escape.with_traceback(error.__traceback__) from error


@contextmanager
def contained() -> Iterator[None]:
    """Inside, code of a plugin runs, `held`, for a moment: a run has live displays of its own.

    What it prints goes to stderr, for stdout is for results. The current folder and the streams
    are afterwards what they were.
    """
    streams, folder = (sys.stdout, sys.stderr), _find_folder()
    try:
        with held(), redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout, sys.stderr = streams
        if folder is not None and folder != _find_folder():
            with suppress(OSError):
                os.chdir(folder)


def ask(use: Any, what: str, *more: Any) -> Any:
    """What a function of the declaration of a `Use`, such as `passes`, says of its options.

    `more` is what else the function takes.

    Raises `PluginError` if it fails, and `UserError` if that is what it raises.
    """
    try:
        with contained():
            said = getattr(use.component, what)(use.options, *more)
            # A generator is a plugin's code still.
            return tuple(said) if isinstance(said, Iterator) else said
    except UserError:
        raise
    except Exception as error:
        owner = f"{use.kind} '{use.component.name}' of plugin {use.plugin}"
        raise PluginError(f"{owner} fails to say its {what}: {explain_briefly(error)}") from error


def _find_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it has been deleted
        return None


@contextmanager
def _watching() -> Iterator[Callable[[], bool]]:
    """Inside, a call says whether the user interrupted; a plugin may raise the same exception."""
    handler = signal.getsignal(signal.SIGINT)
    if (
        handler is not signal.default_int_handler
        or threading.current_thread() is not threading.main_thread()
    ):
        # Where it is ignored, as in the background of a shell, no user can have been.
        yield lambda: handler is not signal.SIG_IGN
        return
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, handler)
