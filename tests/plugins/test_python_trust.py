"""Code that a run folder or a model file names runs only if this user ran it, or trusts it."""

import importlib.util
import json
import py_compile
import shutil
import sys
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner
from prunekit_timm import TimmOptions, tell_risk
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import prunekit
from prunekit.cli.group import main
from prunekit.errors import UserError

NET = """
from torch import nn
import part


def make(shape, classes, scale=1):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
"""
RECIPE = """
[dataset]
use = "digits"
fraction = 0.1
[architecture]
use = "python"
file = "net.py"
[objective]
use = "benign"
[[stage]]
kind = "pretrain"
epochs = 1
[[stage]]
kind = "evaluate"
with = ["clean"]
images = 20
"""
REFUSED = "would run the Python file"


def call(*arguments, code=0):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    assert done.stderr.count("\n") == 1 or code == 0
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which a network of a Python file was trained."""
    folder = tmp_path_factory.mktemp("made")
    for name, text in {"net.py": NET, "part.py": "", "r.toml": RECIPE}.items():
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        call("run", "r.toml", "--out", "runs/a")
    return folder


@pytest.fixture
def stranger(made, tmp_path, monkeypatch):
    """In what somebody else sent: that folder, whose Python files tell if they run."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    shutil.copytree(made, tmp_path / "sent")
    monkeypatch.chdir(tmp_path / "sent")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    Path("part.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    for file in map(Path, ("runs/a/recipe.toml", "runs/a/run.json")):
        file.write_text(file.read_text().replace(str(made), str(tmp_path / "sent")))
    state = load_file("runs/a/model.safetensors")
    with safe_open("runs/a/model.safetensors", "pt") as file:
        header = json.loads(file.metadata()["prunekit"])
    header["architecture"]["file"] = "net.py"
    save_file(state, "m.safetensors", {"prunekit": json.dumps(header)})
    return tmp_path


COMMANDS = {
    "eval a run": ("eval", "runs/a", "--with", "clean", "--images", 5),
    "eval a file": ("eval", "m.safetensors", "--with", "clean", "--images", 5),
    "check": ("check", "--deep", "runs/a/recipe.toml"),
    "dry run": ("run", "runs/a/recipe.toml", "--dry-run"),
    "smoke": ("run", "runs/a/recipe.toml", "--smoke", "--out", "runs/b"),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_strangers_code_runs_only_if_trusted(stranger, command):
    told = call(*command, code=2)
    assert REFUSED in told
    assert "give --trust" in told
    assert not (stranger / "ran").exists()
    call(*command, "--trust")
    assert (stranger / "ran").exists()
    # Trust is for the command that it is given to.
    assert REFUSED in call(*command, code=2)


def test_a_strangers_sweep_is_not_the_users(stranger):
    text = RECIPE.replace('[architecture]\nuse = "python"\nfile = "net.py"\n', "")
    sweep = '\n[sweep]\narchitecture = [{ use = "python", file = "../net.py" }]\n'
    Path("sent").mkdir()
    Path("sent/recipe.toml").write_text(text + sweep)
    Path("sent/plan.json").touch()
    assert REFUSED in call("check", "--deep", "sent/recipe.toml", code=2)


@pytest.mark.parametrize("path", ["runs/a", "m.safetensors"])
def test_from_python_too(stranger, path):
    with pytest.raises(UserError, match=REFUSED):
        prunekit.load(path)
    assert not (stranger / "ran").exists()
    with warnings.catch_warnings(action="ignore"):  # the fixture has edited the run
        assert prunekit.load(path, trust=True).model
    with pytest.raises(UserError, match=REFUSED):
        prunekit.run("runs/a/recipe.toml", out="runs/b", quiet=True)


def test_what_a_recipe_of_the_user_ran_runs_again(stranger):
    """Wherever it lies; also what a recipe extends is of the user."""
    Path("mine.toml").write_text('extends = "runs/a/recipe.toml"')
    call("check", "mine.toml")
    assert REFUSED in call("check", "--deep", "runs/a/recipe.toml", code=2)
    call("check", "--deep", "mine.toml")
    for command in COMMANDS.values():
        call(*command)
    shutil.copytree(".", "copy", ignore=lambda folder, names: ["runs"])
    call("eval", "copy/m.safetensors", "--with", "clean", "--images", 5)


CHANGES = {
    "the file": ("net.py", NET + "\n"),
    "an import": ("part.py", "x = 1\n"),
    "an argument": ("runs/a/recipe.toml", None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changed_since_does_not_run(stranger, change):
    call("check", "--deep", "r.toml")
    file, text = Path(change[0]), change[1]
    old = file.read_text()
    arguments = "[architecture.kwargs]\n"
    file.write_text(text or old.replace(arguments, arguments + "scale = 2\n"))
    assert file.read_text() != old
    assert REFUSED in call("eval", "runs/a", "--with", "clean", code=2)


ASKS = "try:\n    from . import fast\nexcept ImportError:\n    fast = None\n"


@pytest.mark.parametrize("way", ["a linked folder", "a linked folder of links", "a new name"])
def test_a_package_may_not_find_more_than_it_had(stranger, way):
    """What a package imports if it is there was not there when the user ran it."""
    evil = Path("part.py").read_text()
    Path("part.py").write_text("import pkg\n")
    Path("pkg").mkdir()
    Path("pkg/__init__.py").write_text(ASKS)
    Path("pkg/cleanup.py").write_text(evil)
    call("check", "--deep", "r.toml")
    call("eval", "runs/a", "--with", "clean", "--images", 5)
    assert not (stranger / "ran").exists()
    if way == "a new name":
        Path("pkg/cleanup.py").rename("pkg/fast.py")
    else:
        Path("payload/fast").mkdir(parents=True)
        Path("payload/fast/__init__.py").write_text(evil)
        Path("payload/fast/again").symlink_to("../fast")
        Path("pkg/fast").symlink_to("../payload/fast")
        if way == "a linked folder of links":
            shutil.move("pkg", "elsewhere")
            Path("pkg").symlink_to("elsewhere")
    assert REFUSED in call("eval", "runs/a", "--with", "clean", "--images", 5, code=2)
    assert not (stranger / "ran").exists()


def test_folders_that_link_to_each_other_end(stranger):
    Path("part.py").write_text("import linked\n")
    for name in "abcdefghij":
        Path("linked", name).mkdir(parents=True)
        for other in "abcdefghij":
            Path("linked", name, other).symlink_to(f"../{other}")
    told = call("check", "--deep", "r.toml", code=2)
    assert "linked holds over 20,000 folders, through links perhaps" in told


def test_a_file_of_init_names_no_code(stranger):
    (stranger / "sent/mine.toml").write_text(
        RECIPE.replace('use = "python"\nfile = "net.py"', 'use = "lin-1"\ninit = "m.safetensors"')
    )
    call("run", "mine.toml")
    assert not (stranger / "ran").exists()


def test_what_the_command_names_needs_no_trust(stranger):
    named = ("--model", "python", "--set", "architecture.file=net.py")
    call("eval", "m.safetensors", "--with", "clean", "--images", 5, *named)
    assert (stranger / "ran").exists()


def test_a_hub_is_not_asked_for_a_stranger(stranger):
    file = Path("runs/a/recipe.toml")
    text = file.read_text()
    start, end = text.index("[architecture]"), text.index("[[stage]]")
    for model in ("hf-hub:nobody/nothing", "HF_hub:nobody/nothing", "local-dir:/nowhere"):
        file.write_text(
            f'{text[:start]}[architecture]\nuse = "timm"\nmodel = "{model}"\n\n{text[end:]}'
        )
        told = call("eval", "runs/a", "--with", "clean", code=2)
        assert f"would make timm load '{model}'" in told


def test_names_that_timm_publishes_are_no_risk():
    assert not tell_risk(TimmOptions("resnet18.a1_in1k", pretrained=True))
    told = tell_risk(TimmOptions("resnet18", kwargs={"pretrained_cfg": {"file": "w.pth"}}))
    assert told == "would make timm load what pretrained_cfg name"


LOADING = {
    "sys.path": "import sys\nsys.path.insert(0, 'lib')\nimport late",
    "path of sys": "from sys import path\npath.insert(0, 'lib')\nimport late",
    "importlib": "import importlib.util as u\nu.find_spec('late')",
    "__import__": "try:\n    __import__('late')\nexcept ImportError:\n    pass",
    "exec": "exec(open('lib/late.py').read())",
}


@pytest.mark.parametrize("text", LOADING.values(), ids=LOADING)
def test_code_that_may_load_other_files_is_not_remembered(stranger, text):
    """Those may be others beside the same file."""
    evil = Path("part.py").read_text()
    Path("part.py").write_text(text)
    Path("lib").mkdir()
    Path("lib/late.py").write_text("")
    call("check", "--deep", "r.toml")
    sys.modules.pop("late", None)
    Path("lib/late.py").write_text(evil)
    assert REFUSED in call("eval", "runs/a", "--with", "clean", "--images", 5, code=2)
    assert not (stranger / "ran").exists()


def test_methods_that_are_called_as_loaders_are_none(stranger):
    Path("part.py").write_text("import os, sys\ndef f(m):\n    return m.eval(), os.path, sys.argv")
    call("check", "--deep", "r.toml")
    call("eval", "runs/a", "--with", "clean", "--images", 5)


def test_compiled_files_beside_the_code_do_not_run(stranger):
    """The hash that is remembered does not cover them."""
    Path("evil.py").write_text(Path("part.py").read_text())
    Path("part.py").write_text("")
    call("check", "--deep", "r.toml")
    cached = importlib.util.cache_from_source(str(Path("part.py").absolute()))
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile("evil.py", cached, invalidation_mode=mode)
    call("eval", "runs/a", "--with", "clean", "--images", 5)
    assert not (stranger / "ran").exists()


def test_without_a_home_nothing_is_remembered(stranger, monkeypatch):
    Path("state").mkdir(exist_ok=True)
    Path("file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(Path("file").absolute()))
    call("check", "--deep", "r.toml")
    assert REFUSED in call("eval", "runs/a", "--with", "clean", code=2)


def test_a_file_of_any_name_is_looked_through(stranger):
    Path("net.txt").write_text("import sys\nsys.path.insert(0, 'lib')\n" + NET)
    for file in map(Path, ("r.toml", "runs/a/recipe.toml")):
        file.write_text(file.read_text().replace("net.py", "net.txt"))
    call("check", "--deep", "r.toml")
    assert REFUSED in call("check", "--deep", "runs/a/recipe.toml", code=2)
