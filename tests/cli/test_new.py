"""`prunekit new plugin`: what it writes works at once, and mistakes leave nothing behind."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from prunekit.catalog.component import API_VERSION
from prunekit.catalog.kinds import KINDS
from prunekit.catalog.registry import load_registry
from prunekit.cli import new
from prunekit.cli.group import main
from prunekit.recipe.plan import make_plan
from prunekit.recipe.toml.document import load_recipe

NAMES = {f"acme-{kind}".replace("_", "-"): (kind,) for kind in KINDS} | {"acme-all": tuple(KINDS)}


def call(*arguments, code=0):
    done = CliRunner().invoke(main, ["new", "plugin", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A plugin of each kind, and one with all of them."""
    into = tmp_path_factory.mktemp("made") / "here"
    for name, kinds in NAMES.items():
        call(name, *(word for kind in kinds for word in ("--kind", kind)), "--into", into)
    return into


@pytest.mark.slow
def test_its_own_tests_pass_as_soon_as_it_is_written(made):
    """In one process for all of them, as torch takes its time; each has its folder's settings."""
    tests = [made / name / "tests" for name in NAMES]
    paths = os.pathsep.join(str(made / name) for name in NAMES)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider",
         "-W", "error", *tests],
        cwd=made, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # The contract and a test of its own, for each kind.
    assert done.stdout.splitlines()[-1].startswith(f"{4 * len(KINDS)} passed")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ruff_finds_nothing(made, name):
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "--select", "E,F,I,W,UP,B,SIM,PT,RET"], ["format", "--check"]):
        done = subprocess.run(
            [*ruff, *command, "."], cwd=made / name, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_it_is_packaged_as_a_plugin(made, name):
    project = tomllib.loads((made / name / "pyproject.toml").read_text())
    assert project["project"]["name"] == name
    package = name.replace("-", "_")
    assert project["project"]["entry-points"]["prunekit"] == {name: package}
    (requirement,) = project["project"]["dependencies"]
    assert requirement.startswith("prunekit>=")
    declaration = (made / name / package / "__init__.py").read_text()
    assert f"\nPRUNEKIT_API = {API_VERSION}\n" in declaration


@pytest.fixture
def forget():
    """Afterwards the name of the plugin that was imported is free again."""
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "acme_all"]:
        del sys.modules[name]


def test_it_runs_in_a_recipe_once_its_entry_point_is_there(made, monkeypatch, tmp_path, forget):
    info = tmp_path / "acme_all-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-all\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[prunekit]\nacme-all = acme_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(made / "acme-all")
    monkeypatch.chdir(tmp_path)
    readme = (made / "acme-all/README.md").read_text()
    recipe = readme.partition("```toml\n")[2].partition("```")[0]
    Path("r.toml").write_text(recipe)
    plan = make_plan(load_recipe(Path("r.toml")), load_registry())
    owners = {use.plugin for use in plan.runs[0].uses()}
    ours = {f"{name} (prunekit 0.1.0)" for name in ("optimizers", "budgets", "pruners")}
    assert owners == {"acme-all (acme-all 0.1.0)", *ours}
    done = CliRunner().invoke(main, ["run", "r.toml", "--smoke", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    # By now the name is taken.
    (message,) = call("acme-all", "--kind", "pruner", code=2).stderr.splitlines()
    assert message == (
        "prunekit: there is a package 'acme_all' in this environment; choose another name"
    )


def test_underscores_and_a_prefix_are_as_good(tmp_path):
    done = call("prunekit_my_way", "--kind", "pruner", "--into", tmp_path, "--json")
    told = json.loads(done.stdout)
    assert told["folder"] == str(tmp_path / "prunekit-my-way")
    assert "prunekit_my_way/small.py" in told["files"]
    project = tomllib.loads((tmp_path / "prunekit-my-way/pyproject.toml").read_text())
    assert project["project"]["entry-points"]["prunekit"] == {"my-way": "prunekit_my_way"}
    assert 'name="my-way"' in (tmp_path / "prunekit-my-way/prunekit_my_way/__init__.py").read_text()


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("My Plugin", "pruner", "cannot be the name of a plugin: use lowercase letters, digits "
         "and '-', starting with a letter; write my-plugin"),
        ("7", "pruner", "write my-plugin"),
        ("../x", "pruner", "write x"),
        ("prunekit", "pruner", "'prunekit' is a package of prunekit itself; choose another name"),
        ("prunekit-pruners", "pruner", "is a package of prunekit itself"),
        ("class", "pruner", "has a special meaning in Python"),
        ("torch", "pruner", "there is a package 'torch' in this environment"),
        ("json", "pruner", "there is a package 'json' in this environment"),
        ("lwm", "pruner", "there is a pruner 'lwm' already, of plugin pruners (prunekit "),
        ("prunekit-trades", "objective", "there is an objective 'trades' already, of plugin adv"),
    ],
)  # fmt: skip
def test_a_name_that_cannot_be(tmp_path, name, kind, message):
    done = call(name, "--kind", kind, "--into", tmp_path / "new", code=2)
    (line,) = done.stderr.splitlines()
    assert message in line
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (line,) = call("mine", "--kind", "pruner", "--into", tmp_path, code=2).stderr.splitlines()
    assert line.endswith("mine exists already; choose another name or --into")
    assert list((tmp_path / "mine").iterdir()) == []


def test_nothing_is_half_written(tmp_path, monkeypatch):
    def write(name, package, kinds):
        yield from {"a.py": "x = 1\n", "a.py/b.py": ""}.items()

    monkeypatch.setattr(new, "write_files", lambda *a: dict(write(*a)))
    for into in (tmp_path, tmp_path / "new"):
        (line,) = call("mine", "--kind", "pruner", "--into", into, code=2).stderr.splitlines()
        assert "cannot write" in line
    assert list(tmp_path.iterdir()) == []


def test_a_kind_is_needed_and_has_to_be_one():
    assert "Missing option '--kind'" in call("mine", code=2).stderr
    assert "'prunner' is not one of" in call("mine", "--kind", "prunner", code=2).stderr
