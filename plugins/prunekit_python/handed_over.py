"""What stands in a recipe for a network or data that a Python program hands over."""

from __future__ import annotations

from typing import Any

from prunekit import DataMissingError, NoOptions, UserError
from prunekit.contracts import Context, Data
from prunekit_python import GivenModelOptions


def build_model(options: GivenModelOptions, context: Context) -> Any:
    """Where no network was handed over. Raises `UserError`."""
    raise UserError(
        f"the network ({options.name}) came from a Python program; call prunekit.run or "
        "prunekit.load there with model=..., or name another architecture"
    )


def build_data(options: NoOptions, context: Context) -> Data:
    """Where no images were handed over. Raises `DataMissingError`."""
    raise DataMissingError(
        "the images came from a Python program; call prunekit.run there with data=..., or name "
        "another data set"
    )
