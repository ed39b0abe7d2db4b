"""How much the loss feels a weight that is taken away (SNIP)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from prunekit.contracts import Context


def measure_sensitivity(context: Context) -> dict[str, Tensor]:
    """|dL/dw * w| of every prunable weight, L the cross-entropy of one clean training batch.

    Lee et al., ICLR 2019, equation 4, at the dense mask: the derivative by a weight's mask, before
    their division by the sum. The network is in the mode that it is found in, in a prune stage
    train mode; it is computed with copies, so that its weights, gradients and running statistics
    stay as they are.
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
    # A layer that the loss does not reach has a gradient of zeros.
    gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    return {
        name: (gradient * weight.detach()).abs()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
