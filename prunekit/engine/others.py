"""Networks that an objective looks at beside the one that is trained, such as teachers."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from prunekit.engine.work import Work, build_state
from prunekit.errors import UserError, relative
from prunekit.models.stored import find_architecture, load_network
from prunekit.pruning.masks import count_weights, measure_sparsity
from prunekit.report import Note
from prunekit.store.networks import read_network


def open_network(work: Work, file: Path | None) -> nn.Module:
    """The network of a model file, or without one the run's dense network; see `ObjectiveContext`.

    Raises `UserError` where there is none, for a file whose network takes other images or tells
    other classes apart than the run's, and for one that would run code which no recipe of this
    user ran.
    """
    if file is not None:
        model = _load(work, file)
    elif work.dense is None:
        raise UserError(
            "no pretrain stage that leaves the network dense comes before this one; "
            'name a model file, as in teacher = "dense.safetensors"'
        )
    else:
        model = build_state(work.run, work.loaded.data, work.compute, work.dense).model
    return model.to(work.device).eval().requires_grad_(False)


def _load(work: Work, file: Path) -> nn.Module:
    network, data = read_network(file), work.loaded.data
    found = (network.header.get("shape"), network.header.get("classes"))
    if found != ([*data.shape], data.classes):
        raise UserError(
            f"the network of {relative(file)} is for images {found[0]} and {found[1]} classes, the "
            f"data set has {[*data.shape]} and {data.classes}; name one that fits"
        )
    architecture = find_architecture(network)
    try:
        architecture.permit()
    except UserError as error:
        why = str(error).partition(", which may do")[0]
        raise UserError(
            f"{why}, and no recipe of yours did so before; if you trust it, name it as the "
            "[architecture] of a recipe and give that one to prunekit run --dry-run first"
        ) from None
    model: nn.Module
    model, masks = load_network(network)
    if sparsity := measure_sparsity(count_weights(model, masks)):
        told = f"the network of {relative(file)} is pruned, {sparsity:.1%} of its weights are 0"
        work.report(Note(f"{told}; a dense one may teach more"))
    return model
