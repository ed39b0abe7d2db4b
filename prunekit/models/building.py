"""Building networks, with their normalization inside."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunekit.catalog.containment import ask
from prunekit.contexts import ArchitectureContext, DatasetContext
from prunekit.data import seeds
from prunekit.errors import RunError, lacks_memory
from prunekit.models.contract import (
    check_scripted,
    check_state_dict,
    check_tensors,
    copy_network,
    find_logits,
)
from prunekit.pruning.layers import (
    find_faults,
    find_prunable,
    find_unprunable,
    find_weights,
    watch_network,
)
from prunekit.recipe.describing import describe
from prunekit.recipe.plan import Plan, Run


def build_network(
    run: Run,
    shape: tuple[int, int, int],
    classes: int,
    device: torch.device | str = "cpu",
    *,
    fresh: bool = True,
) -> nn.Module:
    """The network of a run, before any weights are loaded. It is tried on two black images, and
    watched: from then on weights whose zeros would be none of its kernels count as not prunable.

    `fresh` is False if weights will be loaded anyway. Raises `RunError` if the network does not
    take images of this shape (C, H, W), does not return logits (2, K) in either mode that the run
    needs, or cannot be stored.
    """
    use = run.architecture
    if use.value is not None:
        copy_network(use.value, "the network")
    seeds.seed_all(run.seed, "architecture")
    model = use.build(
        ArchitectureContext(
            seed=run.seed, folder=run.folder, shape=shape, classes=classes, fresh=fresh
        )
    )
    owner = f"architecture {use.component.name!r} of plugin {use.plugin}"
    if not isinstance(model, nn.Module):
        raise RunError(f"{owner} does not build an nn.Module")
    check_tensors(model, owner)
    model.to(device)
    check_state_dict(model, owner)
    trained = any(stage.kind != "evaluate" for stage in run.stages)
    if trained:
        check_scripted(model, owner)
    for training in (False, True) if trained else (False,):
        logits = find_logits(model, shape, owner, training=training, stored=True)
        found = tuple(logits.shape)
        if found != (2, classes):
            raise RunError(
                f"{owner} gives {found} for 2 images and {classes} classes, instead of "
                f"(2, {classes})"
            )
    watch_network(model, shape)
    return model


def describe_model(run: Run, shape: Sequence[int], classes: int) -> dict[str, Any]:
    """What the header of a model file says about the network."""
    return {
        "architecture": describe(run.architecture),
        "shape": list(shape),
        "classes": classes,
        "dataset": run.dataset.component.name,
        "pixels": "[0, 1]; any normalisation is inside the network",
        "threat": dataclasses.asdict(run.threat) if run.threat else None,
        "seed": run.seed,
    }


Network = TypeVar("Network", bound=nn.Module)


def normalize_inputs(model: Network, mean: Sequence[float], deviation: Sequence[float]) -> Network:
    """Make a network take pixels in [0, 1], by applying (x - mean) / deviation to each channel.

    The constants move with the network to its device but are not in its state dict, so that the
    same weights load without them. Changes the model in place, and returns it.
    """
    for name, values in (("input_mean", mean), ("input_deviation", deviation)):
        model.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)
    model.register_forward_pre_hook(_normalize)
    return model


def _normalize(model: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = inputs
    return ((x - model.input_mean) / model.input_deviation, *others)


def find_fragile(model: nn.Module, classifiers: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of small weights that matter much, for the attribute `leave_dense` of a network.

    Plain convolutional networks have none (HYDRA prunes first and last layers too). If there are
    depthwise convolutions, these and the first convolution are fragile (Zhu & Gupta 2017, arXiv
    1710.01878, on MobileNets). If the first convolution cuts the image into patches, it is fragile,
    and so is the classifier: the layers named `classifiers`, by default the last one.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    convolutions = {n: m for n, m in layers.items() if isinstance(m, nn.Conv2d)}
    found = [n for n, m in convolutions.items() if 1 < m.groups == m.in_channels]
    first, stem = next(iter(convolutions.items()), ("", None))
    patches = stem is not None and stem.stride == stem.kernel_size != (1, 1)
    if patches or found:
        found.append(first)
    if patches:
        found += classifiers or list(layers)[-1:]
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    fragile = {names[layers[n].weight] for n in found if find_weights(layers[n])}
    return tuple(name for name in names.values() if name in fragile)


def inspect_networks(plan: Plan) -> list[dict[str, Any]]:
    """What `prunekit check` prints about each network of a plan.

    Raises `UserError` if a network cannot be built for its images, cannot be pruned, or must not
    be built.
    """
    plan.permit()
    distinct = {}
    for run in plan.runs:
        patterns = [s.options.exclude for s in run.stages if s.prunes]
        distinct[str([describe(run.dataset), describe(run.architecture), patterns])] = run
    return [_inspect(run) for run in distinct.values()]


def open_dataset(run: Run, **more: Any) -> DatasetContext:
    """What the data set of a run may use. It has no seed: runs of all seeds share the data."""
    model = run.architecture.value
    outputs = None if model is None else partial(count_outputs, model)
    return DatasetContext(seed=0, folder=run.folder, outputs=outputs, **more)


def count_outputs(model: nn.Module, shape: tuple[int, int, int]) -> int | None:
    """K of the logits for images (C, H, W); None if the network does not take them."""
    try:
        # A copy, because a forward may make layers: the network stays the caller's.
        return find_logits(copy.deepcopy(model), shape, "the network").shape[1]
    except Exception as error:  # whatever it is, it is told when the network is built
        if lacks_memory(error):
            raise
        return None


def find_shape(run: Run) -> tuple[tuple[int, int, int], int]:
    """Shape (C, H, W) of an image, and the number of classes.

    The data is read only if the component does not declare them.
    """
    if run.dataset.component.facts:
        known = ask(run.dataset, "facts")
    else:
        known = run.dataset.build(open_dataset(run))
    return known.shape, known.classes


def _inspect(run: Run) -> dict[str, Any]:
    shape, classes = find_shape(run)
    model = build_network(run, shape, classes)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    weights = {n: w for n, w in find_prunable(model).items() if n not in frozen}
    dense: dict[str, None] = {}
    for stage in run.stages:
        if stage.prunes:
            exclude = stage.options.exclude
            chosen = getattr(model, "leave_dense", ()) if exclude is None else exclude
            kept = find_prunable(model, chosen)
            dense |= dict.fromkeys(name for name in weights if name not in kept)
    named = describe(run.architecture)
    faults = {name: f", {fault}" if fault else "" for name, fault in find_faults(model).items()}
    others = find_unprunable(model).items()
    return {
        "architecture": " ".join(str(named[k]) for k in ("use", "model") if k in named),
        "parameters": sum(p.numel() for p in model.parameters()),
        "prunable": sum(weight.numel() for weight in weights.values()),
        "layers": len(weights),
        "dense": list(dense),
        "frozen": frozen,
        "unprunable": [f"{name} ({layer}{faults.get(name, '')})" for name, layer in others],
    }
