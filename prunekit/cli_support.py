"""Commands for authors of plugins and for people in trouble: new, doctor, completion."""

from __future__ import annotations

from pathlib import Path

import click

from prunekit.cli import as_json, main, print_json
from prunekit.component import KINDS
from prunekit.errors import relative


@main.group()
def new() -> None:
    """Write something to start from: a plugin."""


@new.command("plugin")
@click.argument("name")
@click.option("--kind", "kinds", type=click.Choice(KINDS), multiple=True, required=True,
              help="What it adds. May be given again.")  # fmt: skip
@click.option("--into", type=click.Path(path_type=Path, file_okay=False), default=".",
              help="Where its folder goes; where you are by default.")  # fmt: skip
@as_json
def new_plugin(name: str, kinds: tuple[str, ...], into: Path, as_json: bool) -> None:
    """Write a package that adds components to prunekit: declaration, code, tests.

    It works as it is: change it from there.
    """
    from prunekit.registry import load_registry
    from prunekit.scaffold import make_plugin

    folder = make_plugin(name, kinds, into, load_registry())
    if as_json:
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        print_json({"folder": str(folder), "files": files})
        return
    click.echo(relative(folder))
    click.echo(f"try it: cd {relative(folder)} && pip install -e . && python -m pytest", err=True)
