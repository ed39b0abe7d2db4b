"""Anybody's arrays."""

from __future__ import annotations

from prunekit import read_npz
from prunekit.contracts import Context, Data
from prunekit_arrays import NpzOptions


def build(options: NpzOptions, context: Context) -> Data:
    """Read the file; raises `UserError` with what is wrong with it."""
    return read_npz(options.file, classes=options.classes, channels=options.channels)
