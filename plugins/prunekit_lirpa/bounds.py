"""Lower bounds of a network's margins over a box of images, by auto_LiRPA."""

from __future__ import annotations

import contextlib
import io
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit import copy_plain, effective_parameters
from prunekit.contracts import Threat
from prunekit.errors import UserError
from prunekit_lirpa import versions

METHODS = {
    "ibp": "IBP",
    "crown-ibp": "CROWN-IBP",
    "crown": "CROWN",
    "alpha-crown": "CROWN-Optimized",
}
"""The bounds, cheap to dear, and what auto_LiRPA calls them."""

CERTAIN = 1e-5
"""A margin must be above this to count as proved: below, rounding may have made it."""


@dataclass(frozen=True)
class Box:
    """All images between `lower` and `upper`, both (B, C, H, W)."""

    lower: Tensor
    upper: Tensor


def surround(x: Tensor, eps: float) -> Box:
    """All images within eps of x in L-inf that are in [0, 1].

    >>> surround(torch.tensor([[[[0.5, 1.0]]]]), 0.25).upper.tolist()
    [[[[0.75, 1.0]]]]
    """
    return Box((x - eps).clamp(0, 1), (x + eps).clamp(0, 1))


def check_threat(threat: Threat | None, owner: str) -> float:
    """The radius of an L-inf threat; raises `UserError` for every other."""
    if threat is None:
        raise UserError(f'{owner} needs a radius; write [threat] with norm = "linf", eps = "2/255"')
    if threat.norm != "linf":
        raise UserError(
            f'{owner} bounds boxes, norm "linf", not "{threat.norm}"; write norm = "linf" and an '
            "eps for it, or use smoothing for l2"
        )
    return threat.eps


def compare_classes(y: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, K - 1, K): row by row f_y - f_j, over the classes j other than y, in their order.

    >>> compare_classes(torch.tensor([1]), 3).tolist()
    [[[-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]]]
    """
    unit = torch.eye(classes, dtype=dtype, device=y.device)
    rows = unit[y][:, None] - unit
    return rows[unit[y] == 0].view(len(y), classes - 1, classes)


def robust_cross_entropy(lower: Tensor) -> Tensor:
    """Cross-entropy of the worst logits that lower bounds of margins (B, K - 1) allow, a mean.

    The logits are 0 at the label and minus the bound elsewhere (Wong and Kolter, ICML 2018).
    """
    worst = F.pad(-lower, (1, 0))
    return F.cross_entropy(worst, torch.zeros(len(lower), dtype=torch.long, device=lower.device))


def is_certain(lower: Tensor) -> Tensor:
    """(B,) booleans: every margin (B, K - 1) is above `CERTAIN`; what is no number is not."""
    return (lower > CERTAIN).all(1)


@contextlib.contextmanager
def full_precision(dtype: torch.dtype | None = None) -> Iterator[None]:
    """No autocast and no TF32 inside: their rounding is larger than what bounds are about.

    What auto_LiRPA makes without a dtype, is made with this one.
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
    """Equal but for rounding, by the scale of the largest value."""
    scale = 1 + float(expected.abs().max())
    return float((found - expected).abs().max()) < 1e-3 * scale


@dataclass
class Bounds:
    """Bounds of a live network: traced once, when first needed; its weights are read each time.

    What is traced is a plain copy in eval mode, without scores; its parameter nodes then answer
    with the effective parameters of the step and the present statistics of batch normalisation. So
    the network, its modes and what of it is frozen stay as they are, and scores get gradients.

    `relu` is the lower slope of an unstable ReLU: "adaptive" (1 where u > -l, else 0), or
    "same-slope", u / (u - l) as the upper one. With `detached`, weights are read without gradients;
    `dtype` computes in another precision than the network's.
    """

    model: nn.Module
    shape: tuple[int, int, int]
    relu: Literal["adaptive", "same-slope"] = "adaptive"
    detached: bool = False
    dtype: torch.dtype | None = None
    iterations: int = 20
    """Of the optimisation of "alpha-crown"."""
    _bounded: Any = field(default=None, repr=False)
    _classes: int = 0
    _tried: set[str] = field(default_factory=set)

    def margins(self, box: Box, y: Tensor, method: str) -> Tensor:
        """Lower bounds (B, K - 1) of f_y - f_j over the box, for the classes j other than y.

        Raises `UserError` for a network that auto_LiRPA cannot bound.
        """
        return self._bound(box, y, method)[1]

    def margins_twice(self, box: Box, y: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds of "ibp" and of "crown-ibp", which is made of it."""
        return self._bound(box, y, "crown-ibp")

    def prepare(self) -> None:
        """Trace the network, where that is not done. Raises `UserError` as `margins` does."""
        if self._bounded is not None:
            return
        model, example = self._copy(), self._example()
        try:
            with versions.unsupported() as unsupported:
                bounded = versions.trace(model, example, self.relu)
        # Whatever it raises, the network is out of its reach.
        except Exception as error:
            raise UserError(explain(error, unsupported, self._copy(), example)) from error
        bounded.eval()
        # More images than it was traced with, and others: a branch on the images is not traced.
        others = (0 * example, 0 * example + 1, example / 10, 1 - example / 10)
        with torch.no_grad(), full_precision(self.dtype):
            for images in (torch.cat([example, example[:1]]), *others):
                logits = model(images)
                if not logits.isfinite().all():
                    raise UserError("the network's outputs are no numbers: nothing to bound")
                if not _agree(bounded(images), logits):
                    raise UserError(
                        "auto_LiRPA reads this network wrongly: it does not compute what the "
                        "network does (poolings with ceil_mode, dilation, padding that is not "
                        "counted, or Python's if on images, for example); replace what "
                        "docs/certified.md does not list"
                    )
        self._classes = bounded.final_shape[1]
        versions.limit_iterations(bounded, self.iterations)
        self._bounded = bounded

    def forget(self) -> None:
        """Trace again next time: what was cut off has left its half-done work in the old trace."""
        self._bounded = None

    def _bound(self, box: Box, y: Tensor, method: str) -> tuple[Tensor, Tensor]:
        """(bounds by IBP, where the method begins with these; bounds by the method)."""
        self.prepare()
        if method == "alpha-crown" and not self._bounded.optimizable_activations:
            method = "crown"  # a linear network: nothing to optimise, and nothing to gain
        with full_precision(self.dtype):
            self._bind()
            if method not in self._tried:
                self._try(method)
            if method != "alpha-crown":
                return self._compute(box, y, method)
            # What one optimisation leaves in the trace does not suit the next, and what it prints
            # is no result of ours.
            with contextlib.redirect_stdout(io.StringIO()):
                bounds = self._compute(box, y, method)
            self.forget()
            return bounds

    def _try(self, method: str) -> None:
        """Raise `UserError` where the bounds over a box of a single image are not its margins.

        Some operators are bounded wrongly, and silently, where their options are unusual.
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
                f"auto_LiRPA gets {method} wrong for this network: over a box of one image alone "
                "it is not the image's margin (overlapping or padded average pooling, for "
                'example); use "ibp", or replace what docs/certified.md does not list'
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
                # The last linear layer is merged with it.
                C=compare_classes(y, self._classes, center.dtype),
                method=METHODS[method],
                bound_upper=False,
            )
        except torch.OutOfMemoryError:
            raise
        # It has no errors of its own: an operator out of reach may raise anything.
        except Exception as error:
            raise UserError(explain(error, [], self._copy(), self._example())) from error
        if self.detached or not torch.is_grad_enabled():
            found = found.masked_fill(~self._finite(len(y))[:, None], -torch.inf)
        return self._bounded.ibp_lower, found

    def _finite(self, images: int) -> Tensor:
        """(B,) booleans: no bound within the network is infinite.

        auto_LiRPA leaves a bias out that is no number, such as 0 * inf, and goes on as if proved.
        """
        finite = torch.ones(images, dtype=torch.bool, device=self._bounded.device)
        for node in self._bounded._modules.values():
            for bound in (getattr(node, "lower", None), getattr(node, "upper", None)):
                if node.perturbed and isinstance(bound, Tensor) and len(bound) == images:
                    finite &= bound.flatten(1).isfinite().all(1)
        return finite

    def _bind(self) -> None:
        """Let the nodes of parameters and buffers answer with what the network has now."""
        values = {**dict(self.model.named_buffers()), **effective_parameters(self.model)}
        for node in self._bounded._modules.values():
            for slots in (node._parameters, node._buffers):
                for slot in slots.keys() & {"param", "buffer"}:
                    value = values[node.ori_name]
                    if self.detached:
                        value = value.detach()
                    if value.is_floating_point():
                        value = value.to(self.dtype or value.dtype)
                    # Batch normalisation reads the slot; all else asks `forward`, whose own version
                    # would change what of the network is frozen.
                    slots[slot] = value
                    node.forward = partial(_answer, value)

    def _example(self) -> Tensor:
        """Two random images, always the same."""
        images = torch.rand(2, *self.shape, generator=torch.Generator().manual_seed(0))
        return images.to(next(self.model.parameters()).device, self.dtype)

    def _copy(self) -> nn.Module:
        """What is traced: a plain copy in eval mode."""
        model = copy_plain(self.model).eval()
        for parent in list(model.modules()):
            for name, module in parent.named_children():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    # Nothing in eval mode; 0.3 would switch to train mode for it.
                    parent.add_module(name, nn.Identity())
            for name, parameter in parent._parameters.items():
                if parameter is not None:
                    # A node for each use of a tied weight: a gate may be behind one of them.
                    copied = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                    parent._parameters[name] = copied
        return model.to(self.dtype)


def _answer(value: Tensor) -> Tensor:
    return value


def explain(
    error: Exception, unsupported: list[tuple[str, str]], model: nn.Module, example: Tensor
) -> str:
    """What auto_LiRPA stumbled over, and in which layers of the plain network."""
    if unsupported:
        operators = sorted({name.rpartition("::")[2] for name, _ in unsupported})
        what = f"does not know the operator{'s' * (len(operators) > 1)} {', '.join(operators)}"
    else:
        operators = [name.removeprefix("Bound") for name in _failed_nodes(error)]
        said = f"{type(error).__name__}: {error}".strip().rstrip(":").splitlines()[0]
        what = f"cannot bound {operators[0]} ({said})" if operators else f"failed ({said})"
    layers = find_layers(model, example, operators)
    where = f" of layer{'s' * (len(layers) > 1)} {', '.join(layers)}" if layers else ""
    return f"auto_LiRPA {what}{where}; replace it by one that docs/certified.md lists"


def _failed_nodes(error: Exception) -> list[str]:
    """The class of the innermost auto_LiRPA node that an error came through, if any."""
    found = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = type(frame.f_locals.get("self"))
        if owner.__module__.startswith("auto_LiRPA.operators"):
            found = [owner.__name__]
    return found


def find_layers(model: nn.Module, example: Tensor, operators: list[str]) -> list[str]:
    """Names (and types) of the innermost layers that consist of one of these ONNX operators."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, None] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Tracing calls the layer again, and hooks on what is traced.
        if watching and inputs and not any(module.children()):
            watching.clear()
            if operators_of(module, inputs[0]) & set(operators):
                found[f"{names[module]} ({type(module).__name__})"] = None
            watching.append(True)

    watching = [True]
    hooks = [module.register_forward_pre_hook(watch) for module in model.modules()]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found)


def operators_of(layer: nn.Module, x: Tensor) -> set[str]:
    """The ONNX operators that a layer is traced to."""
    with versions.unsupported() as unknown:
        try:
            bounded = versions.trace(layer, x, "adaptive")
            nodes = [type(node).__name__ for node in bounded._modules.values()]
        # Whatever it is, it comes of the operator that could not be traced.
        except Exception as error:
            nodes = _failed_nodes(error)
    unknown_names = {name.rpartition("::")[2] for name, _ in unknown}
    return unknown_names | {name.removeprefix("Bound") for name in nodes}
