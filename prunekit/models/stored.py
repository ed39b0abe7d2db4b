"""A stored network: what is known of it, and the module with its masks."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn

from prunekit.catalog.component import Use
from prunekit.catalog.registry import load_registry
from prunekit.contracts import Context, Masks
from prunekit.data import seeds
from prunekit.errors import Place, RecipeError, UserError, relative
from prunekit.recipe.resolver import Resolver
from prunekit.recipe.sections import ArchitectureOptions
from prunekit.store.checkpoint import read_model
from prunekit.store.networks import Network

CORE = [field.name for field in dataclasses.fields(ArchitectureOptions)]
"""Keys of [architecture] that are not the component's."""


def load_network(network: Network, given: nn.Module | None = None) -> tuple[Any, Masks]:
    """Build the network anew, or copy the one that is given, and load the stored weights into it.

    It is on the CPU, in evaluation mode. Raises `UserError` where the file does not say what it is,
    or does not fit.
    """
    model = _build(network) if given is None else copy.deepcopy(given).cpu()
    masks = read_model(network.file, model)
    return model.eval(), masks


def find_architecture(network: Network) -> Use[nn.Module]:
    """The architecture that a model file or its run names. Raises `UserError` where none does."""
    where = relative(network.file)
    if "architecture" not in network.sections:
        raise UserError(f"{where} does not say its architecture; prunekit did not write it")
    resolver = Resolver(load_registry(), network.file.parent, lambda path: Place(where))
    table = network.sections["architecture"]
    use = resolver.use("architecture", table, ("architecture",), CORE)
    if use is None:
        raise RecipeError(resolver.problems)
    return use


def _build(network: Network) -> nn.Module:
    use, header = find_architecture(network), network.header
    seed = header.get("seed", 0)
    seeds.seed_all(seed, "architecture")
    context = Context(
        seed=seed, folder=network.file.parent, shape=tuple(header["shape"]),
        classes=header["classes"], fresh=False,
    )  # fmt: skip
    return use.build(context)
