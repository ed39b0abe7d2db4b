"""Code of plugins, run so that what it does to the process does not outlast it."""

import sys

import pytest

from prunekit.catalog.containment import contained, held
from prunekit.errors import EscapeError


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), KeyboardInterrupt()])
def test_what_would_end_the_program_is_an_exception(error):
    with pytest.raises(EscapeError, match=type(error).__name__) as caught, held():
        raise error
    assert caught.value.__cause__ is error


def test_held_leaves_the_streams_alone_and_contained_restores_them(capsys):
    with held():
        print("told")
    with contained():
        print("kept apart")
        sys.stdout = sys.stderr = None
    assert capsys.readouterr() == ("told\n", "kept apart\n")
