"""Commands for authors of plugins and for people in trouble: new, doctor, completion."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from prunekit import completion
from prunekit.cli_group import as_json, main, print_json
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


@main.command()
@click.argument("runs", type=click.Path(path_type=Path), default="runs")
@click.option("--store", type=click.Path(path_type=Path), envvar="PRUNEKIT_STORE",
              help="Folder of stage results; .stages in RUNS by default.")  # fmt: skip
@as_json
def doctor(runs: Path, store: Path | None, as_json: bool) -> None:
    """Look at this installation: versions, devices, data, plugins; what is broken, what mends it.

    Exit code 1 where something is broken.
    """
    from prunekit.doctor import diagnose, render
    from prunekit.registry import load_registry

    findings = diagnose(load_registry(), runs, store)
    broken = sum(finding.broken for finding in findings)
    if as_json:
        print_json({"broken": broken, "findings": [vars(finding) for finding in findings]})
    else:
        click.echo(render(findings))
    if broken:
        sys.exit(1)


@main.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def print_completion(shell: str) -> None:
    """Print what makes a SHELL complete commands, components and recipes.

    \b
    bash   eval "$(prunekit completion bash)"      in ~/.bashrc
    zsh    eval "$(prunekit completion zsh)"       in ~/.zshrc, after compinit
    fish   prunekit completion fish | source       in ~/.config/fish/config.fish
    """
    click.echo(completion.write_script(shell, main))
