"""How the weights of a new network start."""

from __future__ import annotations

from math import prod, sqrt

import torch
from torch import nn

from prunekit_nets import Initialization


def initialize(network: nn.Module, how: Initialization) -> None:
    """Draw new weights for the convolutions and linear layers, in place; their biases are 0.

    Each weight has the variance 2 / fan_in (He et al., ICCV 2015, arXiv 1502.01852, eq. 10):
    normal, uniform, or of the one size sqrt(2 / fan_in) with the sign of a normal draw (Ramanujan
    et al., CVPR 2020, arXiv 1911.13299). Batch normalisation starts as torch has it: scale 1,
    shift 0. Draws come from torch's global generator, which the core seeds.
    """
    for module in network.modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        if how == "kaiming-uniform":
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        else:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if how == "signed-constant":
            size = sqrt(2 / prod(module.weight.shape[1:]))
            with torch.no_grad():
                module.weight.sign_().mul_(size)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
