"""timm's image classifiers, of any family: declarations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit import Component, hookimpl, option
from prunekit.errors import OptionError

LOCAL = "local-dir:"
"""How timm calls a model in a folder of this machine."""
TAKEN = {
    "num_classes": "it comes from the data set",
    "in_chans": "it comes from the data set",
    "pretrained": "write it beside kwargs",
    "checkpoint_path": 'write init = "FILE" beside kwargs',
    "features_only": "features are no logits",
}
"""Arguments of timm's that are not for `kwargs`."""

DETAILS = """\
Any classifier of timm's (prunekit list architectures --match 'convnext*'). Tests train and prune
ResNet, ConvNeXt, ViT, EfficientNet and MobileNet.

The number of classes and of channels, and the image size where the model has one, come from the
data set. The model's own mean and deviation are applied inside, so that attacks stay in pixels of
[0, 1]; for grey images they are averaged.

Pruned are all Conv2d and Linear layers and packed attention projections; never vectors, position
tables, or weight-standardised convolutions. Left dense unless a prune stage says exclude:
  plain convolutional networks (ResNet, VGG, RegNet, DenseNet, ...)   nothing
  those with depthwise convolutions (EfficientNet, MobileNet, ...)    these, the first convolution
  those of patches (ViT, DeiT, Swin, Mixer, ConvNeXt, ...)            and the classifier too
exclude = [] prunes everything, exclude = ["head.*", "*.attn.*"] leaves these layers dense.
prunekit check --deep RECIPE says what it comes to.

prunekit export RUN --format timm --out FOLDER writes what timm.create_model("local-dir:FOLDER",
pretrained=True) reads. That model takes normalised pixels; mean and std are in its config.json."""


@dataclass(frozen=True)
class TimmOptions:
    model: str = option(
        help='timm\'s name, such as "resnet18" or "vit_tiny_patch16_224.augreg_in21k", '
        '"hf-hub:OWNER/NAME", or "local-dir:/FOLDER"'
    )
    pretrained: bool = option(False, help="start from the published weights, or the folder's")
    normalize: bool = option(True, help="work on (x - mean) / deviation of the model's own")
    kwargs: dict[str, Any] = option(
        {}, help="more arguments of the model, such as { drop_path_rate = 0.1 }"
    )

    def __post_init__(self) -> None:
        folder = self.model.removeprefix(LOCAL)
        if folder != self.model and not Path(folder).expanduser().is_absolute():
            raise OptionError(
                "model", f"a local-dir is a whole path, got {folder!r}; write it from / on, or the "
                f'model\'s name and init = "{folder}/model.safetensors"'
            )  # fmt: skip
        for name in self.kwargs.keys() & TAKEN.keys():
            raise OptionError("kwargs", f"kwargs cannot hold {name}: {TAKEN[name]}")


def find_files(options: TimmOptions) -> list[Path]:
    """What a local folder holds of a model."""
    if not options.model.startswith(LOCAL):
        return []
    folder = Path(options.model.removeprefix(LOCAL)).expanduser()
    weights = (".safetensors", ".bin", ".pth", ".tar")
    return [f for f in sorted(folder.glob("*")) if f.name == "config.json" or f.suffix in weights]


@hookimpl
def prunekit_architectures() -> Iterable[Component]:
    yield Component(
        name="timm",
        summary="Any image classifier of timm: ResNet, ConvNeXt, ViT, EfficientNet, ...",
        build="prunekit_timm.models:build_timm",
        options=TimmOptions,
        needs=("timm",),
        paper="Wightman, PyTorch Image Models 2019, doi 10.5281/zenodo.4414861",
        details=DETAILS,
        files=find_files,
        catalog="prunekit_timm.models:list_names",
        exports={"timm": "prunekit_timm.models:save"},
    )
