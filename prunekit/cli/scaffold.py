"""`prunekit new plugin`: a package that works, made of the examples that the hooks show."""

from __future__ import annotations

import importlib.util
import inspect
import keyword
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from prunekit import __version__
from prunekit.catalog import hookspecs
from prunekit.catalog.component import KINDS, Component
from prunekit.catalog.registry import Entry, Registry
from prunekit.cli.components import fragment
from prunekit.errors import UserError, relative

EXAMPLE = "my_plugin"
"""The package of the examples."""


PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "0.1.0"
description = "{kinds} for prunekit."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["prunekit>={version}"]

[project.entry-points.prunekit]
{plugin} = "{package}"

[dependency-groups]
dev = ["pytest"]

[tool.hatch.build.targets.wheel]
packages = ["{package}"]

[tool.pytest.ini_options]
addopts = "--import-mode=importlib"
pythonpath = ["."]
testpaths = ["tests"]
"""


README = """\
# {name}

{kinds} for prunekit.

```sh
pip install -e .
prunekit list                 # it is there
prunekit show {plugin}
```

In a recipe:

```toml
{recipe}
```

`{package}/__init__.py` declares, without importing torch; the modules beside it do the work.

```sh
python -m pytest              # the contract that prunekit holds a component to, and your own tests
```
"""


CONTRACT = """\
import pytest
from prunekit.testing import check_component, find_components


@pytest.mark.parametrize(("kind", "component"), find_components("{package}"))
def test_contract(kind, component):
    check_component(kind, component)
"""


IGNORED = "__pycache__/\n*.egg-info/\n.venv/\ndist/\n"


def read_example(kind: str) -> dict[str, str]:
    """File name -> code of the example in the hook's docstring; a comment names each file."""
    files: dict[str, list[str]] = {}
    name = ""
    for line in inspect.cleandoc(getattr(hookspecs, f"prunekit_{kind}s").__doc__).splitlines():
        if found := re.fullmatch(rf"# ((?:{EXAMPLE}|tests)/\w+\.py)", line):
            name = found[1]
            files[name] = []
        elif name:
            files[name].append(line)
    return {name: "\n".join(lines).strip("\n") + "\n" for name, lines in files.items()}


def make_plugin(name: str, kinds: Sequence[str], into: Path, registry: Registry) -> Path:
    """Write the package of a plugin with a component of each kind; its folder.

    Raises `UserError` where the name or the place is taken; nothing is half-written then.
    """
    package = check_name(name, kinds, registry)
    name = package.replace("_", "-")
    folder = into / name
    if folder.exists():
        raise UserError(f"{relative(folder)} is there already; choose another name or --into")
    existed = into.exists()
    try:
        into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=into, prefix=f".{name}-") as scratch:
            made = Path(scratch) / name
            for file, text in write_files(name, package, kinds).items():
                (made / file).parent.mkdir(parents=True, exist_ok=True)
                (made / file).write_text(text, encoding="utf-8")
            made.rename(folder)
    except OSError as error:
        if not existed:
            shutil.rmtree(into, ignore_errors=True)
        raise UserError(
            f"cannot write {relative(folder)}: {error.strerror}; choose another --into"
        ) from error
    return folder


def check_name(name: str, kinds: Sequence[str], registry: Registry) -> str:
    """The package's import name. Raises `UserError` where the name cannot be, or is taken."""
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
        proper = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")
        raise UserError(
            f"{name!r} cannot be the name of a plugin: small letters, digits and '-', beginning "
            f"with a letter; write {proper or 'my-plugin'}"
        )
    package = name.replace("-", "_")
    ours = {"prunekit", *(e.component.package for e in registry.entries if e.ours)}
    if package in ours:
        raise UserError(f"{name!r} is a package of prunekit's own; choose another name")
    if keyword.iskeyword(package) or package in {*sys.builtin_module_names, "tests"}:
        raise UserError(f"{name!r} has a meaning of its own in Python; choose another name")
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.origin is not None:  # a mere folder has none
        raise UserError(f"there is a package {package!r} in this environment; choose another name")
    component = package.replace("_", "-").removeprefix("prunekit-")
    for entry in registry.entries:
        if entry.kind in kinds and entry.component.name == component:
            raise UserError(
                f"there is {_with_article(entry.kind)} {component!r} already, of plugin "
                f"{entry.owner}; choose another name"
            )
    return package


def write_files(name: str, package: str, kinds: Sequence[str]) -> dict[str, str]:
    """File name -> content of a plugin's folder. Its components are called as the plugin is."""
    short = name.removeprefix("prunekit-")
    files: dict[str, str] = {}
    declarations = []
    # A recipe's `report` comes before its tables.
    kinds = sorted(dict.fromkeys(kinds), key=lambda kind: (kind != "reporter", KINDS.index(kind)))
    for kind in kinds:
        for file, code in read_example(kind).items():
            code = code.replace(EXAMPLE, package)
            if file == f"{EXAMPLE}/__init__.py":
                declarations.append(re.sub(r'name="[\w-]+"', f'name="{short}"', code))
            else:
                files[file.replace(EXAMPLE, package)] = code
    named = [_with_article(kind) for kind in kinds]
    words = {
        "name": name,
        "package": package,
        "plugin": short,
        "version": __version__,
        "kinds": "Components" if len(kinds) > 2 else " and ".join(named).capitalize(),
        "recipe": "\n\n".join(_write_recipe(kind, short) for kind in kinds),
    }
    return {
        "pyproject.toml": PYPROJECT.format(**words),
        "README.md": README.format(**words),
        ".gitignore": IGNORED,
        f"{package}/__init__.py": _merge(f'"""{words["kinds"]} for prunekit."""', declarations),
        **files,
        "tests/test_contract.py": CONTRACT.format(**words),
    }


def _with_article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeo" else f"a {kind}"


def _write_recipe(kind: str, name: str) -> str:
    recipe = fragment(Entry(kind, Component(name=name, summary="", build=""), "", ""))
    # Beside the stage that shows an optimizer.
    return (
        recipe.replace("[[stage]]\n", '[[stage]]\nname = "scheduled"\n')
        if kind == "schedule"
        else recipe
    )


def _merge(docstring: str, declarations: Sequence[str]) -> str:
    """One module of several: each import once, then what each defines."""
    imports: dict[str, set[str]] = {}
    bodies = []
    for code in declarations:
        head, _, body = code.partition("PRUNEKIT_API = 2\n")
        for module, names in re.findall(r"^from (\S+) import (.+)$", head, re.MULTILINE):
            imports.setdefault(module, set()).update(names.split(", "))
        bodies.append(body.strip("\n"))
    groups = ["", ""]  # the standard library's, then others
    for module, names in sorted(imports.items()):
        ours = module.startswith("prunekit")
        groups[ours] += f"from {module} import {', '.join(sorted(names))}\n"
    head = "\n".join(filter(None, groups))
    return f"{docstring}\n\n{head}\nPRUNEKIT_API = 2\n\n\n" + "\n\n\n".join(bodies) + "\n"
