"""The initial weights of a new network."""

from __future__ import annotations

from math import prod, sqrt

import torch
from torch import nn

from prunekit_nets import NetOptions


def initialize(network: nn.Module, options: NetOptions) -> None:
    """Draw new weights for the convolutions and linear layers, in place; biases become 0.

    Each weight has the variance 2 / fan_in (He et al., ICCV 2015, arXiv 1502.01852, equation 10):
    normal, uniform, or of magnitude sqrt(2 / fan_in) with the sign of a normal draw (Ramanujan et
    al., CVPR 2020, arXiv 1911.13299). Batch normalization keeps torch's initial scale 1 and shift
    0. Draws come from torch's global generator, which the core seeds.

    With a `keep_ratio` k, weights are divided by sqrt(k) (the "scaled" initialization of arXiv
    1911.13299, section 3.2): a sparse network keeps fan_in * k inputs per unit, so its weights
    should have the variance 2 / (k * fan_in).
    """
    how = options.initialize
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
        if options.keep_ratio is not None:
            with torch.no_grad():
                module.weight.div_(sqrt(options.keep_ratio))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
