"""Checks of the image size that a network needs."""

from __future__ import annotations

from prunekit.contexts import ArchitectureContext
from prunekit.errors import UserError


def require_size(network: str, context: ArchitectureContext, smallest: int) -> None:
    """Raise `UserError` if the images' height or width is below `smallest` pixels."""
    _, height, width = context.shape
    if min(height, width) < smallest:
        raise UserError(
            f"{network} needs images of at least {smallest} x {smallest} pixels, but these are "
            f'{height} x {width}; choose another architecture, such as "small-cnn"'
        )
