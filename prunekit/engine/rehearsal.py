"""The rehearsal: one batch through every stage, before hours are spent on the first."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.catalog.containment import held
from prunekit.engine.keys import make_keys
from prunekit.errors import DataMissingError, Interrupted, RunError
from prunekit.models.failures import release
from prunekit.recipe.plan import Run
from prunekit.recipe.reduction import reduce_run
from prunekit.report import Note, rehearsing
from prunekit.store.stages import Store

if TYPE_CHECKING:
    from prunekit.engine.engine import Engine


def rehearse(engine: Engine, runs: Sequence[Run]) -> dict[str, BaseException]:
    """Send one batch through every missing stage before hours are spent on the first.

    Returns label -> what would fail. Of runs that differ in numbers only, one that passes
    speaks for the others. Raises `DataMissingError` where all runs lack the same data.
    """
    failures: dict[str, BaseException] = {}
    told = False
    seen: set[frozenset[tuple[str, str]]] = set()
    for run in runs:
        parts = frozenset((u.kind, u.component.name) for u in run.uses())
        if parts in seen:
            continue
        try:
            with held():
                loaded = engine.inputs.load(run)
            keys = make_keys(run, loaded, engine.compute)
            if all(engine.store.folder(part).done for key in keys for part in key.parts):
                continue
            if not told:
                engine.report(Note("rehearsing: one batch through every stage"))
                told = True
            with tempfile.TemporaryDirectory(prefix="prunekit-") as scratch:
                small = reduce_run(run, batches=1)
                store, report = Store(Path(scratch)), rehearsing(engine.report)
                quiet = replace(engine, store=store, report=report, smoke=True, failed={})
                with held():
                    quiet.run_one(small, loaded, None)
            seen.add(parts)
        except (Interrupted, KeyboardInterrupt):
            raise Interrupted from None
        except Exception as error:
            release(error)
            if isinstance(error, RunError):
                error = RunError(f"rehearsal, one batch a stage: {error}")
            failures[run.label] = error
    missing = {str(e) for e in failures.values() if isinstance(e, DataMissingError)}
    if len(missing) == 1 and len(failures) == len(runs):
        raise DataMissingError(missing.pop())
    return failures
