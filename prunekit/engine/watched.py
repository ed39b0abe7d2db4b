"""What was seen of a network while it was judged, over all processes that judge it."""

from __future__ import annotations

import shutil
from typing import Any

from prunekit.judging import Watch
from prunekit.store.files import read_kept, write_json
from prunekit.store.stages import StageFolder


def recall(watch: Watch, folder: StageFolder) -> None:
    """Go on with what an earlier process saw of the network, and keep what is seen from now on.

    Where that is damaged, all judgements are made again: what an evaluator has stored is not shown
    to the network a second time.
    """
    kept = folder.scratch() / "not-finite.json"
    if known := read_kept(kept, _read_watch):
        watch.unreal, watch.nowhere, watch.outputs, watch.real = known
    elif kept.exists():
        shutil.rmtree(kept.parent)
        folder.scratch()

    def keep() -> None:
        seen = [sorted(watch.unreal), sorted(watch.nowhere), watch.outputs, watch.real]
        write_json(kept, seen)

    watch.keep = keep


def _read_watch(kept: Any) -> tuple[set[int], set[int], int, bool]:
    unreal, nowhere, outputs, real = kept
    if {*map(type, (*unreal, *nowhere, outputs))} != {int} or type(real) is not bool:
        raise ValueError("it holds something else than numbers of images")
    return set(unreal), set(nowhere), outputs, real
