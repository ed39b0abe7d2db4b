"""The command `prunekit`: its table of commands, exit codes, and what several commands share."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import click

from prunekit import __version__
from prunekit.cli.otherwise import OTHERWISE, point_to_option
from prunekit.errors import (
    Interrupted,
    RecipeError,
    UserError,
    explain_briefly,
    printable,
    relative,
    shorten_value,
    suggest,
)

if TYPE_CHECKING:
    from rich.box import Box
    from rich.console import Console

SCHEMA = 1
"""Version of everything that `--json` prints."""

STDOUT = "prunekit.stdout"
"""Key of the stream for results in the metadata of click's context."""

LONGEST = 4000
"""Most characters of a line of a message; what is longer lost its middle."""

COMMANDS = {
    "check": "recipes:check",
    "clean": "results:clean",
    "completion": "completion:print_completion",
    "curve": "results:curve",
    "doctor": "doctor:doctor",
    "eval": "networks:evaluate",
    "export": "networks:export",
    "import": "networks:import_file",
    "init": "init:init",
    "list": "components:list_components",
    "new": "new:new",
    "results": "results:results",
    "run": "run:run",
    "show": "components:show",
}
"""Name of a command -> its "module:function" in this folder, imported when it is used."""


class Cli(click.Group):
    """Imports commands on demand and turns every exception into a message and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a command; None if there is none of this name."""
        if name not in COMMANDS:
            return None
        module, _, function = COMMANDS[name].partition(":")
        found = importlib.import_module(f"prunekit.cli.{module}")
        command: click.Command = copy.copy(getattr(found, function))
        assert command.callback is not None
        command.callback = _apart(command.callback)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first argument names, with advice where it names none."""
        word = args[0]
        if word in COMMANDS or word.startswith("-"):
            return super().resolve_command(ctx, args)
        advice = suggest(word, COMMANDS)
        if word in OTHERWISE:
            advice = f"write prunekit {OTHERWISE[word]}"
        raise click.UsageError(f"there is no command {word!r}; {advice}", ctx)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit with one message if it fails, and a traceback with `--debug`."""
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            raise point_to_option(error) from None
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout().fileno())
            sys.exit(0)
        # What a plugin raises may be anything, even SystemExit with the code of success.
        except BaseException as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            message, code = _explain_exit(error)
            warn(message)
            sys.exit(code)


def _apart(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the results apart from what plugins print, which goes to stderr.

    It stays so after the command, for plugins may have functions that are called at exit.
    """

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        click.get_current_context().meta[STDOUT], sys.stdout = _move_stdout(), sys.stderr
        return command(*arguments, **options)

    return run


def _move_stdout() -> TextIO:
    """Stdout under another descriptor; what C code and programs write to 1 then goes to stderr.

    Where the streams are not those of the process, such as in a test, they stay.
    """
    old, own = sys.stdout, sys.stdout is sys.__stdout__
    try:
        if not own or (old.fileno(), sys.stderr.fileno()) != (1, 2):
            return old
        old.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
    except (AttributeError, OSError, ValueError):  # closed, or no file
        return old
    # Not closed: what could not be written has been told of by then.
    return open(kept, "w", encoding=old.encoding, errors=old.errors, closefd=False)


def stdout() -> TextIO:
    """The stream for results, whatever `sys.stdout` is now."""
    context = click.get_current_context(silent=True)
    stream: Any = context.meta.get(STDOUT, sys.stdout) if context else sys.stdout
    return cast(TextIO, stream)


def _explain_exit(error: BaseException) -> tuple[str, int]:
    """(message, exit code) of a command that failed."""
    match error:
        case RecipeError():
            return str(error), error.code
        case UserError():
            message, code = printable(str(error), keep=""), error.code
        case Interrupted() | KeyboardInterrupt():
            message, code = "interrupted", 130
        case SystemExit() | GeneratorExit():
            message, code = f"a plugin ended the command ({explain_briefly(error)})", 1
        case OSError():
            where = f"{relative(Path(error.filename))}: " if error.filename else ""
            message, code = f"{where}{error.strerror or error}", 1
        case _:
            told = explain_briefly(error)
            message, code = f"{told} (a bug in prunekit; --debug shows where)", 1
    return f"prunekit: {message}", code


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="prunekit")
def main(debug: bool) -> None:
    """Prune robust neural networks: learn the mask on the robust objective itself."""


PATH = click.Path(path_type=Path)

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
device_option = click.option(
    "--device", help="auto, cpu, cuda, cuda:1, mps; by default [compute]'s, or auto."
)
settings_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="ADDRESS=VALUE",
    help="Override a value of the recipe, such as prune.sparsity=0.95. Can be repeated.",
)
store_option = click.option(
    "--store",
    type=PATH,
    envvar="PRUNEKIT_STORE",
    help="Folder of stored stages; by default .stages beside the runs.",
)

trust_option = click.option(
    "--trust",
    is_flag=True,
    help="Run Python files, and fetch models, that a run folder or model file names.",
)


def command_line() -> str:
    """The command line of this process, quoted so that it can be pasted into a shell."""
    return shlex.join(["prunekit", *sys.argv[1:]])


def print_json(value: dict[str, Any]) -> None:
    """Print the table as JSON, with the schema version in front."""
    echo(json.dumps({"schema_version": SCHEMA, **value}, indent=2, allow_nan=False))


def print_table(
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    console: Console | None = None,
    *,
    box: Box | None = None,
    whole: int = 2,
) -> None:
    """Print a table, columns of numbers aligned to the right.

    A terminal's width is kept by wrapping cells, those of the first `whole` columns apart; where
    that is all of them, and in a file or a pipe, the table is as wide as its content.
    """
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    console = console or Console(file=stdout())
    table = Table(box=box, pad_edge=False, collapse_padding=box is not None)
    for place, title in enumerate(titles):
        table.add_column(Text(printable(title)), no_wrap=place < whole, overflow="fold")
        starts = {row[place][:1] for row in rows} - {"", "-"}
        if starts and all(start.isdigit() for start in starts):
            table.columns[place].justify = "right"
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    if width_of(console) is None or whole >= len(titles):
        endless = console.options.update(max_width=100_000)
        console.width = max(console.width, Measurement.get(console, endless, table).maximum)
    console.print(table)


def width_of(console: Console) -> int | None:
    """The columns to keep to; None in a file or a pipe, unless COLUMNS says so."""
    kept = console.is_terminal or "COLUMNS" in os.environ
    return console.width if kept else None


def note(text: str) -> None:
    """Print something worth knowing that is not a result, to stderr."""
    warn(f"note: {text}")


def warn(text: str) -> None:
    """Print a line that is not a result, to stderr."""
    echo(text, err=True)


def echo(text: str, *, err: bool = False, end: str = "\n") -> None:
    """Print text, to stdout by default: nothing in it drives the terminal, and no line is endless.

    All that commands print passes here or through `print_table`.
    """
    if err:
        text = "\n".join(shorten_value(line, LONGEST) for line in text.split("\n"))
    stream = sys.stderr if err else stdout()
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    click.echo(shown + end, file=stream, nl=False)


def count(n: int, word: str) -> str:
    """A number of things: "1 run", "2 runs"."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
