"""Where a recipe runs: its [compute] section, and what sparse layers run on."""

from __future__ import annotations

from prunekit.catalog.component import Use
from prunekit.catalog.kinds import DEFAULT_BACKEND
from prunekit.recipe.resolver import Resolver
from prunekit.recipe.toml.document import Recipe
from prunekit.recipe.toml.sections import ComputeOptions
from prunekit.steps import Backend


def resolve_compute(recipe: Recipe, resolver: Resolver) -> ComputeOptions:
    """The [compute] section; a mistake in it is a problem of the resolver."""
    table = recipe.data.get("compute", {})
    if not isinstance(table, dict):
        resolver.problem(("compute",), 'write [compute] with device = "cpu"')
        return ComputeOptions()
    found = resolver.options(ComputeOptions, table, ("compute",), "[compute]")
    return found or ComputeOptions()


def find_backend(compute: ComputeOptions, resolver: Resolver) -> Use[Backend] | None:
    """What sparse layers run on; None where they are dense, as where "auto" finds nothing."""
    if compute.sparse == "off" or compute.backend is not None:
        return None if compute.sparse == "off" else compute.backend
    entries = resolver.registry.search(DEFAULT_BACKEND, "backend")
    if compute.sparse == "auto" and (len(entries) != 1 or entries[0].missing):
        return None
    return resolver.use("backend", DEFAULT_BACKEND, ("compute", "sparse"))
