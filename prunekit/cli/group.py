"""The command `prunekit` without its commands: errors, exit codes, options that several share."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from prunekit import __version__
from prunekit.errors import Interrupted, RecipeError, UserError, relative

SCHEMA = 1
"""Version of everything that `--json` prints."""

COMMANDS = {
    "check": "recipes:check",
    "clean": "results:clean",
    "completion": "new:print_completion",
    "curve": "results:curve",
    "doctor": "doctor:doctor",
    "eval": "networks:evaluate",
    "export": "networks:export",
    "import": "networks:import_file",
    "init": "init:init",
    "list": "components:list_components",
    "new": "new:new",
    "results": "results:results",
    "run": "recipes:run",
    "show": "components:show",
}
"""Name of a command -> the module of this folder and the function that it is."""


class Cli(click.Group):
    """Imports a command when it is asked for; turns every exception into a message and a code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, function = COMMANDS[name].partition(":")
        command: click.Command = getattr(
            importlib.import_module(f"prunekit.cli.{module}"), function
        )
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except RecipeError as error:
            fail("\n".join(map(str, error.problems)), 2, ctx, plain=True)
        except UserError as error:
            fail(str(error), error.code, ctx)
        except (Interrupted, KeyboardInterrupt):
            fail("interrupted", 130, ctx)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except OSError as error:
            where = f"{relative(Path(error.filename))}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}", 1, ctx)
        except Exception as error:
            message = f"{type(error).__name__}: {error} (a defect of prunekit; --debug shows where)"
            fail(message, 1, ctx)


def fail(message: str, code: int, ctx: click.Context, *, plain: bool = False) -> None:
    """Print one message, with the traceback under `--debug`, and end."""
    if ctx.params.get("debug") and sys.exc_info()[0] is not None:
        import traceback

        traceback.print_exc()
    click.echo(message if plain else f"prunekit: {message}", err=True)
    sys.exit(code)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="prunekit")
def main(debug: bool) -> None:
    """Prune robust neural networks: learn the mask against the robust objective itself."""


def print_json(value: Any) -> None:
    click.echo(json.dumps({"schema_version": SCHEMA, **value}, indent=2, allow_nan=False))


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

settings_option = click.option(
    "--set", "settings", multiple=True, metavar="ADDRESS=VALUE",
    help="Override, by a sweep's address: prune.sparsity=0.95. May be given again.",
)  # fmt: skip

device_option = click.option(
    "--device", default="auto", help="auto, cpu, cuda, cuda:1, mps.", show_default=True,
)  # fmt: skip


def command_line() -> str:
    """The command line that was given, to be given again."""
    return shlex.join(["prunekit", *sys.argv[1:]])


def note(text: str) -> None:
    """Something worth knowing that is no result."""
    click.echo(f"note: {text}", err=True)


def warn(text: str) -> None:
    """What happened besides the results."""
    click.echo(text, err=True)


def count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
