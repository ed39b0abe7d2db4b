"""auto_LiRPA as it is installed: all that depends on its version is here.

0.3 is the last release on the package index, made for a torch before 2.0; 0.7 and its like come
from the project's repository. What 0.3 needs of torch and numpy that is no longer there is lent to
it while it is imported and traces, never over anything that exists, and taken back after.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn


@cache
def load() -> ModuleType:
    """The package `auto_LiRPA`, able to run; imported when first called."""
    with _lent(), _unchanged_process():
        import auto_LiRPA
    _accept_duplicates(auto_LiRPA.BoundedModule)
    if auto_LiRPA.__version__ == "0.3":
        _make_contiguous(auto_LiRPA.bound_ops.BoundAveragePool)
        auto_LiRPA.bound_ops.BoundRelu._relu_mask_alpha = staticmethod(_mask_alpha)
    return auto_LiRPA


def trace(model: nn.Module, example: torch.Tensor, relu: str) -> Any:
    """The `BoundedModule` of a network in eval mode, which is changed: give it a copy.

    `relu` is the lower slope of an unstable ReLU: "adaptive", or "same-slope" as the upper one.
    """
    # The option of the slope is called "relu" up to 0.3, and by its long name since.
    options: dict[str, Any] = {"relu": relu, "activation_bound_option": relu}
    if is_old():
        # 0.3 mixes up its own indices where nearly all neurons of a layer are unstable.
        options |= {"sparse_features_alpha": False, "sparse_spec_alpha": False}
    make = load().BoundedModule
    # Warnings: whatever tracing makes constant shows when the trace is compared with the network.
    with _lent(), warnings.catch_warnings(record=True):
        bounded = make(model, example, bound_opts=options, device=example.device)
    for node in bounded._modules.values():
        if type(node).__name__ == "BoundReshape" and node.output_shape[0] == len(example):
            # The number of images that it was traced with is in its shape as a constant.
            node.forward = partial(_reshape, node.forward, [-1, *node.output_shape[1:]])
        if is_old() and type(node).__name__ == "BoundConstant" and node.value.dim() > 1:
            # 0.3 mistakes the first of the dimensions (1, C, 1, 1) for channels.
            node.value = node.value.squeeze(0)
    return bounded


def _reshape(forward: Any, shape: list[int], x: torch.Tensor, traced: torch.Tensor) -> Any:
    return forward(x, shape)


def is_old() -> bool:
    """Whether this is the release of the package index, with its flaws."""
    version: str = load().__version__
    return version == "0.3"


def limit_iterations(bounded: Any, iterations: int) -> None:
    """Optimise alpha in so many steps."""
    bounded.set_bound_opts({"optimize_bound_args": {"iteration": iterations}})


@contextmanager
def unsupported() -> Iterator[list[tuple[str, str]]]:
    """Collects (operator, node) of what cannot be converted, which is logged and not raised."""
    found: list[tuple[str, str]] = []

    class Listener(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            # The arguments of the message: one of auto_LiRPA's named tuples.
            arguments: Any = record.args
            found.extend((node.op, node.name) for node in arguments or () if hasattr(node, "op"))
            return record.levelno < logging.ERROR

    load()
    logger, listener = logging.getLogger("auto_LiRPA.utils"), Listener()
    logger.addFilter(listener)
    try:
        yield found
    finally:
        logger.removeFilter(listener)


@contextmanager
def _lent() -> Iterator[None]:
    with ExitStack() as returns:
        if importlib.util.find_spec("numpy.lib.arraysetops") is None:
            module = ModuleType("numpy.lib.arraysetops")
            module.isin = np.isin  # type: ignore[attr-defined]
            sys.modules[module.__name__] = module
            returns.callback(sys.modules.pop, module.__name__)
        settings = _exporter_settings()
        version = settings.export_onnx_opset_version
        returns.callback(setattr, settings, "export_onnx_opset_version", version)
        helper = importlib.import_module("torch.onnx.symbolic_helper")
        if not hasattr(helper, "_set_opset_version"):
            set_version = partial(setattr, settings, "export_onnx_opset_version")
            helper._set_opset_version = set_version  # type: ignore[attr-defined]
            returns.callback(delattr, helper, "_set_opset_version")
        node = torch._C.Node
        if not hasattr(node, "__getitem__"):
            setattr(node, "__getitem__", _read_attribute)  # noqa: B010 (the class has none)
            returns.callback(delattr, node, "__getitem__")
        yield


def _exporter_settings() -> Any:
    """The settings of torch's exporter; they have moved, its function knows where to."""
    utils = importlib.import_module("torch.onnx.utils")
    return importlib.import_module(utils._optimize_graph.__module__).GLOBALS


def _read_attribute(node: Any, name: str) -> Any:
    """An attribute of a traced node, by the getter of its kind: `i` for an integer, and so on."""
    return getattr(node, node.kindOf(name))(name)


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """auto_LiRPA's import sends logging to stdout and changes the warning filters: undone here."""
    root, compiler = logging.getLogger(), logging.getLogger("torch.utils.cpp_extension")
    handlers, level = root.handlers[:], compiler.level
    compiler.setLevel(logging.ERROR)  # it looks for CUDA's compiler, which nothing here uses
    with warnings.catch_warnings(record=True):
        try:
            yield
        finally:
            root.handlers[:] = handlers
            compiler.setLevel(level)


def _accept_duplicates(bounded: Any) -> None:
    """torch 2 passes `remove_duplicate` to a method that 0.3 overrides without it."""
    original = bounded._named_members
    if "remove_duplicate" in inspect.signature(original).parameters:
        return

    def named_members(
        self: Any,
        members: Any,
        prefix: str = "",
        recurse: bool = True,
        remove_duplicate: bool = True,
    ) -> Any:
        return original(self, members, prefix, recurse)

    bounded._named_members = named_members


def _mask_alpha(
    lower: torch.Tensor,
    upper: torch.Tensor,
    lower_alpha: torch.Tensor | None,
    upper_alpha: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Slopes below unstable neurons from alpha, 1 below active ones, 0 below dead ones.

    In place of a function of 0.3 that clamps alpha to [0, 1]: since torch 2.15 clamp has no
    gradient at 0 and 1, where alpha starts, and it would never move.
    """
    active = (lower >= 0).to(lower.dtype)
    dead = upper <= 0
    unstable = (1 - active) * (1 - dead.to(upper.dtype))

    def slope(alpha: torch.Tensor | None) -> torch.Tensor | None:
        if alpha is None:
            return None
        inside = alpha + (alpha.clamp(0, 1) - alpha).detach()
        return inside * unstable + active

    return slope(lower_alpha), slope(upper_alpha), dead.all()


def _make_contiguous(pool: Any) -> None:
    """0.3 takes a view of coefficients that may be expanded, which torch refuses."""
    original = pool.bound_backward

    def bound_backward(self: Any, last_lower: Any, last_upper: Any, *x: Any) -> Any:
        sides = (a.contiguous() if isinstance(a, torch.Tensor) else a
                 for a in (last_lower, last_upper))  # fmt: skip
        return original(self, *sides, *x)

    pool.bound_backward = bound_backward
