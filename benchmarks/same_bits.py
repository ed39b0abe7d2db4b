"""Did a refactoring move a number? Shipped recipes run at two commits, every bit compared.

    uv run python benchmarks/same_bits.py OLD_COMMIT NEW_COMMIT

Each commit is checked out and installed into an environment of its own (entry points differ between
commits), and runs six recipes on one thread: the quickstart as it is, the others with `--smoke`.
Compared are all tensors of every `model.safetensors`, those of intermediate stages too, and all
arrays of every `records.npz`, paired by recipe, run, stage and name; not headers, not keys. What is
meant to move numbers is listed in CHANGED.md.

A commit's results are kept under its hash in --cache; NEW_COMMIT may be `.`, the working tree as it
is, which is run anew each time. Exit status: 0 the same, 1 not, 2 a run failed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {
    "quickstart.toml": False,
    "mnist-crown-ibp.toml": True,
    "fashion-mnist-smoothing.toml": True,
    "timm-resnet.toml": True,
    "cifar10-resnet18-channels.toml": True,
    "cifar10-resnet18-iterative.toml": True,
}
"""File in recipes/ -> whether it is run with `--smoke`."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

Content = tuple[str, tuple[int, ...], bytes]
"""Type, shape and bits of a tensor or array."""


def read_tensors(path: Path) -> dict[str, Content]:
    """The tensors of a safetensors file, of whatever type: its header is JSON behind 8 bytes."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, told in header.items():
        begin, end = told["data_offsets"]
        found[name] = (told["dtype"], tuple(told["shape"]), content[start + begin : start + end])
    return found


def read_arrays(path: Path) -> dict[str, Content]:
    """The arrays of an npz file."""
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()}


def collect(out: Path) -> dict[str, Content]:
    """All that the runs below a folder hold: "run/stage: tensor" -> content.

    Results of single stages lie in the store beside, in a folder called by the stage's key.
    """
    stores = list(out.parent.glob(".stages"))
    found: dict[str, Content] = {}
    for record in sorted(out.rglob("run.json")):
        run = record.parent.relative_to(out).as_posix()
        told = json.loads(record.read_text())
        if told["status"] != "done":
            raise SystemExit(f"{record.parent}: {told['status']}: {told.get('error')}")
        places = [("end", record.parent)]
        for stage in told["stages"]:
            homes = [home for store in stores for home in store.rglob(stage["key"])]
            places += [(stage["name"], home) for home in homes]
        for name, folder in places:
            for file, read in (("model.safetensors", read_tensors), ("records.npz", read_arrays)):
                if (folder / file).is_file():
                    values = read(folder / file)
                    found |= {f"{run}/{name}/{file}: {key}": v for key, v in values.items()}
    return found


def compare(old: dict[str, Content], new: dict[str, Content]) -> Iterator[str]:
    """What differs, a line each."""
    for name in sorted(old.keys() ^ new.keys()):
        yield f"{name}: only in {'old' if name in old else 'new'}"
    for name in sorted(old.keys() & new.keys()):
        if old[name][:2] != new[name][:2]:
            yield f"{name}: {old[name][0]} {old[name][1]} -> {new[name][0]} {new[name][1]}"
        elif old[name][2] != new[name][2]:
            a, b = (np.frombuffer(c[name][2], np.uint8) for c in (old, new))
            yield f"{name}: {np.count_nonzero(a != b)} of {len(a)} bytes differ"


def run_recipe(checkout: Path, recipe: str, smoke: bool, folder: Path) -> None:
    """Run a recipe of a checkout in its own environment; raises `SystemExit` where it fails."""
    out = folder / recipe.removesuffix(".toml") / "out"
    command = ["uv", "run", "--quiet", "prunekit", "run", f"recipes/{recipe}", "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}
    environment |= dict.fromkeys(THREADS, "1")
    command += ["--device", "cpu", *(["--smoke"] if smoke else [])]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        raise SystemExit(2)


def run_commit(commit: str, recipes: list[str], cache: Path) -> Path:
    """The folder with the results of a commit (or of the working tree, `.`)."""
    if commit == ".":
        folder = Path(tempfile.mkdtemp(prefix="same-bits-"))
        for recipe in recipes:
            run_recipe(ROOT, recipe, RECIPES[recipe], folder)
        return folder
    commit = ask_git("rev-parse", "--verify", f"{commit}^{{commit}}")
    folder, checkout = cache / commit, cache / f"{commit}-tree"
    missing = [r for r in recipes if not (folder / r.removesuffix(".toml") / "done").exists()]
    if missing:
        if not checkout.exists():
            ask_git("worktree", "add", "--detach", str(checkout), commit)
        try:
            subprocess.run(["uv", "sync", "--quiet"], cwd=checkout, check=True)
            for recipe in missing:
                shutil.rmtree(folder / recipe.removesuffix(".toml"), ignore_errors=True)
                run_recipe(checkout, recipe, RECIPES[recipe], folder)
                (folder / recipe.removesuffix(".toml") / "done").touch()
        finally:
            ask_git("worktree", "remove", "--force", str(checkout))
    return folder


def ask_git(*words: str) -> str:
    """What git answers in the repository; raises `SystemExit` where it refuses."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr.strip(), file=sys.stderr)
        raise SystemExit(2)
    return done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", help="commit")
    parser.add_argument("new", help="commit, or . for the working tree")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "prunekit-same-bits"
    )
    asked = parser.parse_args()
    folders = [run_commit(c, asked.recipes, asked.cache) for c in (asked.old, asked.new)]
    differs = False
    for recipe in asked.recipes:
        name = recipe.removesuffix(".toml")
        old, new = (collect(folder / name / "out") for folder in folders)
        lines = list(compare(old, new))
        arrays = sum("records.npz" in key for key in old)
        told = f"{name}: {len(old) - arrays} tensors, {arrays} arrays"
        # Nothing at all is no agreement.
        differs |= bool(lines) or not old
        print(f"{told}: {f'{len(lines)} DIFFER' if lines else 'the same bits' if old else 'NONE'}")
        for line in lines[:10]:
            print(f"  {line}")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
