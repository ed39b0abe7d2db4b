"""Commands that start something: new, completion."""

from __future__ import annotations

from pathlib import Path

import click

from prunekit.catalog.component import KINDS
from prunekit.cli import completion
from prunekit.cli.group import as_json, main, print_json
from prunekit.errors import relative


@click.group()
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
    from prunekit.catalog.registry import load_registry
    from prunekit.cli.scaffold import make_plugin

    folder = make_plugin(name, kinds, into, load_registry())
    if as_json:
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        print_json({"folder": str(folder), "files": files})
        return
    click.echo(relative(folder))
    click.echo(f"try it: cd {relative(folder)} && pip install -e . && python -m pytest", err=True)


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def print_completion(shell: str) -> None:
    """Print what makes a SHELL complete commands, components and recipes.

    \b
    bash   eval "$(prunekit completion bash)"      in ~/.bashrc
    zsh    eval "$(prunekit completion zsh)"       in ~/.zshrc, after compinit
    fish   prunekit completion fish | source       in ~/.config/fish/config.fish
    """
    click.echo(completion.write_script(shell, main))
