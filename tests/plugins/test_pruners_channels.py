"""Pruners of whole channels where several layers have one decision."""

import torch
from prunekit_pruners import TwinRepOptions
from prunekit_pruners.twinrep import Twins
from torch import nn

from prunekit.contracts import Scores
from prunekit.graph.groups import find_groups
from prunekit.pruning.selection import Selection


class Residual(nn.Module):
    """Two layers whose outputs meet in an addition."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.a(x)
        return self.head((x + self.b(x)).mean((2, 3)))


def test_coupled_layers_say_that_they_keep_the_channels_of_their_group():
    net, names = Residual(), ["a.weight", "b.weight"]
    groups, _ = find_groups(net, torch.zeros(1, 1, 2, 2), names)
    selection = Selection(0.5, structure="channel", groups=groups)
    start = {n: p.detach() for n, p in net.named_parameters() if n in names}
    factors = {n: nn.Parameter(torch.ones_like(w)) for n, w in start.items()}
    masking = Twins(
        net, Scores(start), selection, {}, factors=factors, options=TwinRepOptions(select=0.0)
    )
    assert masking.scores().keep == {"a.weight": 2, "b.weight": 2}
