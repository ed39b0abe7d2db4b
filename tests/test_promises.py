"""Promises about the whole."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import prunekit
from prunekit.catalog.kinds import KINDS
from prunekit.catalog.registry import load_registry
from prunekit.recipe.plan import make_plan
from prunekit.recipe.toml.document import load_recipe

ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "prunekit").rglob("*.py"))
PLUGINS = sorted(p for p in (ROOT / "plugins").iterdir() if p.name.startswith("prunekit_"))
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, at whatever depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_core_imports_no_plugin(path):
    assert not imported(path) & {p.name for p in PLUGINS}


@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "--json"],
        ["--help"],
        *([command, "--help"] for command in ("import", "export", "eval", "run")),
        ["run", "gone.toml"],
        ["run", "recipes/quickstart.toml", "--set", "x=1"],
        ["show", "trades"],
        ["check", "recipes/quickstart.toml"],
        ["completion", "bash"],
        ["new", "plugin", "--help"],
    ],
    ids=" ".join,
)
def test_reading_and_refusing_import_no_torch(arguments):
    code = (
        "import sys\n"
        "from prunekit.cli.group import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert end.code in (0, None, 2), end.code\n"
        "loaded = {'torch', 'numpy', 'torchvision', 'timm'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_small_run_imports_no_more_than_torch(tmp_path):
    """Each of these takes longer to import than the rest of a small run takes."""
    code = (
        "import sys\n"
        "from prunekit.cli.group import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "heavy = {'torch._dynamo', 'torchvision', 'timm', 'scipy', 'sympy', 'auto_LiRPA'}\n"
        "assert 'torch' in sys.modules and not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    recipe = str(ROOT / "recipes/quickstart.toml")
    arguments = ["run", recipe, "--smoke", "--device", "cpu", "--out", str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipe_resolves(recipe):
    plan = make_plan(load_recipe(recipe), load_registry())
    assert plan.runs


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipe_begins_with_the_command_that_runs_it(recipe):
    first = recipe.read_text().splitlines()[0]
    assert first == f"# uv run prunekit run {recipe.relative_to(ROOT).as_posix()}"


@pytest.mark.parametrize("kind", KINDS)
def test_hook_shows_a_plugin_that_works(kind, tmp_path, monkeypatch):
    """The example of each kind, written to disk, keeps the contract."""
    from prunekit.cli.new import read_template
    from prunekit.testing import check_component, find_components

    package = f"documented_{kind}"
    for name, code in read_template(kind).items():
        file = tmp_path / name.replace("my_plugin", package)
        file.parent.mkdir(exist_ok=True)
        file.write_text(code.replace("my_plugin", package))
    monkeypatch.syspath_prepend(tmp_path)
    (component,) = find_components(package)
    assert component.kind == kind
    check_component(component)


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda p: p.name)
def test_plugins_name_the_other_plugins_whose_code_they_use(plugin):
    """What decides a result is in its key: `Component.sources` names what is imported."""
    names = {p.name for p in PLUGINS}
    for entry in load_registry().entries:
        if entry.component.package == plugin.name:
            module = entry.component.build.partition(":")[0].replace(".", "/")
            used = reach(plugin.parent / module)
            assert used & names - {plugin.name} <= set(entry.component.sources), entry


def reach(module: Path, known: frozenset[str] = frozenset()) -> set[str]:
    """Packages that a plugin's module imports, through modules of its own package as well."""
    file = (
        module.with_suffix(".py") if module.with_suffix(".py").exists() else module / "__init__.py"
    )
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    used = {name.partition(".")[0] for name in found}
    package = module.relative_to(ROOT / "plugins").parts[0]
    for name in found - known:
        if name.partition(".")[0] == package:
            used |= reach(ROOT / "plugins" / name.replace(".", "/"), known | found)
    return used


def test_plugins_import_what_is_public():
    """The modules at the root, from which all that is worth having can be imported."""
    public = {"contexts", "contracts", "errors", "evaluation", "judging", "reading", "report"}
    public |= {"steps", "testing"}
    for file in (ROOT / "plugins").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "prunekit":
                assert {alias.name for alias in node.names} <= {*prunekit.__all__}, file
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prunekit."):
                assert node.module.partition(".")[2] in public, file


def test_what_is_public_is_there_and_documented():
    page = (ROOT / "docs/plugins.md").read_text()
    for name in prunekit.__all__:
        assert getattr(prunekit, name) is not None
        assert f"`{name}`" in page or f"`prunekit.{name}" in page, name


def test_every_plugin_has_a_test_file():
    missing = [
        p.name
        for p in PLUGINS
        if not (ROOT / "tests/plugins" / f"test_{p.name.removeprefix('prunekit_')}.py").exists()
    ]
    assert missing == []


def test_tests_stand_where_what_they_test_stands():
    folders = {p.parent.name for p in (ROOT / "prunekit").glob("*/__init__.py")}
    assert folders <= {p.name for p in (ROOT / "tests").iterdir() if p.is_dir()}
    tests = [
        file.relative_to(ROOT / "tests")
        for folder in folders
        for file in (ROOT / "tests" / folder).rglob("test_*.py")
    ]
    strays = [
        file.as_posix()
        for file in tests
        if not (ROOT / "prunekit" / file.with_name(file.name.removeprefix("test_"))).exists()
    ]
    assert strays == [], "a file of tests is called after the module of prunekit/ that it tests"


def test_declarations_import_no_torch():
    modules = [p.name for p in PLUGINS]
    code = f"import sys, {', '.join(modules)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_table_of_components_in_the_readme_is_current(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import readme_tables

    text = (ROOT / "README.md").read_text()
    assert readme_tables.put(text, "components", readme_tables.write_components()) == text


def test_recipe_in_the_readme_passes_check(tmp_path):
    (block,) = (
        b for b in re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        if "[[stage]]" in b
    )  # fmt: skip
    recipe = tmp_path / "readme.toml"
    recipe.write_text(block)
    assert len(make_plan(load_recipe(recipe), load_registry()).runs) == 18


def test_output_of_the_quickstart_in_the_readme_is_that_of_its_recipe():
    """Every combination of the sweep has its row, and nothing else has."""
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"<!-- quickstart -->\n```text\n(.*?)```", text, re.DOTALL)
    rows = [line.split()[1:3] for line in block.splitlines() if line.split()[:1] == ["pruned"]]
    plan = make_plan(load_recipe(ROOT / "recipes/quickstart.toml"), load_registry())
    wanted = [[str(r.settings["prune.sparsity"]), r.settings["prune.pruner"]] for r in plan.runs]
    assert rows == wanted
