"""Kill a run at random moments, and compare what it ends with: `uv run python benchmarks/kills.py`.

A run of all kinds of stages and of evaluators that resume between batches is first left alone. Then
it is started again in a new folder and killed, by SIGKILL or SIGTERM, and started again, until it
ends by itself: models, records and metrics have to be the same, in the run and in the store, and
nothing may be left over. That is repeated for `--rounds` kills. Needs `os.fork`, so that Python and
torch are imported once.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import prunekit.engine.preview  # what `run` imports late
import prunekit.engine.running  # noqa: F401
from prunekit.catalog.registry import load_registry
from prunekit.cli.group import main as command
from prunekit.store.files import find_partial

RECIPE = """
name = "killed"
report = ["console", "jsonl"]
architecture = "small-cnn"
[dataset]
use = "digits"
fraction = 0.2
batch_size = 16
[threat]
eps = 0.1
[objective]
use = "pgd-at"
steps = 2
validation_steps = 2
[[stage]]
kind = "pretrain"
epochs = 4
wrap = ["ema"]
[[stage]]
kind = "prune"
sparsity = 0.8
epochs = 3
[[stage]]
kind = "finetune"
epochs = 3
[[stage]]
kind = "prune"
name = "again"
sparsity = 0.9
pruner = "lwm"
[[stage]]
kind = "finetune"
name = "at-last"
epochs = 3
[[stage]]
kind = "evaluate"
images = 64
with = [{evaluators}]
"""

EVALUATORS = {
    "clean": '"clean"',
    "pgd": '{ use = "pgd", steps = 10, restarts = 2 }',
    "certify": '{ use = "certify", sigma = 0.25, n = 1000, radii = [0.25] }',
    "verified": '"verified"',
    "autoattack": '{ use = "autoattack", attacks = ["apgd-ce"], queries = 10, steps = 5 }',
}


def write_recipe(file: Path) -> list[str]:
    """Write the recipe with the evaluators that are installed; their names."""
    components = {e.component.name: e.component for e in load_registry().entries}
    known = [name for name in EVALUATORS if name in components]
    used = [n for n in known if all(map(importlib.util.find_spec, components[n].needs))]
    for name in used:  # once for all processes
        importlib.import_module(components[name].build.partition(":")[0])
        if components[name].loads:
            module, _, function = components[name].loads.partition(":")
            getattr(importlib.import_module(module), function)()
    file.write_text(RECIPE.replace("{evaluators}", ", ".join(EVALUATORS[name] for name in used)))
    return used


def start(folder: Path, recipe: Path) -> int:
    """Start the command in a process of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        command(["run", str(recipe), "--out", str(folder / "runs/a"), "--device", "cpu"])
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(70)


def wait(pid: int, seconds: float) -> int | None:
    """The exit status (negative: the signal), or None if the process goes on for longer."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def wait_for_run(pid: int, folder: Path) -> int | None:
    """Wait until the rehearsal, which stores nothing, is over; the exit status as `wait`."""
    log, code = folder / "log", None
    before = log.read_text().count("run 1/1") if log.exists() else 0
    while code is None and (not log.exists() or log.read_text().count("run 1/1") == before):
        code = wait(pid, 0.01)
    return code


def describe(folder: Path) -> dict[str, Any]:
    """All that has to be the same: bytes of models and records, metrics without times."""
    found: dict[str, Any] = {}
    for file in sorted((folder / "runs").rglob("*")):
        name = str(file.relative_to(folder))
        if file.name in ("model.safetensors", "records.npz", "recipe.toml"):
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        elif file.name == "result.json":
            told = json.loads(file.read_text())
            rows = [{k: v for k, v in row.items() if k != "seconds"} for row in told["history"]]
            found[name] = [told["metrics"], rows, told["notes"], told["files"]]
        elif file.name == "run.json":
            told = json.loads(file.read_text())
            stages = [[s["key"], s["metrics"], s["files"]] for s in told["stages"]]
            found[name] = [told["status"], stages, told["sparsity"]]
        elif file.name not in ("lock", ".lock", "plan.json", "metrics.jsonl") and file.is_file():
            found[name] = "left over"
    left = [str(p) for f in (folder / "runs").rglob("*") if f.is_dir() for p in find_partial(f)]
    return {**found, "left over": left}


def find_place(folder: Path, stages: int) -> str:
    """Where a run was killed, by what is in its folder."""
    try:
        told = json.loads((folder / "runs/a/run.json").read_text())
        keys, done = told["keys"], (folder / "runs/.stages").glob("*/*/result.json")
    except OSError:
        return "before the first stage"
    finished = {file.parent.name for file in done}
    where = [n for n, key in enumerate(keys) if key not in finished]
    if not keys:
        return "rehearsal"
    names = ["pretrain", "prune", "finetune", "again", "at-last"]
    return "the end" if not where else [*names, *["evaluators"] * stages][where[0]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200, help="kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="prunekit-kills-") as root:
        recipe = Path(root) / "killed.toml"
        evaluators = write_recipe(recipe)
        whole = Path(root) / "whole"
        whole.mkdir()
        pid = start(whole, recipe)
        code = wait_for_run(pid, whole)
        rehearsed = time.monotonic()
        code = wait(pid, 600) if code is None else code
        assert code == 0, (whole / "log").read_text()
        took = time.monotonic() - rehearsed
        expected = describe(whole)
        print(
            f"undisturbed, rehearsed: {took:.1f} s, evaluators {', '.join(evaluators)}", flush=True
        )
        kills: Counter[str] = Counter()
        places: Counter[str] = Counter()
        runs = failures = 0
        while kills.total() < arguments.rounds:
            folder = Path(root) / f"case{runs}"
            folder.mkdir()
            runs += 1
            code: int | None = None
            while code is None:
                pid = start(folder, recipe)
                last = kills.total() >= arguments.rounds
                if draw.random() < 0.9:
                    code = wait_for_run(pid, folder)
                if code is None:
                    code = wait(pid, 600 if last else draw.uniform(0, took / 2))
                if code is None:
                    kind = draw.choice([signal.SIGKILL, signal.SIGTERM])
                    places[find_place(folder, len(evaluators))] += 1
                    kills[kind.name] += 1
                    os.kill(pid, kind)
                    ended = wait(pid, 60)
                    # The first is that of an answered SIGTERM; the last came too late.
                    if ended not in (130, -kind, 0):
                        failures += 1
                        told = (folder / "log").read_text()
                        print(f"{kind.name} ended with {ended}\n{told}", flush=True)
            log = (folder / "log").read_text()
            got = describe(folder)
            wrong = [k for k in {**expected, **got} if expected.get(k) != got.get(k)]
            if code != 0 or wrong or "Traceback" in log or "damaged" in log:
                failures += 1
                print(f"run {runs} ended with {code}; differs: {wrong}\n{log}", flush=True)
            else:
                print(f"run {runs}: the same, after {kills.total()} kills in all", flush=True)
        told = ", ".join(f"{n} {name}" for name, n in sorted(kills.items()))
        where = ", ".join(f"{n} {name}" for name, n in places.most_common())
        spent = time.monotonic() - began
        print(f"{kills.total()} kills ({told}) of {runs} runs in {spent:.0f} s; during: {where}")
        print(f"failures: {failures}")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
