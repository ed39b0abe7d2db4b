"""Builds torchvision's classifiers for the data set's classes and size, normalization inside."""

from __future__ import annotations

import difflib
import re
from typing import Any

from torch import Tensor
from torchvision import models

from prunekit import find_fragile, normalize_inputs
from prunekit.contexts import ArchitectureContext
from prunekit.errors import UserError, explain_briefly
from prunekit_vision import ModelOptions
from prunekit_vision.resnet import DEVIATION, MEAN

SIZES = {"vit_": "image_size", "maxvit_": "input_size"}
"""Name prefixes of models that are built for one image size -> their argument for it."""
AUXILIARY = ("aux", "AuxLogits")
"""Key prefixes of auxiliary classifiers, which some networks have for training."""


def list_names() -> list[str]:
    """Names for the option `model`: all classifiers."""
    names: list[str] = models.list_models(module=models)
    return names


def build_model(options: ModelOptions, context: ArchitectureContext) -> Any:
    """The model for images of `context.shape` (C, H, W); its state-dict keys are torchvision's.

    Raises `UserError` if there is no such model or weights, if the model does not accept the images
    or `kwargs`, or if its published weights cannot be fetched.
    """
    name, (channels, height, width) = options.model, context.shape
    if name not in list_names():
        close = difflib.get_close_matches(name, list_names(), n=1)
        way = "search with: prunekit list architectures --match 'resnet*'"
        way = f"did you mean {close[0]!r}?" if close else way
        raise UserError(f"torchvision has no classifier {name!r}; {way}")
    if channels != 3:
        raise UserError(
            f"torchvision's models need images with 3 channels, but these are {channels} x "
            f'{height} x {width}; write use = "timm", whose models accept any number'
        )
    chosen = _choose_weights(options)
    arguments: dict[str, Any] = {"num_classes": context.classes}
    for start, size in SIZES.items():
        if name.startswith(start):
            arguments[size] = height if size == "image_size" else (height, width)
    arguments |= options.kwargs
    try:
        model: Any = models.get_model(name, weights=None, **arguments)
    except Exception as error:  # torchvision's constructors may raise anything
        told = f" with kwargs {options.kwargs}" if options.kwargs else ""
        reason = explain_briefly(error)
        raise UserError(f"torchvision's {name!r} cannot be built{told}: {reason}") from error
    if getattr(model, "aux_logits", False):
        raise UserError(
            f"torchvision's {name!r} has more than one output in training; write "
            "kwargs = { aux_logits = false }"
        )
    if chosen is not None and context.fresh:
        load_published(model, chosen, name, context.classes)
    if options.normalize:
        transform = chosen.transforms() if chosen is not None else None
        normalize_inputs(
            model, getattr(transform, "mean", MEAN), getattr(transform, "std", DEVIATION)
        )
    model.leave_dense = find_fragile(model)
    return model


def _choose_weights(options: ModelOptions) -> models.WeightsEnum | None:
    """The published weights that the options name; raises `UserError` if there are none."""
    if options.weights is None:
        return None
    known = models.get_model_weights(options.model)
    bare = options.weights.removeprefix(f"{known.__name__}.")
    if bare not in known.__members__:
        names = ", ".join(known.__members__)
        raise UserError(
            f"torchvision's {options.model!r} has no weights {options.weights!r}; there are: "
            f"{names}"
        )
    return known[bare]


def load_published(model: Any, chosen: models.WeightsEnum, name: str, classes: int) -> None:
    """Load published weights; the last layer is skipped if its number of classes is different.

    Raises `UserError` if the weights cannot be fetched or do not fit.
    """
    try:
        # weights_only: never unpickle code. Files in the cache are not fetched again.
        state = chosen.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # a download may raise anything
        raise UserError(
            f"the weights {chosen.name} of torchvision's {name!r} are not in the cache and cannot "
            f"be fetched ({type(error).__name__}); go online once, or leave out weights, or write "
            'init = "FILE" with a file of these weights'
        ) from error
    published = len(chosen.meta["categories"])
    state = {_rename(k): v for k, v in state.items() if not k.startswith(AUXILIARY)}
    own: dict[str, Tensor] = model.state_dict()
    # The oldest files lack these counters.
    state |= {k: v for k, v in own.items() if k.endswith("num_batches_tracked") and k not in state}
    for key, value in own.items():
        first, *others = value.shape or (0,)
        theirs = (published, *others)
        if first == classes != published and key in state and state[key].shape == theirs:
            state[key] = value
    wrong = sorted(own.keys() ^ state.keys())
    wrong += [k for k in own if k in state and own[k].shape != state[k].shape]
    if wrong:
        raise UserError(
            f"the weights {chosen.name} of torchvision's {name!r} do not fit the model at this "
            f"image size or with these kwargs; different: {', '.join(wrong[:4])}"
        )
    model.load_state_dict(state)


def _rename(key: str) -> str:
    """The current name of a key: DenseNet's files have old ones ("denselayer1.norm.1.weight")."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)
