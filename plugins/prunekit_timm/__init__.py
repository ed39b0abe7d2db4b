"""All image classifiers of timm: declarations."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit import ArchitectureComponent, hookimpl, option
from prunekit.errors import OptionError

LOCAL = "local-dir:"
"""timm's prefix for a model in a local folder."""
TAKEN = {
    "num_classes": "it comes from the data set",
    "in_chans": "it comes from the data set",
    "pretrained": "write it outside kwargs",
    "checkpoint_path": 'write init = "FILE" outside kwargs',
    "features_only": "a classifier has to return logits, not features",
}
"""Arguments of timm's models that `kwargs` cannot hold, with the reason."""

DETAILS = """\
Any classifier of timm (prunekit list architectures --match 'convnext*'). Tests train and prune
ResNet, ConvNeXt, ViT, EfficientNet and MobileNet.

The numbers of classes and channels, and the image size if the model needs one, come from the data
set. Images are normalized inside with the model's own mean and standard deviation, so attacks work
on pixels in [0, 1]; for grayscale images, mean and deviation are averaged over the channels.

All Conv2d and Linear layers and packed attention projections can be pruned; vectors, position
tables and weight-standardized convolutions cannot. Unless a prune stage sets exclude, these layers
are left dense:
  ResNet, VGG, RegNet, DenseNet, ... (plain convolutions)     none
  EfficientNet, MobileNet, ... (depthwise convolutions)       depthwise and first convolutions
  ViT, DeiT, Swin, Mixer, ConvNeXt, ... (patches)             the same, and the classifier
exclude = [] prunes everything; exclude = ["head.*", "*.attn.*"] leaves those layers dense.
prunekit check --deep RECIPE shows the layers of a recipe.

prunekit export RUN --format timm --out FOLDER writes a folder that
timm.create_model("local-dir:FOLDER", pretrained=True) reads. That model expects normalized pixels;
mean and std are in its config.json."""


@dataclass(frozen=True)
class TimmOptions:
    """Options of the architecture `timm`."""

    model: str = option(
        help='timm\'s name, such as "resnet18" or "vit_tiny_patch16_224.augreg_in21k", '
        '"hf-hub:OWNER/NAME", or "local-dir:/FOLDER"'
    )
    pretrained: bool = option(False, help="start from the published weights or those in the folder")
    normalize: bool = option(True, help="normalize images with the model's own mean and deviation")
    kwargs: dict[str, Any] = option(
        {}, help="further arguments of the model, such as { drop_path_rate = 0.1 }"
    )

    def __post_init__(self) -> None:
        folder = self.model.removeprefix(LOCAL)
        if folder != self.model and not Path(folder).expanduser().is_absolute():
            raise OptionError(
                "model",
                f"a local-dir has to be an absolute path, got {folder!r}; write the whole path, or "
                f'the model\'s name and init = "{folder}/model.safetensors"',
            )
        for name in self.kwargs.keys() & TAKEN.keys():
            raise OptionError("kwargs", f"kwargs cannot hold {name}: {TAKEN[name]}")


def find_files(options: TimmOptions) -> list[Path]:
    """The files of a model in a local folder; none for other models."""
    if not options.model.startswith(LOCAL):
        return []
    folder = Path(options.model.removeprefix(LOCAL)).expanduser()
    weights = (".safetensors", ".bin", ".pth", ".tar")
    return [f for f in sorted(folder.glob("*")) if f.name == "config.json" or f.suffix in weights]


def tell_risk(options: TimmOptions) -> str:
    """What a stranger's file must not cause: the names of timm itself are published by timm."""
    named = [key for key in options.kwargs if key.startswith("pretrained_cfg")]
    if named:
        return f"would make timm load what {' and '.join(named)} name"
    return (
        "" if re.fullmatch(r"[\w.-]+", options.model) else f"would make timm load {options.model!r}"
    )


@hookimpl
def prunekit_architectures() -> Iterable[ArchitectureComponent]:
    """Declare the architecture `timm`."""
    yield ArchitectureComponent(
        name="timm",
        summary="Any image classifier in timm: ResNet, ConvNeXt, ViT, EfficientNet, ...",
        build="prunekit_timm.models:build_timm",
        options=TimmOptions,
        needs=("timm",),
        paper="Wightman, PyTorch Image Models 2019, doi 10.5281/zenodo.4414861",
        details=DETAILS,
        files=find_files,
        risks=tell_risk,
        catalog="prunekit_timm.models:list_names",
        exports={"timm": "prunekit_timm.models:save"},
    )
