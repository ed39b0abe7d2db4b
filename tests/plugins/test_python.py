"""A network of one's own: what is called, what is hashed, and every mistake in one line."""

import json
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest
import torch
from prunekit_python import PythonOptions, find_files, find_imports, prunekit_architectures
from prunekit_python.loading import build_python
from safetensors.torch import load_file, save_file

from prunekit.contexts import ArchitectureContext
from prunekit.errors import UserError
from prunekit.testing import check_component, example_context

COMPONENT, _ = prunekit_architectures()

NET = """\
from math import prod

from torch import nn

from blocks import block


def make(shape, classes, *, width=4):
    return nn.Sequential(block(shape[0], width), nn.Flatten(),
                         nn.Linear(width * prod(shape[1:]), classes))
"""
BLOCKS = """\
from torch import nn


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())
"""

RECIPE = """
[dataset]
use = "npz"
file = "images.npz"
batch_size = 8
validation = 0.25
[architecture]
use = "python"
file = "mine/net.py"
[objective]
use = "benign"
[[stage]]
kind = "pretrain"
epochs = 1
[[stage]]
kind = "prune"
sparsity = 0.5
pruner = "lwm"
[[stage]]
kind = "evaluate"
with = ["clean"]
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("net.py", NET)
    write("blocks.py", BLOCKS)
    (tmp_path / "r.toml").write_text(RECIPE)
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (24, 8, 8), dtype=np.uint8), np.arange(24) % 3
    np.savez("images.npz", x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    return tmp_path


def write(name, text):
    file = Path("mine") / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file.absolute()


def build(text=None, *, build="make", kwargs=None, shape=(1, 8, 8), classes=3):
    file = Path("mine/net.py").absolute() if text is None else write("net.py", text)
    context = example_context(ArchitectureContext, shape=shape, classes=classes)
    return build_python(PythonOptions(file, build, kwargs or {}), context)


def reused(folder):
    return [s["reused"] for s in json.loads((Path(folder) / "run.json").read_text())["stages"]]


# What is called


def test_contract(here):
    check_component(COMPONENT, {"file": "mine/net.py"}, folder=here)


@pytest.mark.parametrize(
    ("head", "arguments", "kwargs"),
    [
        ("def make(shape, classes):", "shape[0] * 64, classes", {}),
        ("def make():", "64, 3", {}),
        ("def make(classes, inputs=9):", "inputs, classes", {"inputs": 64}),
        ("def make(*, shape, **rest):", "64, rest['k']", {"k": 3}),
        ("make = lambda shape:", "64, 3", {}),
    ],
)
def test_functions_are_called_with_what_they_take(head, arguments, kwargs):
    body = f"nn.Sequential(nn.Flatten(), nn.Linear({arguments}))"
    body = f" {body}" if "lambda" in head else f"\n    return {body}"
    net = build(f"from torch import nn\n{head}{body}\n", kwargs=kwargs)
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_a_class_serves_as_a_function():
    text = """
from torch import nn

class Net(nn.Module):
    leave_dense = ("fc.weight",)

    def __init__(self, classes):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 1, 1), nn.Linear(64, classes)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))
"""
    assert build(text, build="Net").leave_dense == ("fc.weight",)


def test_files_in_two_folders_keep_apart():
    """Both import a module of the same name."""
    first = build()
    write("../yours/blocks.py", BLOCKS.replace("ReLU", "Tanh"))
    file = write("../yours/net.py", NET)
    second = build_python(
        PythonOptions(file), example_context(ArchitectureContext, shape=(1, 8, 8), classes=3)
    )
    assert [type(net[0][1]).__name__ for net in (first, second)] == ["ReLU", "Tanh"]
    assert type(build()[0][1]).__name__ == "ReLU"
    assert not list(Path("mine").glob("__pycache__"))


def test_what_the_file_prints_is_no_result(capsys):
    build("print('hello')\n" + NET)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "hello\n")


# From recipe to result


def test_a_run_its_evaluation_and_an_import(call, here):
    call("run", "r.toml", "--out", "runs/r")
    metrics = json.loads((here / "runs/r/run.json").read_text())["stages"][-1]["metrics"]
    # From another folder: the recipe of the run has the whole path.
    told = json.loads(call("eval", "runs/r", "--with", "clean", "--json")[0])["metrics"]
    assert told["clean.accuracy"] == metrics["clean.accuracy"]
    save_file(load_file("runs/r/model.safetensors"), "plain.safetensors")
    rest = ["--dataset", "npz", "--set", "dataset.file=images.npz", "--out", "runs/theirs"]
    call("import", "dense", "plain.safetensors", "--model", "python", *rest,
         "--set", "architecture.file=mine/net.py")  # fmt: skip
    told = json.loads(call("eval", "runs/theirs", "--with", "clean", "--json")[0])["metrics"]
    assert told["clean.accuracy"] == metrics["clean.accuracy"]
    assert told["sparsity"]["value"] == 0.5
    (here / "mine").rename(here / "moved")
    told = call("eval", "runs/r", "--with", "clean", "--images", "4", code=2)[1]
    assert "there is no" in told
    call("eval", "runs/r", "--with", "clean", "--images", "4",
         "--set", "architecture.file=moved/net.py")  # fmt: skip


def test_left_dense_as_the_network_says(call):
    write("net.py", NET.replace("    return", "    net =") + "    net.leave_dense = ['0.*']\n"
          "    return net\n")  # fmt: skip
    told = call("run", "r.toml", "--out", "a")[1]
    assert "note: left dense by the architecture (exclude = [] prunes them too): 0.0.weight" in told
    state = load_file("a/model.safetensors")
    assert [int((state[n] == 0).sum()) for n in ("0.0.weight", "2.weight")] == [0, 384]
    call("run", "r.toml", "--out", "b", "--set", "prune.exclude=[]")
    state = load_file("b/model.safetensors")
    assert [int((state[n] == 0).sum()) for n in ("0.0.weight", "2.weight")] == [18, 384]
    write("net.py", NET.replace("    return", "    net =") + "    net.leave_dense = ['head']\n"
          "    return net\n")  # fmt: skip
    assert "pattern 'head' matches no prunable weight" in call("run", "r.toml", code=1)[1]


# What is hashed


def test_the_file_and_what_it_imports_are_hashed(call):
    call("run", "r.toml", "--out", "runs/a")
    call("run", "r.toml", "--out", "runs/b")
    assert reused("runs/b") == [True] * 3
    write("unrelated.py", "x = 1\n")
    call("run", "r.toml", "--out", "runs/c")
    assert reused("runs/c") == [True] * 3
    write("blocks.py", BLOCKS + "\n# another\n")
    call("run", "r.toml", "--out", "runs/d")
    assert reused("runs/d") == [False] * 3
    assert "has changed: running it again" in call("run", "r.toml", "--out", "runs/a")[1]
    write("net.py", NET + "\n# another\n")
    call("run", "r.toml", "--out", "runs/e")
    assert reused("runs/e") == [False] * 3


def test_the_names_of_what_it_imports_are_hashed(call, here):
    write("blocks.py", "import pkg\n" + BLOCKS)
    write("pkg/__init__.py", "")
    write("pkg/one.py", "x = 1\n")
    call("run", "r.toml", "--out", "runs/a")
    (here / "mine/pkg/one.py").rename(here / "mine/pkg/two.py")
    call("run", "r.toml", "--out", "runs/b")
    assert reused("runs/b") == [False] * 3


def test_imports_are_found_at_any_depth(here):
    write("net.py", "import os, a.deep\nfrom b import x\n\ndef f():\n    import d\n")
    write("a/__init__.py", "")
    write("a/deep.py", "")
    write("a/data.txt", "")
    write("b.py", "import b, e\n")
    for name in ("c.py", "d.py", "e.py", "f.py"):
        write(name, "")
    found = find_imports(here / "mine/net.py")
    assert found[0] == here / "mine/net.py"
    names = sorted(str(f.relative_to(here / "mine")) for f in found)
    assert names == ["a/__init__.py", "a/deep.py", "b.py", "d.py", "e.py", "net.py"]
    # A package stands before an installed one, and before a module beside it, however it is made.
    write("net.py", "import click\n")
    write(f"click/__init__{EXTENSION_SUFFIXES[0]}", "")
    assert len(find_imports(here / "mine/net.py")) == 2
    write("net.py", "def broken(:\n")
    assert find_files(PythonOptions(here / "mine/net.py")) == [here / "mine/net.py"]
    assert find_imports(here / "none.py") == []
    write("net.py", "from . import c\n")
    assert here / "mine/c.py" in find_imports(here / "mine/net.py")


# Mistakes


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("def make(:\n", {}, "mine/net.py:1: invalid syntax"),
        ("\nimport nothing_like_it\n", {},
         "mine/net.py:2: ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("raise SystemExit\n", {}, "mine/net.py:1: SystemExit"),
        ("def build():\n    pass\n", {"build": "buld"},
         "mine/net.py has no function or class 'buld'; did you mean 'build'?"),
        ("x = 1\n", {}, "mine/net.py has no function or class 'make'; it defines none"),
        ("\n\ndef make():\n    return 3\n", {},
         "mine/net.py:3: make has to return an nn.Module, but it returns a value of type int"),
        ("def make():\n    raise ValueError('no\\nway')\n", {},
         "mine/net.py:2: ValueError: no way"),
        ("\ndef make(shape):\n    pass\n", {"kwargs": {"depth": 1}},
         "mine/net.py:2: make is called with shape, depth: got an unexpected keyword argument "
         "'depth'"),
        ("def make(width):\n    pass\n", {},
         "mine/net.py:1: make is called with no arguments: missing a required argument: 'width'"),
        ("from torch import nn\nclass make(nn.Module):\n    def forward(self, x):\n"
         "        return x @ x[0, 0, :3]\n", {},
         "mine/net.py:4: RuntimeError: "),
        ("from blocks import bloc\n", {},
         "mine/net.py:1: ImportError: cannot import name 'bloc' from 'blocks'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_file_and_line(text, options, message):
    with pytest.raises(UserError) as error:
        build(text, **options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_mistake_in_a_helper_names_the_helper():
    write("blocks.py", "def block(inputs, outputs):\n    return inputs / 0\n")
    with pytest.raises(UserError, match=r"^mine/blocks.py:2: ZeroDivisionError: division by zero$"):
        build()


def test_a_missing_file_is_told_with_the_recipes_line(call, here):
    Path("r.toml").write_text(RECIPE.replace("mine/net.py", "mine/no.py"))
    told = call("check", "r.toml", code=2)[1]
    assert told.startswith("r.toml:9: file of architecture 'python': there is no ")
    Path("r.toml").write_text(RECIPE.replace("mine/net.py", "mine"))
    told = call("check", "r.toml", code=2)[1]
    assert (
        told == "r.toml:9: architecture 'python': mine is a folder; write the Python file in it\n"
    )
    Path("r.toml").write_text(RECIPE.replace('"mine/net.py"', '"mine/net.py"\nbuild = "mak"'))
    call("check", "r.toml")
    told = call("check", "--deep", "r.toml", code=2)[1]
    assert told == "r.toml: mine/net.py has no function or class 'mak'; did you mean 'make'?\n"
