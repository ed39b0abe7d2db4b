"""What to tell the user when auto_LiRPA cannot bound a network: which operator, in which layers."""

from __future__ import annotations

import traceback

import torch
from torch import Tensor, nn

from prunekit_lirpa import versions


def explain(
    error: Exception, unsupported: list[tuple[str, str]], model: nn.Module, example: Tensor
) -> str:
    """One line that names the operator that auto_LiRPA failed on, and its layers.

    `unsupported` are the (operator, node) pairs that it could not convert, `model` is the plain
    network, and `example` (B, C, H, W) are images to run it on.
    """
    if unsupported:
        operators = sorted({name.rpartition("::")[2] for name, _ in unsupported})
        what = f"does not know the operator{'s' * (len(operators) > 1)} {', '.join(operators)}"
    else:
        operators = [name.removeprefix("Bound") for name in _failed_nodes(error)]
        said = f"{type(error).__name__}: {error}".strip().rstrip(":").splitlines()[0]
        what = f"cannot bound {operators[0]} ({said})" if operators else f"failed ({said})"
    layers = find_layers(model, example, operators)
    where = f" of layer{'s' * (len(layers) > 1)} {', '.join(layers)}" if layers else ""
    return f"auto_LiRPA {what}{where}; replace it with an operator that docs/certified.md lists"


def _failed_nodes(error: Exception) -> list[str]:
    """The operator of the innermost auto_LiRPA node in the error's traceback, if there is one."""
    found = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        # A node's own method; or a loop over nodes, where a constant stands for its operation.
        names = ("self", "l", "n") if "auto_LiRPA" in frame.f_globals["__name__"] else ()
        for node in (frame.f_locals.get(name) for name in names):
            kind = type(node).__name__
            if type(node).__module__.startswith("auto_LiRPA.operators") and kind not in CONSTANTS:
                # Since 0.7, x / y is traced as x * (1 / y).
                over = any(
                    type(i).__name__ == "BoundReciprocal" for i in getattr(node, "inputs", ())
                )
                found = ["BoundDiv" if kind == "BoundMul" and over else kind]
                break
    return found


CONSTANTS = ("BoundConstant", "BoundBuffers", "BoundParams", "BoundInput", "BoundReciprocal")


def find_layers(model: nn.Module, example: Tensor, operators: list[str]) -> list[str]:
    """Names (and types) of the innermost layers that contain one of these ONNX operators.

    `example` (B, C, H, W) are images to run the network on.
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, None] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Tracing calls the layer again, and with it this hook.
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
    """The ONNX operators that a layer is traced to, given its input x."""
    with versions.unsupported() as unknown:
        try:
            bounded = versions.trace(layer, x, "adaptive")
            nodes = [type(node).__name__ for node in bounded._modules.values()]
        # Whatever the error is, the operator that could not be traced is its cause.
        except Exception as error:
            nodes = _failed_nodes(error)
    unknown_names = {name.rpartition("::")[2] for name, _ in unknown}
    return unknown_names | {name.removeprefix("Bound") for name in nodes}
