"""The sensitivity of the loss to removing a weight (SNIP)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from prunekit.contexts import PrunerContext


def measure_sensitivity(context: PrunerContext) -> dict[str, Tensor]:
    """|dL/dw * w| of every prunable weight, where L is the cross-entropy of one training batch.

    This is the derivative with respect to a weight's mask at the dense network (Lee et al., ICLR
    2019, equation 4), without the paper's division by the sum. The result has the keys and shapes
    of `context.weights`. The network keeps its mode (train mode in a prune stage); the computation
    uses copies, so its weights, gradients and running statistics do not change.
    """
    x, y = next(iter(context.batches()))
    model = context.model
    weights = {n: w.detach().clone().requires_grad_() for n, w in context.weights.items()}
    others = {
        name: value.detach().clone()
        for name, value in (*model.named_parameters(), *model.named_buffers())
        if name not in weights
    }
    with torch.enable_grad():
        loss = F.cross_entropy(functional_call(model, {**others, **weights}, (x,)), y)
    # materialize_grads: layers that do not influence the loss get gradients of zero.
    gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    return {
        name: (gradient * weight.detach()).abs()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
