"""Lower bounds of a network's margins over a box of images, computed by auto_LiRPA."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunekit import copy_plain, effective_parameters
from prunekit.errors import UserError
from prunekit.evaluation import plainly
from prunekit_lirpa import versions
from prunekit_lirpa.failures import explain
from prunekit_lirpa.margins import Box, compare_classes

METHODS = {
    "ibp": "IBP",
    "crown-ibp": "CROWN-IBP",
    "crown": "CROWN",
    "alpha-crown": "CROWN-Optimized",
}
"""The bounds, cheapest first, and auto_LiRPA's names for them."""


@contextlib.contextmanager
def full_precision(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside, autocast and TF32 are off: their rounding errors are too large for bounds.

    `dtype` becomes the default dtype, for the tensors that auto_LiRPA creates without one.
    """
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    default = torch.get_default_dtype()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.set_default_dtype(dtype or default)
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether the tensors are equal up to rounding, relative to the largest value."""
    scale = 1 + float(expected.abs().max())
    return float((found - expected).abs().max()) < 1e-3 * scale


@dataclass
class Bounds:
    """Bounds of a network: traced once, on first use; its current weights are read every time.

    The traced network is a plain copy in eval mode, without scores. Its parameter nodes then return
    the effective parameters of the current step and the current statistics of batch normalization.
    So the network itself, its modes and its frozen parameters stay unchanged, and scores receive
    gradients.

    `shape` is (C, H, W). `relu` is the lower slope of an unstable ReLU with bounds l < 0 < u:
    "adaptive" (1 if u > -l, else 0), or "same-slope" (u / (u - l), like the upper one). With
    `detached`, weights are read without gradients. `dtype` is the precision to compute in; None
    means that of the network.
    """

    model: nn.Module
    shape: tuple[int, int, int]
    relu: Literal["adaptive", "same-slope"] = "adaptive"
    detached: bool = False
    dtype: torch.dtype | None = None
    iterations: int = 20
    """Optimization steps of "alpha-crown"."""
    _bounded: Any = field(default=None, repr=False)
    _classes: int = 0
    _tried: set[str] = field(default_factory=set)

    def margins(self, box: Box, y: Tensor, method: str) -> Tensor:
        """Lower bounds (B, K - 1) of the margins f_y - f_j over the box, for the classes j != y.

        Labels y are (B,); `method` is a key of `METHODS`. Raises `UserError` if auto_LiRPA cannot
        bound the network.
        """
        return self._bound(box, y, method)[1]

    def margins_twice(self, box: Box, y: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds (B, K - 1) of "ibp" and of "crown-ibp", which includes the former.

        Arguments and errors are those of `margins`.
        """
        return self._bound(box, y, "crown-ibp")

    @property
    def operations(self) -> int:
        """How many operations lie between images and logits."""
        self.prepare()
        return sum(1 for node in self._bounded._modules.values() if node.perturbed)

    @plainly()
    def prepare(self) -> None:
        """Trace the network if that is not done yet; raises `UserError` as `margins` does."""
        if self._bounded is not None:
            return
        versions.load()
        model, example = self._copy(), self._example()
        try:
            with versions.unsupported() as unsupported:
                bounded = versions.trace(model, example, self.relu)
        # Whatever auto_LiRPA raises, it cannot trace this network.
        except Exception as error:
            raise UserError(explain(error, unsupported, self._copy(), example)) from error
        bounded.eval()
        # Compare on a different number of images and on different images: if the network branches
        # on its input, the trace has only one of the branches.
        others = (0 * example, 0 * example + 1, example / 10, 1 - example / 10)
        with torch.no_grad(), full_precision(self.dtype):
            for images in (torch.cat([example, example[:1]]), *others):
                logits = model(images)
                if not logits.isfinite().all():
                    raise UserError("the network's outputs are not finite, so they have no bounds")
                if not _agree(bounded(images), logits):
                    raise UserError(
                        "auto_LiRPA misreads this network: its outputs differ from the network's "
                        "own (possible causes: pooling with ceil_mode, dilation or uncounted "
                        "padding; a Python if on the images); replace all layers that "
                        "docs/certified.md does not list"
                    )
        self._classes = bounded.final_shape[1]
        versions.limit_iterations(bounded, self.iterations)
        self._bounded = bounded

    def forget(self) -> None:
        """Trace again next time, because an interrupted computation leaves the trace unusable."""
        self._bounded = None

    @plainly()
    def _bound(self, box: Box, y: Tensor, method: str) -> tuple[Tensor, Tensor]:
        """(bounds by IBP, if the method computes these first; bounds by the method)."""
        self.prepare()
        if method == "alpha-crown" and not self._bounded.optimizable_activations:
            method = "crown"  # a linear network: there is nothing to optimize
        with full_precision(self.dtype):
            self._bind()
            if method not in self._tried:
                self._try(method)
            if method != "alpha-crown":
                return self._compute(box, y, method)
            # An optimization leaves values in the trace that the next one cannot use, and it prints
            # messages, which must not end up among prunekit's results on stdout.
            with contextlib.redirect_stdout(io.StringIO()):
                bounds = self._compute(box, y, method)
            self.forget()
            return bounds

    def _try(self, method: str) -> None:
        """Raise `UserError` if the bounds over a box with a single image are not its margins.

        auto_LiRPA silently computes wrong bounds for some operators with unusual options.
        """
        example = self._example()
        y = torch.arange(len(example), device=example.device) % self._classes
        with torch.no_grad():
            logits = self._bounded(example)
            exact = (compare_classes(y, self._classes, logits.dtype) @ logits[:, :, None])[..., 0]
            simple = "crown" if method == "alpha-crown" else method
            _, lower = self._compute(Box(example, example), y, simple)
        if not _agree(lower, exact):
            raise UserError(
                f"auto_LiRPA computes wrong {method} bounds for this network: over a box that "
                "contains a single image, they differ from its margins (possible cause: "
                'overlapping or padded average pooling); use "ibp", or replace all layers that '
                "docs/certified.md does not list"
            )
        self._tried.add(method)

    def _compute(self, box: Box, y: Tensor, method: str) -> tuple[Tensor, Tensor]:
        auto_lirpa = versions.load()
        lower, upper = (side.to(self.dtype or side.dtype) for side in (box.lower, box.upper))
        center = (lower + upper) / 2
        region = auto_lirpa.PerturbationLpNorm(norm=float("inf"), x_L=lower, x_U=upper)
        try:
            found, _ = self._bounded.compute_bounds(
                x=(auto_lirpa.BoundedTensor(center, region),),
                # auto_LiRPA merges this matrix with the last linear layer.
                C=compare_classes(y, self._classes, center.dtype),
                method=METHODS[method],
                bound_upper=False,
            )
        except torch.OutOfMemoryError:
            raise
        # auto_LiRPA has no exceptions of its own: an unsupported operator may raise anything.
        except Exception as error:
            raise UserError(explain(error, [], self._copy(), self._example())) from error
        if self.detached or not torch.is_grad_enabled():
            found = found.masked_fill(~self._finite(len(y))[:, None], -torch.inf)
        return self._bounded.ibp_lower, found

    def _finite(self, images: int) -> Tensor:
        """Whether all bounds inside the network are finite, booleans (B,).

        auto_LiRPA ignores a bias that is NaN, such as 0 * inf, and would return a false proof.
        """
        nodes = [node for node in self._bounded._modules.values() if node.perturbed]
        sides = [getattr(node, side, None) for node in nodes for side in ("lower", "upper")]
        flat = [s.flatten(1) for s in sides if isinstance(s, Tensor) and len(s) == images]
        # A finite sum, which is quick, has finite terms.
        total = torch.zeros(images, device=self._bounded.device)
        for bound in flat:
            total = total + bound.sum(1)
        finite = total.isfinite()
        if not finite.all():
            finite = torch.stack([bound.isfinite().all(1) for bound in flat]).all(0)
        return finite

    def _bind(self) -> None:
        """Make the nodes of parameters and buffers return the network's current values."""
        values = {**dict(self.model.named_buffers()), **effective_parameters(self.model)}
        for node in self._bounded._modules.values():
            for slots in (node._parameters, node._buffers):
                for slot in slots.keys() & {"param", "buffer"}:
                    value = values[node.ori_name]
                    if self.detached:
                        value = value.detach()
                    if value.is_floating_point():
                        value = value.to(self.dtype or value.dtype)
                    # Batch normalization reads the slot; all others call `forward`, and the
                    # original one would change which parameters of the network are frozen.
                    slots[slot] = value
                    node.forward = partial(_answer, value)

    def _example(self) -> Tensor:
        """Two random images (2, C, H, W), always the same."""
        images = torch.rand(2, *self.shape, generator=torch.Generator().manual_seed(0))
        return images.to(next(self.model.parameters()).device, self.dtype)

    def _copy(self) -> nn.Module:
        """The network to be traced: a plain copy in eval mode."""
        model = copy_plain(self.model).eval()
        for parent in list(model.modules()):
            for name, module in parent.named_children():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    # Dropout does nothing in eval mode, but 0.3 would switch it to train mode.
                    parent.add_module(name, nn.Identity())
            for name, parameter in parent._parameters.items():
                if parameter is not None:
                    # Copied, so that each use of a tied weight has its own node: a channel gate may
                    # follow only one of them.
                    copied = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                    parent._parameters[name] = copied
        return model.to(self.dtype)


def _answer(value: Tensor) -> Tensor:
    return value
