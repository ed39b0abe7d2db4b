"""A folder with a small recipe, the command in it, and that recipe run."""

import json
import os
import shutil

import pytest
from click.testing import CliRunner

from prunekit.cli.group import main

RECIPE = """\
name = "tiny"
architecture = "small-cnn"
objective = "benign"
report = ["console", "jsonl"]
[dataset]
use = "digits"
fraction = 0.1
[[stage]]
kind = "pretrain"
epochs = 1
[[stage]]
kind = "evaluate"
with = ["clean"]
images = 20
"""


@pytest.fixture
def recipe():
    return RECIPE


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder but for r.toml, and in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRUNEKIT_STORE", raising=False)
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def call(here):
    def call(*arguments, code=0):
        """Run the command; its stdout and stderr."""
        done = CliRunner().invoke(main, [str(a) for a in arguments])
        assert done.exit_code == code, done.output
        if "--debug" not in arguments:
            assert "Traceback" not in done.output
        return done.stdout, done.stderr

    return call


@pytest.fixture
def read(call):
    def read(*arguments, code=0):
        """The same with --json: what stdout says."""
        content = json.loads(call(*arguments, "--json", code=code)[0])
        assert content.pop("schema_version") == 1
        return content

    return read


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder with r.toml run into runs/tiny."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "r.toml").write_text(RECIPE)
    old = os.getcwd()
    os.chdir(folder)
    try:
        done = CliRunner().invoke(main, ["run", "r.toml", "--device", "cpu"])
    finally:
        os.chdir(old)
    assert done.exit_code == 0, done.output
    return folder, done


@pytest.fixture
def ran(finished, here, monkeypatch):
    """In a copy of that folder."""
    shutil.copytree(finished[0], here / "copy")
    monkeypatch.chdir(here / "copy")
    return here / "copy"
