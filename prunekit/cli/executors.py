"""`prunekit run --executor`: the runs of a sweep as jobs of a shell or of a cluster."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.cli import group
from prunekit.errors import Place, UserError, printable, relative

if TYPE_CHECKING:
    from prunekit.recipe.plan import Plan

MARK = "# Runs of "
"""How the second line of a script begins."""
MOST = 1000
"""Most jobs of a SLURM array, at most sites."""

SHELL = """\
#!/bin/sh
{mark}{recipe}, those first whose results others share. What is stored is not computed again.
cd {here} || exit 1
failed=0
run() {{
    {command} --only "$1" || failed=1
}}
{runs}
exit "$failed"
"""

SLURM = """\
#!/bin/bash
{mark}{recipe}. Start: bash {file}
# Each array begins after the one whose results it shares. What is stored is not computed again.
# Adapt: partition, time, memory, and --gres=gpu:1 for a GPU.
#SBATCH --job-name={name}
#SBATCH --cpus-per-task={threads}
#SBATCH --output=%x-%A_%a.log
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
runs=(
{runs}
)
if [ -z "${{SLURM_ARRAY_TASK_ID:-}}" ]; then
{arrays}
    exit
fi
cd {here} || exit 1
# In place of the shell, so that a signal reaches it: it saves what it does, and goes on from there.
exec {command} --only "${{runs[$1 + SLURM_ARRAY_TASK_ID]}}"
"""


def hand_over(
    executor: str,
    plan: Plan,
    options: Mapping[str, Any],
    settings: Sequence[str],
    slurm: Sequence[str],
    as_json: bool,
) -> None:
    """Make jobs of the runs of a plan; `options` and `settings` are those of `prunekit run`.

    Raises `UserError` where that cannot be.
    """
    import torch

    from prunekit.engine.preview import preview_plan

    threads = plan.compute.threads or torch.get_num_threads()
    # As many as here, wherever a job runs: so the results are the same bits.
    own = () if plan.compute.threads else (f"compute.threads={threads}",)
    command = _write_command(plan.path, options, (*settings, *own))
    # Which results are shared is the same on a device that is not here.
    here = dataclasses.replace(plan, compute=dataclasses.replace(plan.compute, device="cpu"))
    levels = list(arrange(preview_plan(here, options["out"], options["store"])))
    if executor == "slurm":
        from prunekit.engine.submitting import submit
        from prunekit.recipe.toml.document import parse_value

        out = options["out"].absolute()
        chosen = {"cpus_per_task": threads}
        for text in slurm:
            key, _, value = text.partition("=")
            chosen[key] = parse_value(value, Place(f"--slurm {text}"))
        ids = submit(plan.name, levels, command, out.parent / ".jobs" / out.name, chosen)
        if as_json:
            group.print_json({"jobs": ids})
        else:
            group.echo(f"submitted: {' '.join(ids)}")
        return
    scripts = write_scripts(plan, options["out"], levels, command, threads)
    if as_json:
        group.print_json({"scripts": [str(path) for path in scripts]})
        return
    runs = group.count(len(plan.runs), "run")
    group.echo(f"{runs}: sh {shlex.quote(str(scripts[0]))}")
    group.echo(f"as SLURM arrays: bash {shlex.quote(str(scripts[1]))}")


def write_scripts(
    plan: Plan, out: Path, levels: Sequence[Sequence[str]], command: Sequence[str], threads: int
) -> list[Path]:
    """Write the runs beside the folder `out`: as a script, and as SLURM arrays, one a level.

    `command` runs one of them with --only. Raises `UserError` if another file is in the way.
    """
    from prunekit.store.files import make_folder, write_text

    quoted = [shlex.quote(label) for level in levels for label in level]
    shell, slurm = (out.parent / f"{out.name}.{ending}" for ending in ("sh", "slurm"))
    known = {
        "mark": MARK,
        "recipe": printable(str(plan.path), keep=""),
        "here": shlex.quote(str(Path.cwd())),
        "command": shlex.join(command),
    }
    texts = {
        shell: SHELL.format(**known, runs="\n".join(f"run {label}" for label in quoted)),
        slurm: SLURM.format(
            **known,
            file=printable(shlex.quote(str(slurm)), keep=""),
            name=re.sub(r"[^\w.-]", "_", plan.name, flags=re.ASCII),
            threads=threads,
            runs="\n".join(f"    {label}" for label in quoted),
            arrays="\n".join(_write_arrays(levels)),
        ),
    }
    make_folder(out.parent)
    for path in texts:
        ours = f"\n{MARK}".encode()
        if os.path.lexists(path) and not (path.is_file() and ours in path.read_bytes()[:40]):
            raise UserError(f"{relative(path)} is in the way; choose another folder with --out")
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def arrange(preview: dict[str, Any]) -> Iterator[list[str]]:
    """The runs in lists: none lacks a result that one of the same list computes before."""
    from prunekit.engine.schedule import choose

    waiting = {
        run["run"]: [stage["key"] for stage in run["stages"] if stage["status"] != "stored"]
        for run in preview["runs"]
    }
    while waiting:
        level: list[str] = []
        owed: set[str] = set()
        while (label := choose(waiting, owed)) is not None:
            level.append(label)
            owed.update(waiting.pop(label))
        waiting = {name: [k for k in keys if k not in owed] for name, keys in waiting.items()}
        yield level


def _write_arrays(levels: Sequence[Sequence[str]]) -> Iterator[str]:
    """Commands that submit a script's arrays; each is told where its runs begin."""
    first, after = 0, ""
    for level in levels:
        jobs = []
        for start in range(0, len(level), MOST):
            part = min(MOST, len(level) - start)
            jobs.append(f"job{first}")
            yield (
                f'    {jobs[-1]}=$(sbatch --parsable --array=0-{part - 1}{after} "$0" {first})'
                " || exit"
            )
            first += part
        after = ' --dependency="afterany' + "".join(f":${{{job}%%;*}}" for job in jobs) + '"'


def _write_command(recipe: Path, options: Mapping[str, Any], settings: Sequence[str]) -> list[str]:
    """The command line of a run, without --only."""
    command = [sys.executable, "-m", "prunekit", "run", str(recipe)]
    for name, value in options.items():
        if value is True:
            command.append(f"--{name}")
        elif value is not False:
            command += [f"--{name}", str(value)]
    return [*command, *(word for setting in settings for word in ("--set", setting))]
