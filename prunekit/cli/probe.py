"""What `prunekit doctor` tries in a process of its own, as it may crash: imports, devices, data.

`python -m prunekit.cli.probe TASKS`: TASKS is a JSON list of [what, name]; answers with a JSON
object a line on stdout, in order. One that is missing is what the process died of.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunekit.catalog.registry import load_registry
from prunekit.errors import DataMissingError, Place, UserError


def try_import(name: str) -> dict[str, Any]:
    """Import a package."""
    return {"version": str(getattr(importlib.import_module(name), "__version__", ""))}


def try_load(function: str) -> dict[str, Any]:
    """Import a package as a component says: "module:function" returns it."""
    module, _, name = function.partition(":")
    loaded = getattr(importlib.import_module(module), name)()
    return {"version": str(getattr(loaded, "__version__", ""))}


def try_component(build: str) -> dict[str, Any]:
    """Import what builds a component: "module:function"."""
    module, _, function = build.partition(":")
    if not callable(getattr(importlib.import_module(module), function)):
        raise TypeError(f"{build} is no function")
    return {}


def try_devices(_: str) -> dict[str, Any]:
    """What torch can compute on; something is computed on each."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names, broken = [], [str(w.message) for w in caught] if not found else []
    for number in range(found):
        names.append(torch.cuda.get_device_name(number))
        try:
            torch.ones(2, device=f"cuda:{number}").sum().item()
        except RuntimeError as error:
            broken.append(f"cuda:{number}: {error}")
    mps = torch.backends.mps.is_available()
    return {
        "threads": torch.get_num_threads(), "processors": os.cpu_count(), "cuda": names,
        "cuda_version": torch.version.cuda, "mps": mps, "broken": broken,
    }  # fmt: skip


def try_data(reference: str) -> dict[str, Any]:
    """Read a data set as a recipe without options would, but download nothing."""
    from prunekit.contracts import Context
    from prunekit.recipe.resolver import Resolver

    registry = load_registry()
    fields = dataclasses.fields(registry.find("dataset", reference).component.options)
    here = {"download": False} if "download" in {f.name for f in fields} else {}
    resolver = Resolver(registry, Path.cwd(), lambda path: Place("doctor"))
    use = resolver.use("dataset", {"use": reference, **here}, ("dataset",))
    if use is None:
        raise UserError("; ".join(problem.message for problem in resolver.problems))
    try:
        data = use.build(Context(folder=Path.cwd()))
    except DataMissingError:
        return {"missing": True}
    return {"train": len(data.train.labels), "test": len(data.test.labels), "shape": data.shape}


TASKS: dict[str, Callable[[str], dict[str, Any]]] = {
    "import": try_import,
    "load": try_load,
    "component": try_component,
    "devices": try_devices,
    "data": try_data,
}


def main() -> None:
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for what, name in json.loads(sys.argv[1]):
        try:
            answer = TASKS[what](name)
        except UserError as error:
            answer = {"error": str(error)}
        except (Exception, SystemExit) as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
