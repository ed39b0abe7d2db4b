"""Did a refactoring move a number? `uv run python benchmarks/same_bits.py OLD_COMMIT NEW_COMMIT`.

Checks both commits out, installs each into an environment of its own, runs recipes there on one
thread of the CPU (the quickstart in full, the others with --smoke on random images), and compares
every tensor and every array that a stage or a run left, bit by bit, by recipe, run, stage and name.
What is meant to move numbers is listed in CHANGED.md.

NEW_COMMIT may be `.`: the working tree in its present environment. A commit's results are kept in
--cache; delete it when packages or the machine change. One commit given twice is run twice. Exit
status: 0 the same, 1 different, 2 wrong usage, or something could not be run or compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FULL = ("quickstart",)  # the others take hours, and data that has to be fetched
RECIPES = (*FULL, "mnist-crown-ibp", "fashion-mnist-smoothing", "timm-resnet",
           "cifar10-resnet18-channels", "cifar10-resnet18-iterative")  # fmt: skip
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prunekit/same-bits"
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "|u1", "BOOL": "|b1"}
Content = tuple[str, tuple[int, ...], bytes]  # type, shape and bits of a tensor or an array


class Failure(Exception):
    """Something could not be run or compared."""


def read_tensors(path: Path) -> dict[str, Content]:
    """Of a safetensors file: eight bytes for the header's length, the header as JSON, the bits."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header, bits = json.loads(raw[8:start]), raw[start:]
    header.pop("__metadata__", None)
    return {
        name: (NUMPY.get(x["dtype"], x["dtype"]), (*x["shape"],), bits[slice(*x["data_offsets"])])
        for name, x in header.items()
    }


def read_arrays(path: Path) -> dict[str, Content]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: (x.dtype.str, x.shape, x.tobytes()) for name, x in stored.items()}


READERS = {"model.safetensors": read_tensors, "records.npz": read_arrays}


def find_files(out: Path) -> dict[tuple[str, str, str], Path]:
    """By run, stage and name: the files of stages in the store beside `out`, then a run's own."""
    stored = {path.name: path for path in (out.parent / ".stages").rglob("*")}
    files: dict[tuple[str, str, str], Path] = {}
    for record in sorted(out.rglob("run.json")):
        told = json.loads(record.read_text())
        # What evaluators recorded is in the run's own file, wherever a store keeps it.
        made = [stage for stage in told["stages"] if stage.get("kind") != "evaluate"]
        places = [(stage["name"], stored.get(stage["key"])) for stage in made]
        for stage, folder in [*places, ("(run)", record.parent)]:
            found = [name for name in READERS if folder and (folder / name).is_file()]
            if folder is None or not found:  # a store of another layout would pass unseen
                raise Failure(f"no results of {told['run']}/{stage} in {out.parent}")
            files |= {(told["run"], stage, name): folder / name for name in found}
    return files


def describe_difference(old: Content | None, new: Content | None) -> str:
    """Nothing where type, shape and bits are the same."""
    if old is None or new is None:
        return f"only in {'NEW' if old is None else 'OLD'}"
    if old[:2] != new[:2]:
        return f"{old[0]} {old[1]} became {new[0]} {new[1]}"
    if old[2] == new[2]:
        return ""
    try:
        a, b = (np.frombuffer(bits, dtype).astype(float) for dtype, _, bits in (old, new))
    except (TypeError, ValueError):  # a type that NumPy has not, as bf16, or no numbers
        return "other bits"
    with np.errstate(invalid="ignore"):
        gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b)).max()
    return f"max abs difference {gap:.3g}"


def compare(old: Path, new: Path) -> tuple[str, list[str]]:
    """What two folders hold that `prunekit run --out` wrote: how much of it, and what differs."""
    sides = find_files(old), find_files(new)
    compared, differences = dict.fromkeys(READERS, 0), []
    keys = dict.fromkeys([*sides[0], *sides[1]])
    for run, stage, file in keys:
        key = (run, stage, file)
        a, b = (READERS[file](side[key]) if key in side else {} for side in sides)
        compared[file] += len(a.keys() & b.keys())
        for name in dict.fromkeys([*a, *b]):
            if text := describe_difference(a.get(name), b.get(name)):
                differences.append(f"{run}/{stage}/{name}: {text}")
    tensors, arrays = compared.values()
    if not all(sides) or not (tensors or differences):
        raise Failure(f"nothing to compare in {old.parent} and {new.parent}")
    return f"{len({run for run, *_ in keys})} runs, {tensors} tensors, {arrays} arrays", differences


def call(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command prints, run on one thread and apart from the settings of whoever calls."""
    ours = ("PRUNEKIT_", "PYTHONPATH", "UV_PROJECT_ENVIRONMENT", "VIRTUAL_ENV")
    env = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    env |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}
    # No folder: no data set is there and none can be fetched, so all commits see the same images.
    env["PRUNEKIT_DATA"] = os.devnull
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, errors="replace")
    if done.returncode:
        tail = "".join(f"\n    {line}" for line in done.stderr.strip().splitlines()[-15:])
        raise Failure(f"{' '.join(map(str, command))} ended with {done.returncode}{tail}")
    return done.stdout.strip()


def run_recipes(names: list[str], tree: Path, programs: Path, root: Path) -> None:
    """Each into a folder of `root`; what fails is told, and has none."""
    call(programs / "python", "-c", "import torch; assert torch.get_num_threads() == 1")
    for name in names:
        start, part = time.perf_counter(), root / f"{name}.part"
        options = ["--device", "cpu"] if name in FULL else ["--device", "cpu", "--smoke"]
        shutil.rmtree(part, ignore_errors=True)
        try:
            found = list((tree / "recipes").rglob(f"{name}.toml"))
            if len(found) != 1:
                raise Failure(f"{len(found)} recipes of this name")
            call(programs / "prunekit", "run", *found, "--out", part / "out", *options, cwd=tree)
            part.rename(root / name)
        except Failure as failure:
            print(f"{name}: FAILED at {root.name[:7]}: {failure}")
        print(f"{root.name[:7]} {name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


def run_commit(commit: str, names: list[str], root: Path, tree: Path) -> None:
    """Fill `root` with the results that it lacks, from a checkout at `tree`."""
    if not (missing := [name for name in names if not (root / name).is_dir()]):
        return
    if commit == ".":
        run_recipes(missing, ROOT, Path(sys.executable).parent, root)
        return
    call("git", "worktree", "add", "--quiet", "--detach", tree, commit)
    try:
        # Packages that are released between two checkouts would move numbers.
        if (ROOT / "uv.lock").exists() and not (tree / "uv.lock").exists():
            shutil.copy(ROOT / "uv.lock", tree)
        call("uv", "sync", "--quiet", "--python", sys.executable, cwd=tree)
        run_recipes(missing, tree, tree / ".venv/bin", root)
    finally:
        call("git", "worktree", "remove", "--force", tree)


def report(name: str, old: Path, new: Path) -> int:
    """Print what comparing two results of a recipe finds; its exit status."""
    try:
        compared, differences = compare(old, new)
    except (Failure, OSError, ValueError) as failure:
        print(f"{name}: FAILED: {failure}")
        return 2
    verdict = f"{len(differences)} DIFFER" if differences else "same"
    print(f"{name}: {compared}: {verdict}", *differences[:5], sep="\n  ")
    return int(bool(differences))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", metavar="OLD_COMMIT")
    parser.add_argument("new", metavar="NEW_COMMIT", help="or . for the working tree as it is")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", default=list(RECIPES))
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR")
    asked = parser.parse_args()
    cache = asked.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache) as folder:
        try:
            old = call("git", "rev-parse", "--verify", f"{asked.old}^{{commit}}")
            if (new := asked.new) != ".":
                new = call("git", "rev-parse", "--verify", f"{asked.new}^{{commit}}")
            # Kept results of one commit would be compared with themselves.
            roots = cache / old, Path(folder, "NEW") if new in (".", old) else cache / new
            run_commit(old, asked.recipes, roots[0], Path(folder, "tree"))
            run_commit(new, asked.recipes, roots[1], Path(folder, "tree"))
        except (Failure, OSError) as failure:
            print(failure, file=sys.stderr)
            return 2
        found = [report(name, *(root / name / "out" for root in roots)) for name in asked.recipes]
    print(f"{found.count(0)} recipes same, {found.count(1)} different, {found.count(2)} failed")
    return max(found)


if __name__ == "__main__":
    sys.exit(main())
