"""HARP as somebody else would write it: prunekit's public list alone."""

from dataclasses import dataclass

from prunekit import PrunerComponent, hookimpl, option

PRUNEKIT_API = 3


@dataclass(frozen=True)
class HarpOptions:
    gamma: float = option(0.01, help="factor of the budget loss in the first epoch", above=0)
    floor: float = option(0.1, help="least density of a layer, in units of the target's", above=0)
    start: float = option(0.1, help="density of every layer at the start", above=0, below=1)


@hookimpl
def prunekit_pruners():
    yield PrunerComponent(
        name="harp",
        summary="Scores and the keep rates of layers, learned together (Zhao 2023)",
        build="acme_harp.harp:build",
        options=HarpOptions,
        learns=True,
        allocates=True,
    )
