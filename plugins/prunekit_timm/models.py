"""Builds timm's models for the data set's classes, channels and size, with normalization inside."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from timm.models import load_model_config_from_hf, save_for_hf

from prunekit import find_fragile, normalize_inputs, read_json
from prunekit.contexts import ArchitectureContext
from prunekit.errors import UserError, explain_briefly
from prunekit_timm import LOCAL, TimmOptions

SEARCH = "search with: prunekit list architectures --match 'resnet*'"
HUB = ("hf-hub:", "hf_hub:")


def list_names() -> list[str]:
    """Names for the option `model`, without those of pretrained weights."""
    return timm.list_models()


def build_timm(options: TimmOptions, context: ArchitectureContext) -> Any:
    """The model for images of `context.shape` (C, H, W); its state-dict keys are those of timm.

    Raises `UserError` if there is no such model, if it does not accept `kwargs`, or if its
    published weights cannot be fetched.
    """
    channels, height, width = context.shape
    # Do not fetch weights that others will be loaded over.
    pretrained = options.pretrained and context.fresh
    with _explaining(options):
        arguments: dict[str, Any] = {"num_classes": context.classes, "in_chans": channels}
        if _has_size(options):
            arguments["img_size"] = (height, width)
        name = options.model
        if name.startswith(LOCAL):
            name = f"{LOCAL}{_find_folder(options)}"
        model: Any = timm.create_model(name, pretrained, **{**arguments, **options.kwargs})
    if options.normalize:
        mean, deviation = (model.pretrained_cfg[key] for key in ("mean", "std"))
        normalize_inputs(model, adapt(mean, channels), adapt(deviation, channels))
    classifiers = model.pretrained_cfg.get("classifier") or ()
    model.leave_dense = find_fragile(
        model, [classifiers] if isinstance(classifiers, str) else classifiers
    )
    return model


def adapt(values: Sequence[float], channels: int) -> list[float]:
    """One value per channel: the average for one channel, otherwise the values repeated cyclically.

    timm adapts the weights of the first convolution in the same way.

    >>> adapt((1.0, 2.0, 3.0), 1), adapt((1.0, 2.0, 3.0), 4)
    ([2.0], [1.0, 2.0, 3.0, 1.0])
    """
    if channels == 1:
        return [sum(values) / len(values)]
    return [values[i % len(values)] for i in range(channels)]


def save(model: Any, options: TimmOptions, header: Mapping[str, Any], out: Path) -> None:
    """Write a folder that `timm.create_model("local-dir:OUT", pretrained=True)` reads.

    timm's models expect normalized pixels: the folder's `config.json` has the mean and deviation
    with which the network here normalizes inside (0 and 1 if it does not). `header` is that of the
    model file.
    """
    shape = list(header["shape"])
    mean, deviation = [0.0] * shape[0], [1.0] * shape[0]
    if options.normalize:
        mean, deviation = (t.flatten().tolist() for t in (model.input_mean, model.input_deviation))
    threat = header.get("threat")
    about = f"pruned by prunekit to sparsity {header['sparsity']:.4g} of its layers"
    if threat:
        about += f", trained for {threat['norm']} {threat['eps']:.4g} in pixel units"
    arguments = {"num_classes": header["classes"], "in_chans": shape[0], **options.kwargs}
    if _has_size(options):
        arguments.setdefault("img_size", shape[1:])
    config = {
        "input_size": shape,
        "mean": mean,
        "std": deviation,
        "num_classes": header["classes"],
        "crop_pct": 1.0,
        "tag": "prunekit",
        "description": about,
    }
    save_for_hf(
        model, str(out), {"pretrained_cfg": config}, model_args=arguments, safe_serialization=True
    )


def _find_folder(options: TimmOptions) -> Path:
    return Path(options.model.removeprefix(LOCAL)).expanduser()


def _has_size(options: TimmOptions) -> bool:
    """Whether the model is built for images of one size, given by its argument `img_size`."""
    name = options.model
    config: Mapping[str, Any]
    arguments: Mapping[str, Any]
    if name.startswith(LOCAL):
        told = read_json(_find_folder(options) / "config.json", "copy it from the model's page")
        config, arguments = told.get("pretrained_cfg", told), told.get("model_args", {})
    elif name.startswith(HUB):
        config, _, arguments = load_model_config_from_hf(name.partition(":")[2])
    else:
        bare = name.partition(".")[0]
        if not timm.is_model(bare) and "/" not in name:  # timm's own message for paths is clear
            close = difflib.get_close_matches(bare, timm.list_models(), n=3)
            way = f"did you mean {' or '.join(map(repr, close))}?" if close else SEARCH
            raise UserError(f"timm has no model {name!r}; {way}")
        known = timm.get_pretrained_cfg(name)
        config, arguments = vars(known) if known else {}, {}
    return bool(config.get("fixed_input_size") or "img_size" in arguments)


@contextmanager
def _explaining(options: TimmOptions) -> Iterator[None]:
    """Turns exceptions of timm and the hub into one-line messages, and hides the hub's warnings."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    name = options.model
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if name.startswith(LOCAL):
            raise UserError(f"timm's {name!r} cannot be read: {explain_briefly(error)}") from error
        raise UserError(
            f"the files of timm's {name!r} are not in the cache and cannot be fetched "
            f'({type(error).__name__}); go online once, or write model = "{LOCAL}/FOLDER" with a '
            "folder that timm saved, or pretrained = false"
        ) from error
    except Exception as error:  # timm's constructors may raise anything
        told = f" with kwargs {options.kwargs}" if options.kwargs else ""
        raise UserError(
            f"timm's {name!r} cannot be built{told}: {explain_briefly(error)}"
        ) from error
    finally:
        hub.setLevel(level)
