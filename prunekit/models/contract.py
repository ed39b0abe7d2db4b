"""What every network has to be, checked once: when it is built, or handed over from Python."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from prunekit.errors import RunError, UserError, explain_briefly, lacks_memory, relative
from prunekit.evaluation import Standing, eval_mode, own_generators
from prunekit.judging import find_answer
from prunekit.pruning.layers import find_faults, find_prunable
from prunekit.pruning.masks import find_broken
from prunekit.store.tensors.checkpoint import find_misfit


def copy_network(model: nn.Module, owner: str) -> nn.Module:
    """A copy of the network. Raises `RunError` that blames what of it cannot be copied."""
    try:
        with torch.no_grad():  # or the copy of a scripted module would depend on it
            return copy.deepcopy(model)
    except Exception as error:  # what networks hold may raise anything
        if lacks_memory(error):
            raise
        reason = explain_briefly(error)
    path, name = _find_stubborn(model)
    held = f"{path}.{name}".strip(".") or "the network itself"
    raise RunError(
        f"{owner} cannot be copied, because of {held} ({reason}): make it anew in forward, keep "
        "activations with detach(), and use torch.nn.utils.parametrizations in place of the old "
        "weight_norm and spectral_norm"
    )


def _find_stubborn(model: nn.Module) -> tuple[str, str]:
    """(module, attribute) that cannot be copied; nothing where only all of it cannot."""
    for path, module in model.named_modules():
        parts = {**vars(module), **module._buffers, **module._parameters}
        for name, value in parts.items():
            if name in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                # What leads back to the network is copied with it.
                copy.deepcopy(value, {id(m): m for m in model.modules()})
            except Exception:
                return path, name
    return "", ""


PASSES = 3
"""Forwards after which the state dict of a network has to be as it was."""


def check_tensors(model: nn.Module, owner: str) -> None:
    """Raise `RunError` for parameters and buffers that no stage could train, mask or store.

    `owner` is what the message calls the network.
    """
    named = list(chain(model.named_parameters(), model.named_buffers()))
    if lazy := [name for name, value in named if is_lazy(value)]:
        raise RunError(
            f"{owner} has lazy layers, whose size the first image decides ({', '.join(lazy[:4])}): "
            "send one image through it first, model(torch.zeros(1, C, H, W)), or give their sizes"
        )
    for name, value in named:
        if misfit := find_misfit(value):
            raise RunError(f"{owner} has a tensor that is {misfit}: {name}; make it one of floats")


def check_scripted(model: nn.Module, owner: str) -> None:
    """Raise `RunError` where all that could be pruned is inside scripted modules: it cannot be."""
    scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    if scripted and not find_faults(model):
        raise RunError(
            f"{owner} has all its layers in what torch.jit.script or torch.jit.trace made, which "
            "can be evaluated but neither trained nor pruned: take the network as it was before"
        )


@torch.no_grad()
def check_state_dict(model: nn.Module, owner: str) -> None:
    """Raise `RunError` unless the state dict holds the network, and loading it brings it back."""
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    own |= model.named_buffers(remove_duplicate=False)
    for path, module in model.named_modules(remove_duplicate=False):
        for name in getattr(module, "_non_persistent_buffers_set", ()):
            own.pop(f"{path}.{name}".removeprefix("."), None)
    fault = ""
    state = model.state_dict()
    if missing := sorted(own.keys() - state.keys()):
        fault = f"it lacks {missing[0]}"
    elif extra := sorted(state.keys() - own.keys()):
        fault = f"it holds {extra[0]} as well"
    else:
        before = {name: value.clone() for name, value in own.items()}
        # A third has no end in any type: what rounds or scales shows.
        other = {
            name: torch.full_like(value, 1 / 3) if value.is_floating_point() else value
            for name, value in before.items()
        }
        try:
            model.load_state_dict(other)
            for found in (own, model.state_dict()):
                if not all(_same(found[name], value) for name, value in other.items()):
                    fault = "loading it does not bring it back"
            model.load_state_dict(before)
        except Exception as error:  # an override may raise anything
            if lacks_memory(error):
                raise
            fault = f"loading it fails, {explain_briefly(error)}"
    if fault:
        raise RunError(
            f"{owner} overrides its state_dict ({_find_override(model)}), so that it cannot be "
            f"stored: {fault}; leave state_dict and load_state_dict to torch"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _find_override(model: nn.Module) -> str:
    """Class and method that is not torch's; a hook, where there is none."""
    for module in model.modules():
        for name in ("state_dict", "load_state_dict", "get_extra_state", "_save_to_state_dict"):
            theirs = getattr(type(module), name)
            if not theirs.__module__.startswith("torch."):
                return f"{type(module).__name__}.{name}"
    return "by a hook"


def find_logits(
    model: nn.Module,
    shape: Sequence[int],
    owner: str,
    *,
    training: bool = False,
    stored: bool = False,
) -> Tensor:
    """The logits (2, K) that the network gives for two black images of this shape (C, H, W).

    In evaluation mode, or in train mode with `training`; the network and all random numbers stay as
    they are. If K is 2, three images tell (2, K) from (K, 2). Raises `RunError` where it does not
    take them, changes them, or gives anything else, a subclass of Tensor included; with `stored`,
    also where its first forwards change what its state dict holds, which a file would not fit then.
    """
    first = next(chain(model.parameters(), model.buffers()), torch.empty(0))
    mode = " in train mode" if training else ""
    standing = Standing(model)
    try:
        with eval_mode(model), own_generators(), torch.no_grad():
            model.train(training)
            before = _lay_out(model)
            for _ in range(PASSES if stored else 1):
                black = torch.zeros(2, *shape, device=first.device)
                logits = find_answer(model, black, owner, mode)
            after = _lay_out(model)
            if logits.shape[1] == 2:  # classes, or images?
                find_answer(model, torch.cat([black, black[:1]]), owner, mode)
    except Exception as error:  # layers may raise anything for images of the wrong size
        if isinstance(error, RunError) or lacks_memory(error):
            raise
        size = " x ".join(map(str, shape))
        reason = explain_briefly(error) + _find_precision(model)
        raise RunError(f"{owner} cannot take images of {size}{mode}: {reason}") from error
    finally:
        standing.restore()
    if type(logits) is not Tensor:
        raise RunError(
            f"{owner} gives logits of class {type(logits).__name__}{mode}, which computes in its "
            "own way: return a plain tensor, logits.as_subclass(torch.Tensor)"
        )
    changed = [n for n in before | after if before.get(n) != after.get(n)]
    if stored and changed:
        was, now = (found.get(changed[0], "not there") for found in (before, after))
        raise RunError(
            f"{owner} changes its state dict in the forward{mode}, so that stored weights would "
            f"not fit: {changed[0]} is {was} before, {now} after; make layers in __init__, and "
            "keep what grows or changes its type outside, or as a buffer with persistent=False"
        )
    return logits


def _find_precision(model: nn.Module) -> str:
    """What to write where weights are not as precise as images; empty where they are."""
    kinds = {str(p.dtype).partition(".")[2] for p in model.parameters() if p.is_floating_point()}
    others = " and ".join(sorted(kinds - {"float32"}))
    return others and f"; images are float32, and it has weights in {others}: write model.float()"


def check_start(model: nn.Module, file: Path | None, *, trained: bool) -> None:
    """Raise `UserError` for weights of a file, or else from Python, that nothing can start from.

    Those from Python may be zeros or ones if the first stage trains all of them.
    """
    owner = relative(file) if file else "the network from Python"
    nothing = "" if file is None and trained else find_no_weights(model)
    if fault := find_broken(model) or nothing:
        raise UserError(f"{owner} holds {fault}; start from the weights of a trained network")


def find_no_weights(model: nn.Module) -> str:
    """What the prunable weights are where nothing was trained in them; empty for any others."""
    weights = list(find_prunable(model).values())
    if not weights or not all(bool(((w == 0) | (w == 1)).all()) for w in weights):
        return ""
    if any(w.any() for w in weights):
        return "no weights: all of them are 0 or 1, as those of masks are"
    return "no weights: all of them are zero"


def _lay_out(model: nn.Module) -> dict[str, str]:
    """Shapes and types of all that the state dict holds."""
    return {
        name: f"{tuple(v.shape)} {v.dtype}" if isinstance(v, Tensor) else type(v).__name__
        for name, v in model.state_dict().items()
    }
