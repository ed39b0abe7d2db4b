"""Completion as a shell asks for it: words in the environment, answers on stdout, no torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prunekit.catalog.kinds import KINDS
from prunekit.catalog.registry import load_registry

CODE = """
import sys
from prunekit.cli.group import main
sys.argv[0] = "prunekit"
try:
    main()
finally:
    loaded = {"torch", "numpy", "torchvision", "timm"} & set(sys.modules)
    assert not loaded, loaded
"""


def complete(folder, line, environment=()):
    """What comes after the last word of the line, as bash asks."""
    words = line.split(" ")
    asked = {"_PRUNEKIT_COMPLETE": "bash_complete", "COMP_WORDS": line,
             "COMP_CWORD": str(len(words) - 1)}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=folder, env={**os.environ, **asked, **dict(environment)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == ""
    return [item.partition(",")[2] for item in done.stdout.split()]


EXPECTED = {
    "prunekit do": ["doctor"],
    "prunekit new plugin x --kind p": ["pruner"],
    "prunekit completion ": ["bash", "zsh", "fish"],
    "prunekit list ": [f"{kind}s" for kind in KINDS],
    "prunekit show tra": ["trades"],
    "prunekit show cos": ["cosine"],
    "prunekit import hydra f --model wrn-28-": ["wrn-28-1", "wrn-28-4", "wrn-28-10"],
    "prunekit eval r --dataset fash": ["fashion-mnist"],
    "prunekit eval r --with cl": ["clean"],
    "prunekit eval r --with pgd,clean,au": ["pgd,clean,autoattack"],
    "prunekit eval r --with pgd,p": [],
}


@pytest.mark.parametrize("line", EXPECTED)
def test_what_is_completed(tmp_path, line):
    assert sorted(complete(tmp_path, line)) == sorted(EXPECTED[line])


def test_a_broken_plugin_is_not_heard_of(tmp_path, monkeypatch):
    info = tmp_path / "loud-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[prunekit]\nloud = loud_plugin\n")
    (tmp_path / "loud_plugin.py").write_text(
        "import sys\nprint('hello')\nprint('hello', file=sys.stderr)\n1 / 0\n"
    )
    assert complete(tmp_path, "prunekit show lw", {"PYTHONPATH": str(tmp_path)}.items()) == ["lwm"]


def test_the_scripts_are_those_of_the_shells():
    marks = {
        "bash": "complete -o nosort",
        "zsh": "#compdef prunekit",
        "fish": "complete --no-files",
    }
    for shell, mark in marks.items():
        done = subprocess.run([sys.executable, "-m", "prunekit", "completion", shell],
                              capture_output=True, text=True, check=True)  # fmt: skip
        assert mark in done.stdout
        assert "_PRUNEKIT_COMPLETE" in done.stdout


def test_bash_itself_completes(tmp_path):
    """The script, read by the shell, and the function that it defines."""
    script = (
        'eval "$(prunekit completion bash)"\n'
        "COMP_WORDS=(prunekit show tra); COMP_CWORD=2; _prunekit_completion prunekit\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "--norc", "-c", script], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PATH": path})  # fmt: skip
    assert done.stdout.strip() == "trades", done.stderr


def test_every_component_can_be_completed(tmp_path):
    found = complete(tmp_path, "prunekit show ")
    assert set(found) == {entry.reference for entry in load_registry().entries}
