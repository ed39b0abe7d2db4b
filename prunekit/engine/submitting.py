"""Runs of a sweep as jobs of SLURM, through submitit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.errors import UserError, explain_briefly

CLUSTER = "slurm"
GRACE = 300.0
"""Seconds in which a job whose run was told to stop is taken away."""


@dataclass
class Submitted:
    """A job: one run, in a process of its own in `folder`. Submitted again where it is ended."""

    command: tuple[str, ...]
    folder: str
    pid: int = 0

    def __call__(self) -> None:
        """Raises `RuntimeError` where the run failed."""
        process = subprocess.Popen(self.command, cwd=self.folder)
        self.pid = process.pid
        if _await(process.pid) == 130:
            time.sleep(GRACE)  # `checkpoint` is called meanwhile
        if code := process.wait():
            raise RuntimeError(f"the run ended with exit code {code}; its log says why")

    def checkpoint(self) -> Any:
        """What submitit submits in its place, once it has saved what it did."""
        from submitit.helpers import DelayedSubmission

        if self.pid:
            os.kill(self.pid, signal.SIGTERM)
            _await(self.pid)
        return DelayedSubmission(Submitted(self.command, self.folder))


def _await(pid: int) -> int:
    """The exit code of a child; unlike `Popen.wait` also in a signal handler amid the same."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return found.si_status if found else 0


def submit(
    name: str,
    levels: Sequence[Sequence[str]],
    command: Sequence[str],
    logs: Path,
    options: Mapping[str, Any],
) -> list[str]:
    """Submit a job for each run, those of a level after all of the level before; their ids.

    Raises `UserError` where submitit is missing, finds no SLURM, or does not know an option.
    """
    try:
        import submitit
    except ImportError:
        raise UserError(
            "--executor slurm needs submitit: pip install submitit; --executor print does without"
        ) from None
    ids: list[str] = []
    after: list[str] = []
    try:
        executor = submitit.AutoExecutor(logs, cluster=CLUSTER)
        executor.update_parameters(name=name, **options)
        more = dict(options.get("slurm_additional_parameters", {}))
        for level in levels:
            if after:
                more["dependency"] = f"afterany:{':'.join(after)}"
                executor.update_parameters(slurm_additional_parameters=more)
            with executor.batch():
                jobs = [
                    executor.submit(Submitted((*command, "--only", label), os.getcwd()))
                    for label in level
                ]
            ids += [job.job_id for job in jobs]
            after = list(dict.fromkeys(job.job_id.partition("_")[0] for job in jobs))
    # What it raises for a wrong option, or where there is no SLURM.
    except Exception as error:
        raise UserError(f"submitit: {explain_briefly(error)}") from error
    return ids
