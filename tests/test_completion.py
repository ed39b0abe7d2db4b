"""Completion as a shell asks for it: words in the environment, answers on stdout, no torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prunekit.catalog.component import KINDS
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

RECIPE = """
dataset = "cifar10"
architecture = "vgg4-bn"
[threat]
eps = 0.1
[objective]
use = "trades"
[[stage]]
kind = "pretrain"
epochs = 1
[[stage]]
kind = "prune"
name = "cut"
sparsity = 0.5
"""


@pytest.fixture
def here(tmp_path):
    for name in (
        "a.toml",
        "recipes/b.toml",
        "recipes/deep/c.toml",
        "recipes/notes.txt",
        "runs/d/recipe.toml",
        "runs/d/plan.json",
        "pyproject.toml",
        ".hidden/e.toml",
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(RECIPE)  # fmt: skip
    return tmp_path


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
    "prunekit run a.toml --device c": ["cpu", "cuda"],
    "prunekit run a.toml --set thr": ["threat.eps=", "threat.norm="],
    "prunekit run a.toml --set objective.b": ["objective.beta="],
    "prunekit check a.toml --set cut.sp": ["cut.sparsity="],
    "prunekit run a.toml --set pretrain.e": ["pretrain.epochs="],
    "prunekit run gone.toml --set p": [],
    "prunekit run ": ["a.toml", "recipes/b.toml", "recipes/deep/c.toml"],
    "prunekit run rec": ["recipes/b.toml", "recipes/deep/c.toml"],
    "prunekit check a.toml ./recipes/d": ["./recipes/deep/c.toml"],
    "prunekit run runs/d/": ["runs/d/recipe.toml"],
    "prunekit run nothing/like/": [],
}


@pytest.mark.parametrize("line", EXPECTED)
def test_what_is_completed(here, line):
    assert sorted(complete(here, line)) == sorted(EXPECTED[line])


def test_a_broken_plugin_is_not_heard_of(here, monkeypatch):
    info = here / "loud-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[prunekit]\nloud = loud_plugin\n")
    (here / "loud_plugin.py").write_text(
        "import sys\nprint('hello')\nprint('hello', file=sys.stderr)\n1 / 0\n"
    )
    assert complete(here, "prunekit show lw", {"PYTHONPATH": str(here)}.items()) == ["lwm"]


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


def test_bash_itself_completes(here):
    """The script, read by the shell, and the function that it defines."""
    script = (
        'eval "$(prunekit completion bash)"\n'
        "COMP_WORDS=(prunekit show tra); COMP_CWORD=2; _prunekit_completion prunekit\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "--norc", "-c", script], cwd=here, capture_output=True,
                          text=True, env={**os.environ, "PATH": path})  # fmt: skip
    assert done.stdout.strip() == "trades", done.stderr


def test_every_component_can_be_completed(here):
    found = complete(here, "prunekit show ")
    assert set(found) == {entry.reference for entry in load_registry().entries}
