"""Stored networks, loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.catalog.component import Use
from prunekit.catalog.registry import load_registry
from prunekit.contexts import ArchitectureContext
from prunekit.contracts import Masks
from prunekit.data import seeds
from prunekit.errors import Place, RecipeError, UserError, explain_briefly, relative
from prunekit.models.contract import check_state_dict, check_tensors, copy_network
from prunekit.recipe.resolver import Resolver
from prunekit.recipe.toml.sections import ArchitectureOptions
from prunekit.store.networks import Network
from prunekit.store.tensors.checkpoint import read_model


def load_network(
    network: Network, given: nn.Module | None = None, *, trust: bool = False
) -> tuple[Any, Masks]:
    """(network, masks) with the stored weights, on the CPU and in evaluation mode.

    It is built anew, or copied from the one that is given. Raises `UserError` if the file does not
    say its architecture, does not fit it, or would run code that is neither known nor to `trust`.
    """
    if given is None:
        use, header = find_architecture(network, trust=trust), network.header
        if missing := {"shape", "classes"} - header.keys():
            raise UserError(f"{relative(network.file)} is damaged: it lacks {min(missing)!r}")
        seed, shape = header.get("seed", 0), tuple(header["shape"])
        seeds.seed_all(seed, "architecture")
        folder, classes = network.file.parent, header["classes"]
        model: Any = _build(
            use,
            ArchitectureContext(
                seed=seed, folder=folder, shape=shape, classes=classes, fresh=False
            ),
            network.file,
        )
    else:
        model = copy_network(given, "the network").cpu()
        check_tensors(model, "the network")
        check_state_dict(model, "the network")
    masks = read_model(network.file, model)
    return model.eval(), masks


def _build(use: Use[nn.Module], context: ArchitectureContext, file: Path) -> nn.Module:
    try:
        return use.build(context)
    except UserError:
        raise
    # Its options, shape and classes are what the file says.
    except Exception as error:
        raise UserError(
            f"the network of {relative(file)} cannot be built: {explain_briefly(error)}"
        ) from error


def find_architecture(network: Network, *, trust: bool = False) -> Use[nn.Module]:
    """The architecture that a model file or its run names. Raises `UserError` if there is none."""
    where = relative(network.file)
    if "architecture" not in network.sections:
        raise UserError(f"{where} does not say its architecture; prunekit did not write it")
    foreign = {"architecture": "" if trust else network.source}
    folder = network.file.parent
    resolver = Resolver(load_registry(), folder, lambda path: Place(where), foreign=foreign)
    core = [field.name for field in dataclasses.fields(ArchitectureOptions)]
    table = network.sections["architecture"]
    use = resolver.use("architecture", table, ("architecture",), core)
    if use is None:
        raise RecipeError(resolver.problems)
    return use
