"""prunekit prunes adversarially robust neural networks."""

from prunekit.component import (
    API_VERSION,
    Component,
    Facts,
    NoOptions,
    Radius,
    Use,
    hookimpl,
    option,
)
from prunekit.errors import DataMissingError, OptionError, UserError

__all__ = [
    "API_VERSION",
    "Component",
    "DataMissingError",
    "Facts",
    "NoOptions",
    "OptionError",
    "Radius",
    "Use",
    "UserError",
    "hookimpl",
    "option",
]
__version__ = "0.1.0"
