"""Commands that start something: new plugin, completion."""

from __future__ import annotations

import importlib.util
import keyword
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from string import Template

import click

from prunekit import __version__
from prunekit.catalog.component import API_VERSION, KINDS, Component
from prunekit.catalog.registry import Entry, Registry, load_registry
from prunekit.cli.components import fragment
from prunekit.cli.group import as_json, print_json
from prunekit.errors import UserError, relative

TEMPLATES = Path(__file__).parent / "templates"
EXAMPLE = "my_plugin"
"""The package of the examples."""


@click.group()
def new() -> None:
    """Write something to start from: a plugin."""


@new.command("plugin")
@click.argument("name")
@click.option(
    "--kind",
    "kinds",
    type=click.Choice(KINDS),
    multiple=True,
    required=True,
    help="What it adds. May be given again.",
)
@click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False),
    default=".",
    help="Where its folder goes; where you are by default.",
)
@as_json
def new_plugin(name: str, kinds: tuple[str, ...], into: Path, as_json: bool) -> None:
    """Write a package that adds components to prunekit: declaration, code, tests.

    It works as it is: change it from there.
    """
    folder = make_plugin(name, kinds, into, load_registry())
    if as_json:
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        print_json({"folder": str(folder), "files": files})
        return
    click.echo(relative(folder))
    click.echo(f"try it: cd {relative(folder)} && pip install -e . && python -m pytest", err=True)


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
    reason = ""
    spec = None if package in ours else importlib.util.find_spec(package)
    if package in ours:
        reason = f"{name!r} is a package of prunekit's own"
    elif keyword.iskeyword(package) or package in {*sys.builtin_module_names, "tests"}:
        reason = f"{name!r} has a meaning of its own in Python"
    elif spec is not None and spec.origin is not None:  # a mere folder has none
        reason = f"there is a package {package!r} in this environment"
    component = package.replace("_", "-").removeprefix("prunekit-")
    for entry in registry.entries:
        if entry.kind in kinds and entry.component.name == component and not reason:
            kind = _with_article(entry.kind)
            reason = f"there is {kind} {component!r} already, of plugin {entry.owner}"
    if reason:
        raise UserError(f"{reason}; choose another name")
    return package


def read_template(name: str) -> dict[str, str]:
    """File name -> text of what a template holds; a line "==> FILE" starts each."""
    parts = re.split(r"^==> (.+)\n", (TEMPLATES / f"{name}.txt").read_text("utf-8"), flags=re.M)
    return {file: f"{text.strip()}\n" for file, text in zip(parts[1::2], parts[2::2], strict=True)}


def write_files(name: str, package: str, kinds: Sequence[str]) -> dict[str, str]:
    """File name -> content of a plugin's folder. Its components are called as the plugin is."""
    short = name.removeprefix("prunekit-")
    files: dict[str, str] = {}
    declarations = []
    # A recipe's `report` comes before its tables.
    kinds = sorted(dict.fromkeys(kinds), key=lambda kind: (kind != "reporter", KINDS.index(kind)))
    for kind in kinds:
        for file, code in read_template(kind).items():
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
        "recipe": "\n\n".join(_write_fragment(kind, short) for kind in kinds),
    }
    common = read_template("plugin").items()
    return {
        **{file: Template(text).substitute(words) for file, text in common},
        f"{package}/__init__.py": _merge(f'"""{words["kinds"]} for prunekit."""', declarations),
        **files,
    }


def _with_article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeo" else f"a {kind}"


def _write_fragment(kind: str, name: str) -> str:
    recipe = fragment(Entry(kind, Component(name=name, summary="", build=""), "", ""))
    # Beside the stage that shows an optimizer.
    named = '[[stage]]\nname = "scheduled"\n'
    return recipe.replace("[[stage]]\n", named) if kind == "schedule" else recipe


def _merge(docstring: str, declarations: Sequence[str]) -> str:
    """One module of several: each import once, then what each defines."""
    marker = f"PRUNEKIT_API = {API_VERSION}\n"
    imports: dict[str, set[str]] = {}
    bodies = []
    for code in declarations:
        head, _, body = code.partition(marker)
        for module, names in re.findall(r"^from (\S+) import (.+)$", head, re.MULTILINE):
            imports.setdefault(module, set()).update(names.split(", "))
        bodies.append(body.strip("\n"))
    groups = ["", ""]  # the standard library's, then others
    for module, found in sorted(imports.items()):
        ours = module.startswith("prunekit")
        groups[ours] += f"from {module} import {', '.join(sorted(found))}\n"
    head = "\n".join(filter(None, groups))
    return f"{docstring}\n\n{head}\n{marker}\n\n" + "\n\n\n".join(bodies) + "\n"


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def print_completion(shell: str) -> None:
    r"""Print what makes a SHELL complete commands, components and recipes.

    \b
    bash   eval "$(prunekit completion bash)"      in ~/.bashrc
    zsh    eval "$(prunekit completion zsh)"       in ~/.zshrc, after compinit
    fish   prunekit completion fish | source       in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    from prunekit.cli.group import main

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, "prunekit", "_PRUNEKIT_COMPLETE").source())
