"""Everything that depends on the installed version of auto_LiRPA.

0.3 is the last release on the package index and was made for torch 1; newer versions such as 0.7
come from the project's repository. 0.3 needs parts of torch and numpy that no longer exist. These
are added while it is imported and while it traces, and removed afterwards; of torch and numpy,
nothing that exists is ever replaced.
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

from prunekit.errors import UserError


@cache
def load() -> ModuleType:
    """Import the package `auto_LiRPA` on first call, with its fixes applied, and return it.

    Raises `UserError` if another package that it needs is missing.
    """
    try:
        with _lent(), _unchanged_process():
            package: ModuleType = importlib.import_module("auto_LiRPA")
    except ImportError as error:
        if error.name == "auto_LiRPA":
            raise
        raise UserError(
            f"auto_LiRPA cannot be imported ({error}): install what it needs"
        ) from error
    _accept_duplicates(package.BoundedModule)
    package.bound_ops.BoundRelu._relu_mask_alpha = staticmethod(_mask_alpha)
    if package.__version__ == "0.3":
        _make_contiguous(package.bound_ops.BoundAveragePool)
    return package


def trace(model: nn.Module, example: torch.Tensor, relu: str) -> Any:
    """The `BoundedModule` of a network in eval mode, which is changed in place: pass a copy.

    `example` (B, C, H, W) is what the network is traced on. `relu` is the lower slope of an
    unstable ReLU: "adaptive", or "same-slope" for that of the upper bound.
    """
    # The option for the slope is called "relu" up to 0.3, and has a long name since.
    options: dict[str, Any] = {"relu": relu, "activation_bound_option": relu}
    if is_old():
        # 0.3 mixes up its own indices if nearly all neurons of a layer are unstable.
        options |= {"sparse_features_alpha": False, "sparse_spec_alpha": False}
    make = load().BoundedModule
    # Tracing warns of values that become constants; ignored here, because the caller compares the
    # trace with the network.
    with _lent(), warnings.catch_warnings(record=True):
        bounded = make(model, example, bound_opts=options, device=example.device)
    for node in bounded._modules.values():
        if type(node).__name__ == "BoundReshape" and node.output_shape[0] == len(example):
            # The traced shape has the number of example images as a constant.
            node.forward = partial(_reshape, node.forward, [-1, *node.output_shape[1:]])
        if is_old() and type(node).__name__ == "BoundConstant" and node.value.dim() > 1:
            # 0.3 takes the first dimension of (1, C, 1, 1) for the channels.
            node.value = node.value.squeeze(0)
    return bounded


def _reshape(forward: Any, shape: list[int], x: torch.Tensor, traced: torch.Tensor) -> Any:
    return forward(x, shape)


def is_old() -> bool:
    """Whether 0.3 is installed, the release on the package index that needs workarounds."""
    version: str = load().__version__
    return version == "0.3"


def limit_iterations(bounded: Any, iterations: int) -> None:
    """Set the number of optimization steps of alpha-CROWN for a `BoundedModule`."""
    bounded.set_bound_opts({"optimize_bound_args": {"iteration": iterations}})


@contextmanager
def unsupported() -> Iterator[list[tuple[str, str]]]:
    """Collects the (operator, node) pairs that cannot be converted.

    auto_LiRPA logs them as errors; inside, these log messages are not shown.
    """
    found: list[tuple[str, str]] = []

    class Listener(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            # The arguments of the log message are auto_LiRPA's named tuples.
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
    """Inside, the parts of torch and numpy that 0.3 needs exist."""
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
    """The settings of torch's ONNX exporter, in the module that defines its `_optimize_graph`.

    That module has moved between versions of torch.
    """
    utils = importlib.import_module("torch.onnx.utils")
    return importlib.import_module(utils._optimize_graph.__module__).GLOBALS


def _read_attribute(node: Any, name: str) -> Any:
    """An attribute of a traced node, read with the getter of its kind, such as `i` for integers."""
    return getattr(node, node.kindOf(name))(name)


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """Undoes what importing auto_LiRPA changes: logging to stdout, and warning filters."""
    root, compiler = logging.getLogger(), logging.getLogger("torch.utils.cpp_extension")
    handlers, level = root.handlers[:], compiler.level
    compiler.setLevel(logging.ERROR)  # it warns without a CUDA compiler, which is not needed here
    with warnings.catch_warnings(record=True):
        try:
            yield
        finally:
            root.handlers[:] = handlers
            compiler.setLevel(level)


def _accept_duplicates(bounded: Any) -> None:
    """Add the parameter `remove_duplicate`, which torch 2 passes, to a method of 0.3."""
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
    leaky_alpha: float = 0,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | bool]:
    """Lower slopes of neurons: alpha where unstable, 1 where active, `leaky_alpha` where dead.

    `lower` and `upper` are the bounds of the neurons. This replaces a function of auto_LiRPA (which
    has `leaky_alpha` since 0.7) that clamps alpha: since torch 2.15, clamp has no gradient at its
    limits, where alpha starts, so that alpha would never change. The last value says whether all
    slopes are 0.
    """
    active, dead = (lower >= 0).to(lower.dtype), (upper <= 0).to(lower.dtype)
    unstable = (1 - active) * (1 - dead)

    def slope(alpha: torch.Tensor | None) -> torch.Tensor | None:
        if alpha is None:
            return None
        inside = alpha + (alpha.clamp(leaky_alpha, 1) - alpha).detach()
        return inside * unstable + active + dead * leaky_alpha

    return slope(lower_alpha), slope(upper_alpha), leaky_alpha == 0 and (upper <= 0).all()


def _make_contiguous(pool: Any) -> None:
    """Make coefficients contiguous: 0.3 calls `view` on expanded ones, which torch refuses."""
    original = pool.bound_backward

    def bound_backward(self: Any, last_lower: Any, last_upper: Any, *x: Any) -> Any:
        last_lower, last_upper = (
            a.contiguous() if isinstance(a, torch.Tensor) else a for a in (last_lower, last_upper)
        )
        return original(self, last_lower, last_upper, *x)

    pool.bound_backward = bound_backward
