"""A stop that is asked for: answered at once, obeyed at the next batch, or at once."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from prunekit.errors import Interrupted
from prunekit.report import STOPPING, Stop


def test_the_first_signal_is_answered_and_the_second_obeyed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop = Stop()
    # As `prunekit run` does: around the imports, and around the run again.
    with stop.listen(), stop.listen():
        stop.check()
        signal.raise_signal(signal.SIGINT)
        assert capsys.readouterr() == ("", f"{STOPPING}\n")
        with pytest.raises(Interrupted):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capsys.readouterr().err == ""


def test_a_signal_in_the_middle_of_a_write_is_answered_too(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Busy:
        def write(self, text: str) -> None:
            raise RuntimeError("reentrant call")

    with Stop().listen(), monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Busy())
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == f"{STOPPING}\n"
