"""Networks that several files prune."""

import pytest
import torch
from torch import nn


class Attention(nn.Module):
    """A packed attention and one whose keys are of another width, as a classifier of 3 tokens."""

    def __init__(self):
        super().__init__()
        self.packed = nn.MultiheadAttention(4, 2, batch_first=True)
        self.other = nn.MultiheadAttention(4, 1, kdim=6, vdim=6, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = x.reshape(-1, 3, 4)
        x = x + self.packed(x, x, x, need_weights=False)[0]
        keys = torch.cat([x, x[..., :2]], 2)
        return self.head(self.other(x, keys, keys, need_weights=False)[0].mean(1))


ATTENTION = [
    "packed.in_proj_weight", "packed.out_proj.weight", "other.q_proj_weight",
    "other.k_proj_weight", "other.v_proj_weight", "other.out_proj.weight", "head.weight",
]  # fmt: skip


@pytest.fixture
def make_attention():
    def make():
        torch.manual_seed(0)
        return Attention()

    return make


@pytest.fixture
def attention_weights():
    """Names of its weights that can be pruned, in their order."""
    return ATTENTION


@pytest.fixture
def make_conv_net():
    """Convolutions with and without a normalisation behind them, and a classifier."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 3),
        )

    return make
