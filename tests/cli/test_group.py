"""The command line as a whole: exit codes, usage, and nothing heavy before it is needed."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize(
    "arguments",
    [["list", "--json"], ["show", "wrn-28-4"], ["check", "r.toml"], ["run", "--help"],
     ["run", "gone.toml"], ["run", "r.toml", "--set", "x=1"]],
    ids=" ".join,
)  # fmt: skip
def test_reading_and_refusing_import_nothing_heavy(arguments):
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'numpy', 'torchvision', 'timm'}\n"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "from prunekit.cli.group import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_usage_errors_exit_with_2(call):
    for arguments in (["chekc"], ["check"], ["run"], ["run", "r.toml", "--bogus"]):
        _, err = call(*arguments, code=2)
        assert err.startswith("Usage:")
    assert "did you mean" in call("run", "r.toml", "--devise", "cpu", code=2)[1].lower()


def test_a_defect_is_one_line_and_a_traceback_with_debug(monkeypatch, call):
    def burst(*arguments):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("prunekit.cli.components.load_registry", burst)
    line = "prunekit: ZeroDivisionError: oh (a bug in prunekit; --debug shows where)\n"
    assert call("list", code=1) == ("", line)
    _, err = call("--debug", "list", code=1)
    assert err.startswith("Traceback")
    assert err.endswith(line)


def test_interruption_exits_with_130(monkeypatch, call):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("prunekit.cli.components.load_registry", interrupt)
    assert call("list", code=130) == ("", "prunekit: interrupted\n")


def test_an_interrupted_run_says_how_to_go_on(here, monkeypatch, call):
    from prunekit.engine.engine import Engine
    from prunekit.errors import Interrupted

    def interrupt(*arguments):
        raise Interrupted

    command = ["prunekit", "run", "r.toml", "--set", "seed=1 # x", "--device", "cpu"]
    monkeypatch.setattr(Engine, "run", interrupt)
    monkeypatch.setattr(sys, "argv", command)
    out, err = call(*command[1:], code=130)
    assert out == ""
    assert err.splitlines()[-2:] == [
        "everything so far is saved; resume with: prunekit run r.toml --set 'seed=1 # x' "
        "--device cpu",
        "prunekit: interrupted",
    ]
    monkeypatch.undo()
    monkeypatch.chdir(here)
    call(*command[1:])


def test_a_file_that_cannot_be_read_is_no_defect(monkeypatch, call):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr("prunekit.cli.components.load_registry", refuse)
    assert call("list", code=1) == ("", "prunekit: somewhere: Permission denied\n")
