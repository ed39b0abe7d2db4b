"""Linear networks, as baselines without any nonlinearity."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from math import prod

from torch import nn

from prunekit.contexts import ArchitectureContext
from prunekit_nets import NetOptions
from prunekit_nets.initialization import initialize

HIDDEN = 100


def build_linear(layers: int, options: NetOptions, context: ArchitectureContext) -> nn.Sequential:
    """A sequence of linear layers, all but the last with 100 outputs.

    State-dict keys `1.weight`, `1.bias`, `2.weight`, ... HYDRA's `lin_4` has three layers, like
    its `lin_3`: load its weights into `lin-3`.
    """
    widths = [prod(context.shape), *[HIDDEN] * (layers - 1), context.classes]
    network = nn.Sequential(nn.Flatten(), *(nn.Linear(i, o) for i, o in pairwise(widths)))
    initialize(network, options)
    return network


lin_1, lin_2, lin_3, lin_4 = (partial(build_linear, layers) for layers in range(1, 5))
