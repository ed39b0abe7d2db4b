"""`prunekit new plugin`: write the package of a plugin from templates."""

from __future__ import annotations

import importlib.util
import keyword
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

import click

from prunekit import __version__
from prunekit.catalog.component import API_VERSION
from prunekit.catalog.kinds import KINDS
from prunekit.catalog.registry import Entry, Registry, load_registry
from prunekit.cli.components import fragment, with_article
from prunekit.cli.group import PATH, as_json, echo, print_json, warn
from prunekit.errors import UserError, relative

TEMPLATES = Path(__file__).parent / "templates"
EXAMPLE = "my_plugin"
"""The name of the package in the templates."""


@click.group()
def new() -> None:
    """Write the files of something new: a plugin."""


@new.command("plugin")
@click.argument("name")
@click.option(
    "--kind", type=click.Choice(list(KINDS)), multiple=True, required=True, help="Can be repeated."
)
@click.option("--into", type=PATH, default=".", help="Folder to create it in; by default this one.")
@as_json
def new_plugin(name: str, kind: tuple[str, ...], into: Path, as_json: bool) -> None:
    """Write a package that adds components to prunekit: declaration, code, tests.

    It works as it is; edit it from there.
    """
    folder = make_plugin(name, kind, into, load_registry())
    if as_json:
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        print_json({"folder": str(folder), "files": files})
        return
    echo(relative(folder))
    warn(f"try it: cd {relative(folder)} && pip install -e . && python -m pytest")


def make_plugin(name: str, kinds: Sequence[str], into: Path, registry: Registry) -> Path:
    """Write the package of a plugin with a component of each kind; return its folder.

    Raises `UserError` if the name or the folder is taken or cannot be written; nothing remains of
    it then.
    """
    package = check_name(name, kinds, registry)
    name = package.replace("_", "-")
    folder = into / name
    if folder.exists():
        raise UserError(f"{relative(folder)} exists already; choose another name or --into")
    created = folder if into.exists() else into
    try:
        for file, text in write_files(name, package, kinds).items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        shutil.rmtree(created, ignore_errors=True)
        reason = f"cannot write {relative(folder)}: {error.strerror}"
        raise UserError(f"{reason}; choose another --into") from error
    return folder


def check_name(name: str, kinds: Sequence[str], registry: Registry) -> str:
    """The package's import name. Raises `UserError` if the name is invalid or taken."""
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
        proper = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")
        raise UserError(
            f"{name!r} cannot be the name of a plugin: use lowercase letters, digits and '-', "
            f"starting with a letter; write {proper or 'my-plugin'}"
        )
    package = name.replace("-", "_")
    component = package.replace("_", "-").removeprefix("prunekit-")
    claimed = [e for kind in kinds for e in registry.search(component, kind)]
    builtin = [e for e in registry.entries if e.distribution.startswith("prunekit ")]
    if package in {"prunekit", *(entry.component.package for entry in builtin)}:
        reason = f"{name!r} is a package of prunekit itself"
    elif keyword.iskeyword(package) or package in {*sys.builtin_module_names, "tests"}:
        reason = f"{name!r} has a special meaning in Python"
    # A folder without code has a spec too, but no origin.
    elif (spec := importlib.util.find_spec(package)) and spec.origin:
        reason = f"there is a package {package!r} in this environment"
    elif claimed:
        kind = with_article(claimed[0].kind)
        reason = f"there is {kind} {component!r} already, of plugin {claimed[0].owner}"
    else:
        return package
    raise UserError(f"{reason}; choose another name")


def read_template(name: str) -> dict[str, str]:
    """File name -> text of the files in a template; a line "==> FILE" starts each."""
    parts = re.split(r"^==> (.+)\n", (TEMPLATES / f"{name}.txt").read_text("utf-8"), flags=re.M)
    return {file: f"{text.strip()}\n" for file, text in zip(parts[1::2], parts[2::2], strict=True)}


def write_files(name: str, package: str, kinds: Sequence[str]) -> dict[str, str]:
    """File name -> content of a plugin's folder. Its components have the name of the plugin."""
    short = name.removeprefix("prunekit-")
    files: dict[str, str] = {}
    declarations = []
    # The reporter is first because a recipe's key `report` has to come before its tables.
    kinds = [kind for kind in dict.fromkeys(("reporter", *KINDS)) if kind in kinds]
    for kind in kinds:
        for file, code in read_template(kind).items():
            code = code.replace(EXAMPLE, package)
            if file == f"{EXAMPLE}/__init__.py":
                declarations.append(re.sub(r'name="[\w-]+"', f'name="{short}"', code))
            else:
                files[file.replace(EXAMPLE, package)] = code
    named = " and ".join(map(with_article, kinds)).capitalize()
    words = {
        "name": name,
        "package": package,
        "plugin": short,
        "version": __version__,
        "kinds": "Components" if len(kinds) > 2 else named,
        "recipe": "\n\n".join(_write_fragment(kind, short) for kind in kinds),
    }
    return {
        **{
            file: Template(text).substitute(words) for file, text in read_template("plugin").items()
        },
        f"{package}/__init__.py": _merge(f'"""{words["kinds"]} for prunekit."""', declarations),
        **files,
    }


def _write_fragment(kind: str, name: str) -> str:
    recipe = fragment(Entry(KINDS[kind](name=name, summary="", build=""), "", ""))
    # Stages of one kind, beside those of an optimizer and a pruner, need names.
    named = f'[[stage]]\nname = "with-{kind}"\n'
    return recipe if kind in ("optimizer", "pruner") else recipe.replace("[[stage]]\n", named)


def _merge(docstring: str, declarations: Sequence[str]) -> str:
    """One module made of several: every import once, then the definitions of each."""
    marker = f"PRUNEKIT_API = {API_VERSION}\n"
    imports: dict[str, set[str]] = {}
    bodies = []
    for code in declarations:
        head, _, body = code.partition(marker)
        for module, names in re.findall(r"^from (\S+) import (.+)$", head, re.MULTILINE):
            imports.setdefault(module, set()).update(names.split(", "))
        bodies.append(body.strip("\n"))
    groups = ["", ""]  # imports from the standard library, then from prunekit
    for module, found in sorted(imports.items()):
        line = f"from {module} import {', '.join(sorted(found))}\n"
        if len(line) > 89:
            names = "".join(f"    {name},\n" for name in sorted(found))
            line = f"from {module} import (\n{names})\n"
        groups[module.startswith("prunekit")] += line
    head = "\n".join(filter(None, groups))
    return f"{docstring}\n\n{head}\n{marker}\n\n" + "\n\n\n".join(bodies) + "\n"
