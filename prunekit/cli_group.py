"""The command `prunekit` without its commands: errors, exit codes, options that several share."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from prunekit import __version__, completion
from prunekit.errors import Interrupted, RecipeError, UserError, relative

SCHEMA = 1
"""Version of everything that `--json` prints."""


class Cli(click.Group):
    """Turns every exception into a message and an exit code."""

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
    shell_complete=completion.complete_addresses,
)  # fmt: skip
device_option = click.option(
    "--device", default="auto", help="auto, cpu, cuda, cuda:1, mps.", show_default=True,
    shell_complete=completion.complete_devices,
)  # fmt: skip


def command_line() -> str:
    """The command line that was given, to be given again."""
    return shlex.join(["prunekit", *sys.argv[1:]])
