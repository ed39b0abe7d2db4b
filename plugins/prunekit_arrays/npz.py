"""The data set `npz`: arrays in a file of the user's."""

from __future__ import annotations

from prunekit.contexts import DatasetContext
from prunekit.contracts import Data
from prunekit_arrays import NpzOptions
from prunekit_arrays.reading import read_npz


def build(options: NpzOptions, context: DatasetContext) -> Data:
    """Read the file; raises `UserError` if the file or its arrays cannot be used."""
    return read_npz(options.file, classes=options.classes, channels=options.channels)
