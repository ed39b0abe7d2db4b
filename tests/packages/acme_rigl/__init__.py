"""RigL as somebody else would write it: prunekit's public list alone."""

from dataclasses import dataclass

from prunekit import RewirerComponent, hookimpl, option

PRUNEKIT_API = 3


@dataclass(frozen=True)
class RiglOptions:
    every: int = option(100, help="steps between two rewirings", low=1)
    fraction: float = option(0.3, help="of the kept weights that are dropped", above=0, below=1)
    until: float = option(
        0.75, help="fraction of the stage after which masks stay", above=0, high=1
    )


@hookimpl
def prunekit_rewirers():
    yield RewirerComponent(
        name="rigl",
        summary="Drops small weights, grows where gradients are large (Evci et al., ICML 2020)",
        build="acme_rigl.rigl:Rigl",
        options=RiglOptions,
        gradients=True,
    )
