"""What plugins do to the process: no command ends in silence, and results stay readable."""

import json
import os
import subprocess
import sys
import warnings

import pytest
from click.testing import CliRunner

from prunekit.cli.group import main

PRUNER = """\
import os
from dataclasses import dataclass
from prunekit import PrunerComponent, hookimpl, option
from prunekit.contracts import Scores

@dataclass(frozen=True)
class Options:
    n: int = option(1, help="nothing")

    def __post_init__(self):
        {check}

@hookimpl
def prunekit_pruners():
    yield PrunerComponent(name="mine", summary="x", build="misbehaving:build", options=Options)

def build(options, context):
    {build}
    def prune(context):
        {prune}
        return Scores(dict(context.weights))
    return prune
"""


@pytest.fixture
def install(here, monkeypatch):
    """Install a plugin of this source, for this test."""

    def install(source):
        info = here / "misbehaving-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: misbehaving\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[prunekit]\nmisbehaving = misbehaving\n")
        (here / "misbehaving.py").write_text(source)
        monkeypatch.syspath_prepend(here)
        monkeypatch.delitem(sys.modules, "misbehaving", raising=False)

    yield install
    sys.modules.pop("misbehaving", None)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise SystemExit('[bold] no')", "SystemExit: [bold] no"),
        ("raise BaseException('hm')", "BaseException: hm"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        (
            "class E(Exception):\n    def __str__(self): raise RuntimeError\nraise E",
            "E: (its message cannot be shown: RuntimeError)",
        ),
    ],
)
def test_an_import_that_raises_anything_is_a_broken_plugin(install, read, call, source, reason):
    install(source)
    (broken,) = read("list")["broken"]
    assert broken["reason"] == reason
    (row,) = [line for line in call("list")[0].splitlines() if line.startswith("plugin ")]
    assert f"misbehaving 1.0  broken: {reason}" in row
    assert call("check", "r.toml")[0] == "r.toml: good (1 run)\n"


def test_what_an_import_changes_is_put_back(install, here, read):
    install(
        "import os, sys, warnings\nprint('HELLO')\nos.chdir('/')\n"
        "sys.stdout = sys.stderr = None\nwarnings.simplefilter('error')\nprint('AGAIN')"
    )
    filters = list(warnings.filters)
    assert read("list")["broken"][0]["reason"].startswith("LookupError")
    assert os.getcwd() == str(here)
    assert warnings.filters == filters


def test_a_check_that_exits_is_a_mistake_of_the_recipe(install, here, call):
    install(PRUNER.format(check="raise SystemExit(0)", build="", prune=""))
    with (here / "r.toml").open("a") as file:
        file.write('[[stage]]\nkind = "prune"\nsparsity = 0.5\npruner = "mine"\n')
    for command in (["check", "r.toml"], ["run", "r.toml"]):
        assert call(*command, code=2)[1] == (
            "r.toml:18: pruner 'mine' of plugin misbehaving (misbehaving 1.0) rejects its "
            "options: SystemExit: 0\n"
        )
    assert not (here / "runs").exists()


def test_a_function_of_a_declaration_that_exits_is_named(install, here, call):
    install(
        "from prunekit import ObjectiveComponent, hookimpl\n"
        "def replays(options): raise SystemExit(0)\n"
        "@hookimpl\ndef prunekit_objectives():\n"
        "    yield ObjectiveComponent(name='mine', summary='x', build='misbehaving:build', "
        "replays=replays)\ndef build(options, context): return lambda x, y, clock: None\n"
    )
    err = call("run", "r.toml", "--set", "objective=mine", code=1)[1]
    assert err.endswith(
        "objective 'mine' of plugin misbehaving (misbehaving 1.0) fails to say its replays: "
        "SystemExit: 0\n"
    )


def test_what_a_plugin_prints_is_no_result_and_its_folder_is_its_own(install, here, read):
    noise = "print('NOISE'); os.chdir('elsewhere') if os.path.isdir('elsewhere') else None"
    install(PRUNER.format(check=noise, build=noise, prune=noise))
    (here / "elsewhere").mkdir()
    with (here / "r.toml").open("a") as file:
        file.write('[[stage]]\nkind = "prune"\nsparsity = 0.5\npruner = "mine"\n')
    assert read("check", "r.toml")["recipes"][0]["problems"] == []
    assert read("run", "r.toml", "--device", "cpu")["rows"]
    assert (here / "runs/tiny/run.json").exists()
    assert not any((here / "elsewhere").iterdir())
    assert os.getcwd() == str(here)


@pytest.mark.parametrize("error", [SystemExit(0), GeneratorExit()])
def test_a_command_that_a_plugin_ends_has_failed(monkeypatch, here, call, error):
    def end(*arguments):
        raise error

    monkeypatch.setattr("prunekit.cli.components.load_registry", end)
    assert call("list", code=1)[1].startswith("prunekit: a plugin ended the command (")


def test_nothing_that_is_shown_drives_the_terminal(here, write_run, evaluate):
    evil = "\x1b]0;x\x07\x1b[2J\u202e\u2028\x9b1m"
    write_run(
        here / "runs/a", {"prune.x": evil}, evaluate("k", 0.5, 0.9, name=evil), name=evil,
        status=evil, error=evil,
    )  # fmt: skip
    write_run(here / f"runs/b{evil}", {"prune.x": 1}, evaluate("l", 0.5, 0.9))
    write_run(here / f"runs/c{evil}", {}, status=None)
    for option in ([], ["--csv"], ["--json"], ["--layers"]):
        done = CliRunner().invoke(main, ["results", "runs", *option])
        assert done.exit_code == 0
        assert done.output.replace("\n", "").isprintable()
        assert "left out: runs/c\\u001b" in done.stderr


def test_a_newline_in_a_name_is_no_line_of_what_is_written(here, call):
    name = 'x"\nseed = 7\n#'
    assert "control character" in call("init", name, code=2)[1]
    out, _ = call("run", "r.toml", "--out", "a\nseed = 7", "--dry-run")
    assert "\nseed = 7" not in out
    assert out.startswith("# into a\\nseed = 7, stages in ")
    call("init", 'q"uote')
    assert 'name = "q\\"uote"' in (here / 'q"uote.toml').read_text()
    call("check", 'q"uote.toml')
    call("init", 'r"', "--like", "quickstart")
    assert 'name = "r\\""' in (here / 'r".toml').read_text()


def test_one_broken_run_is_left_out_and_keeps_its_stages(here, write_run, evaluate, call):
    write_run(here / "runs/a", {"seed": 0}, evaluate("k", 0.5, 0.9))
    write_run(here / "runs/b", {"seed": 1}, evaluate("l", 0.5, 0.9), seed="x")
    out, err = call("results")
    assert "50.0" in out
    assert err == "left out: runs/b/run.json is damaged (seed is 'x'); run the recipe again\n"
    # Its stages are known to nobody else.
    assert "runs/b/run.json is damaged" in call("clean", code=2)[1]
    (here / "runs/a/run.json").unlink()
    assert "prunekit: runs/b/run.json is damaged" in call("results", code=2)[1]
    assert json.loads(call("check", "r.toml", "--json")[0])["recipes"]


def test_what_a_plugin_writes_to_the_descriptor_is_no_result(here, install):
    """C libraries and programs that it starts do that."""
    install("import os\nos.write(1, b'noise\\n')\nos.system('echo more noise')")
    done = subprocess.run(
        [sys.executable, "-m", "prunekit", "list", "pruners", "--json"],
        env={**os.environ, "PYTHONPATH": str(here)}, capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["schema_version"] == 1
    assert done.stderr.startswith("noise\nmore noise\n")
