"""The networks: sizes by hand, keys, the original's logits, initialisation."""

from __future__ import annotations

from math import prod, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from prunekit_nets import Initialization, prunekit_architectures
from torch import nn

from prunekit.catalog.component import Use
from prunekit.contexts import ArchitectureContext
from prunekit.errors import UserError
from prunekit.testing import example_context

DATA = Path(__file__).parents[1] / "data"
COMPONENTS = {component.name: component for component in prunekit_architectures()}
CIFAR = (3, 32, 32)


Shape = tuple[int, int, int]


def build(
    name: str,
    shape: Shape = CIFAR,
    classes: int = 10,
    how: Initialization = "kaiming-normal",
    keep_ratio: float | None = None,
    *,
    batch_norm: bool = False,
) -> nn.Module:
    component = COMPONENTS[name]
    told = {"batch_norm": True} if batch_norm else {}
    options = component.options(initialize=how, keep_ratio=keep_ratio, **told)
    use: Use[nn.Module] = Use(component, options, "nets")
    return use.build(example_context(ArchitectureContext, shape=shape, classes=classes))


def outline(name: str, shape: Shape = CIFAR, classes: int = 10) -> nn.Module:
    """The network without memory for its weights."""
    # On the meta device torch needs seconds of imports for a normal draw, none for a uniform one.
    with torch.device("meta"):
        return build(name, shape, classes, "kaiming-uniform")


def count(name: str, shape: Shape = CIFAR, classes: int = 10) -> int:
    return sum(p.numel() for p in outline(name, shape, classes).parameters())


def vgg_count(channels: list[int], classes: int, *, batch_norm: bool) -> int:
    """9 weights for each pair of channels, no bias; scale and shift; the head of 4c-256-256-K."""
    convolutions = sum(9 * i * o for i, o in zip([3, *channels], channels, strict=False))
    norms = 2 * sum(channels) if batch_norm else 0
    head = (4 * channels[-1] + 1) * 256 + 257 * 256 + 257 * classes
    return convolutions + norms + head


def wrn_count(blocks: int, width: int, classes: int) -> int:
    """First convolution, then blocks of two 3x3 convolutions, three 1x1 shortcuts, last norm."""
    total, inputs = 9 * 3 * 16, 16
    for outputs in (16 * width, 32 * width, 64 * width):
        for _ in range(blocks):
            total += 9 * inputs * outputs + 9 * outputs * outputs + 2 * inputs + 2 * outputs
            total += inputs * outputs if inputs != outputs else 0
            inputs = outputs
    return total + 2 * inputs + (inputs + 1) * classes


def test_parameter_counts_by_hand() -> None:
    # 9 * (192 + 4096 + 8192 + 16384) = 259,776 in convolutions; 2 * 384 = 768 in norms;
    # 512 * 256 + 256 + 256 * 256 + 256 + 2570 = 199,690 in the head.
    assert count("vgg4-bn") == 259_776 + 768 + 199_690 == 460_234
    # 14,710,464 in 13 convolutions, 2 * 4224 in norms, 592,906 in the head 2048-256-256-10.
    assert count("vgg16-bn") == 14_710_464 + 8_448 + 592_906 == 15_311_818
    # First convolution; first blocks of the stacks (the first: 9*16*64 + 9*64*64 in 3x3
    # convolutions, 160 in norms, 16*64 in the shortcut) and their other three; last norm; 257*10.
    stacks = (47_264 + 3 * 73_984) + (229_760 + 3 * 295_424) + (918_272 + 3 * 1_180_672)
    assert count("wrn-28-4") == wrn_count(4, 4, 10) == 432 + stacks + 512 + 2_570 == 5_849_050
    # The published 36.5 and 0.37 millions, and so on.
    assert count("wrn-28-10") == wrn_count(4, 10, 10) == 36_479_194
    assert count("wrn-28-1") == wrn_count(4, 1, 10) == 369_498
    assert count("wrn-34-10") == wrn_count(5, 10, 10) == 46_160_474
    assert count("wrn-40-2", classes=100) == wrn_count(6, 2, 100) == 2_255_156
    # 4*4*3*16 + 16, 4*4*16*32 + 32, 32*8*8*100 + 100, 1010.
    assert count("cifar-small") == 784 + 8_224 + 204_900 + 1_010 == 214_918
    # 3*3*3*32 + 32, 4*4*32*32 + 32, 3*3*32*64 + 64, 4*4*64*64 + 64, 64*8*8*512 + 512,
    # 512*512 + 512, 5130.
    large = 896 + 16_416 + 18_496 + 65_600 + 2_097_664 + 262_656 + 5_130
    assert count("cifar-large") == large == 2_466_858
    # 9*16 + 16, 9*16*32 + 32, 9*32*32 + 32, 32*2*2*32 + 32, 330.
    assert count("small-cnn", (1, 8, 8)) == 160 + 4_640 + 9_248 + 4_128 + 330 == 18_506
    assert count("small-cnn", (1, 28, 28)) == 18_506 + 32 * 32 * (49 - 4) == 64_586


def resnet_count(blocks: tuple[int, ...], classes: int, *, bottleneck: bool) -> int:
    """3x3 stem; in each block its convolutions with their norms, and a 1x1 shortcut where needed.

    The shape changes in the first block of each stage, but for the first stage of basic blocks.
    """
    total, inputs = 9 * 3 * 64 + 2 * 64, 64
    for width, count in zip((64, 128, 256, 512), blocks, strict=True):
        outputs = 4 * width if bottleneck else width
        for number in range(count):
            if bottleneck:
                total += inputs * width + 9 * width * width + width * outputs + 4 * width
            else:
                total += 9 * inputs * width + 9 * width * width + 2 * width
            total += 2 * outputs
            if number == 0 and inputs != outputs:
                total += inputs * outputs + 2 * outputs
            inputs = outputs
    return total + (inputs + 1) * classes


def test_resnet_parameter_counts_by_hand() -> None:
    # Stem 1728 + 128; a basic block of c channels has 18c^2 + 4c, the first one of a wider stage
    # 9c^2/2 + 9c^2 + c^2/2 + 6c; head 5130.
    stages = (2 * 73_984) + (230_144 + 295_424) + (919_040 + 1_180_672) + (3_673_088 + 4_720_640)
    assert count("cifar-resnet18") == 1_728 + 128 + stages + 5_130 == 11_173_962
    assert resnet_count((2, 2, 2, 2), 10, bottleneck=False) == 11_173_962
    assert count("cifar-resnet34") == resnet_count((3, 4, 6, 3), 10, bottleneck=False) == 21_282_122
    assert count("cifar-resnet50") == resnet_count((3, 4, 6, 3), 10, bottleneck=True) == 23_520_842
    deep = resnet_count((3, 4, 23, 3), 100, bottleneck=True)
    assert count("cifar-resnet101", classes=100) == deep == 42_697_380
    assert (
        count("cifar-resnet152") == resnet_count((3, 8, 36, 3), 10, bottleneck=True) == 58_156_618
    )


def test_parameter_counts_of_linear_and_verified_networks_by_hand() -> None:
    assert count("lin-1") == 3072 * 10 + 10 == 30_730
    assert count("lin-2") == 3072 * 100 + 100 + 1_010 == 308_310
    assert count("lin-3") == 308_310 + 10_100
    assert count("lin-4") == 308_310 + 2 * 10_100
    grey = (1, 28, 28)
    assert count("mnist-small", grey) == 272 + 8_224 + 156_900 + 1_010 == 166_406
    # 64*7*7*512 + 512 in the first linear layer.
    large = 320 + 16_416 + 18_496 + 65_600 + 1_606_144 + 262_656 + 5_130
    assert count("mnist-large", grey) == large == 1_974_762
    # Convolutions with biases, then 128*8*8*256 + 256 and 65,792 and 2,570.
    vgg = 1_792 + 36_928 + 73_856 + 147_584 + 2_097_408 + 65_792 + 2_570
    assert count("vgg4-without-maxpool") == vgg == 2_425_930
    # A block of c channels has 9c^2 + c, c^2 + c and 9c^2 + c; the halving ones with c from c/2
    # channels 8c^2 + c, 2c^2 + c and 9c^2 + c: 4,912, 19,552 and 78,016 both ways.
    blocks = 6 * 4_912 + 5 * 19_552 + 5 * 78_016
    assert count("cifar-resnet-verified") == 448 + blocks + 4_097_000 + 10_010 == 4_624_770


@pytest.mark.parametrize(
    ("depth", "channels"),
    [
        (2, [64, 64]),
        (4, [64, 64, 128, 128]),
        (6, [64, 64, 128, 128, 256, 256]),
        (8, [64, 64, 128, 128, 256, 256, 512, 512]),
        (11, [64, 128, 256, 256, 512, 512, 512, 512]),
        (13, [64, 64, 128, 128, 256, 256, 512, 512, 512, 512]),
        (16, [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]),
    ],
)
def test_every_vgg_has_its_channels(depth: int, channels: list[int]) -> None:
    for batch_norm, name in ((False, f"vgg{depth}"), (True, f"vgg{depth}-bn")):
        assert count(name, classes=7) == vgg_count(channels, 7, batch_norm=batch_norm)


@pytest.mark.parametrize(
    ("name", "poolings"), [("vgg2", 2), ("vgg4", 2), ("vgg6", 3), ("vgg8", 4), ("vgg16", 4)]
)
def test_vgg_pools_as_often_as_the_original(name: str, poolings: int) -> None:
    modules = outline(name).modules()
    assert sum(isinstance(m, nn.MaxPool2d) for m in modules) == poolings


def test_vgg4_bn_repeats_the_logits_of_hydra() -> None:
    """Weights of HYDRA's own checkpoint, all but the kept 5 % of each layer set to 0.

    Made from `hydra_vgg4_bn_k0.05.pth.tar` of the project's fixtures: in each layer of n weights
    the n - int(0.95 * n) with the largest |popup_scores| are kept. The logits are HYDRA's, on the
    first 8 test images of CIFAR-10.
    """
    with np.load(DATA / "hydra_vgg4_bn_masked.npz") as fixture:
        state = {
            key.removeprefix("weights:"): torch.from_numpy(fixture[key])
            for key in fixture.files
            if key.startswith("weights:")
        }
        x = torch.from_numpy(fixture["x"]).permute(0, 3, 1, 2).float() / 255
        expected = torch.from_numpy(fixture["logits"])
    network = build("vgg4-bn")
    network.load_state_dict(state, strict=True)
    network.eval()
    with torch.no_grad():
        logits = network(x)
    # The logits are small, 0.01 at most: the tolerance is 1e-5 of that.
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-7)


def test_state_dict_keys_are_those_of_published_checkpoints() -> None:
    wide, narrow = set(outline("wrn-28-4").state_dict()), set(outline("wrn-28-1").state_dict())
    small, vgg = outline("cifar-small").state_dict(), outline("vgg16-bn").state_dict()
    assert {key.split(".")[0] for key in wide} == {
        "conv1", "block1", "block2", "block3", "bn1", "fc",
    }  # fmt: skip
    first = {
        key.removeprefix("block1.layer.0.") for key in wide if key.startswith("block1.layer.0.")
    }
    assert {key for key in first if "bn" not in key} == {
        "conv1.weight", "conv2.weight", "convShortcut.weight",
    }  # fmt: skip
    assert {key.split(".")[0] for key in first} == {"bn1", "conv1", "bn2", "conv2", "convShortcut"}
    assert "block2.layer.3.conv2.weight" in wide
    assert "block2.layer.4.conv2.weight" not in wide
    # WRN-28-1 starts with as many channels as its first stack has: no shortcut there.
    assert "block1.layer.0.convShortcut.weight" not in narrow
    assert "block2.layer.0.convShortcut.weight" in narrow
    assert list(small) == [f"{n}.{part}" for n in (0, 2, 5, 7) for part in ("weight", "bias")]
    linears = [f"classifier.{n}.{part}" for n in (0, 2, 4) for part in ("weight", "bias")]
    assert [key for key in vgg if key.startswith("classifier")] == linears
    # 13 convolutions with norm and ReLU and 4 poolings are the features 0 to 42.
    assert "features.40.weight" in vgg
    assert not any(key.startswith("features.43") for key in vgg)


def test_state_dict_keys_of_resnets_are_those_of_published_checkpoints() -> None:
    basic, deep = outline("cifar-resnet18").state_dict(), outline("cifar-resnet50").state_dict()
    heads = {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "linear"}
    assert {key.split(".")[0] for key in basic} == heads
    shortcut = [key for key in basic if key.startswith("layer2.0.shortcut")]
    assert shortcut[:3] == [
        "layer2.0.shortcut.0.weight", "layer2.0.shortcut.1.weight", "layer2.0.shortcut.1.bias",
    ]  # fmt: skip
    # Basic blocks widen from the second stage on, bottlenecks in all four.
    for network, first in ((basic, 2), (deep, 1)):
        places = {key.split(".shortcut")[0] for key in network if "shortcut" in key}
        assert places == {f"layer{n}.0" for n in range(first, 5)}
    assert deep["layer3.5.conv3.weight"].shape == (1024, 256, 1, 1)
    assert deep["layer3.0.conv2.weight"].shape == (256, 256, 3, 3)
    assert "linear.bias" in deep


def test_state_dict_keys_of_linear_and_verified_networks() -> None:
    assert list(outline("lin-3").state_dict()) == [
        "1.weight", "1.bias", "2.weight", "2.bias", "3.weight", "3.bias",
    ]  # fmt: skip
    for name, numbers in (
        ("mnist-large", (0, 2, 4, 6, 9, 11, 13)),
        ("vgg4-without-maxpool", (0, 2, 4, 6, 9, 11, 13)),
    ):
        keys = list(outline(name).state_dict())
        assert keys == [f"{n}.{part}" for n in numbers for part in ("weight", "bias")]
    keys = list(outline("cifar-resnet-verified").state_dict())
    blocks = [
        f"{2 + 4 * block + half}.Ws.{number}.{part}"
        for block in range(16)
        for half, number in ((0, 0), (2, 0), (2, 2))
        for part in ("weight", "bias")
    ]
    # Flatten is 66, the ReLU between the linear layers 68.
    tail = ["67.weight", "67.bias", "69.weight", "69.bias"]
    assert keys == ["0.weight", "0.bias", *blocks, *tail]


def test_verified_resnet_adds_the_input_of_each_block() -> None:
    """Layer by layer with plain functions, from the keys alone."""
    from torch.nn import functional as F

    network = build("cifar-resnet-verified", (3, 8, 8))
    w = network.state_dict()
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        logits = network(x)
    x = F.conv2d(x, w["0.weight"], w["0.bias"], padding=1).relu()
    for block in range(16):
        first, second = f"{2 + 4 * block}.Ws", f"{4 + 4 * block}.Ws"
        stride = 2 if block in (6, 11) else 1
        inner = F.conv2d(x, w[f"{first}.0.weight"], w[f"{first}.0.bias"], stride, padding=1)
        outer = F.conv2d(inner.relu(), w[f"{second}.2.weight"], w[f"{second}.2.bias"], padding=1)
        shortcut = F.conv2d(x, w[f"{second}.0.weight"], w[f"{second}.0.bias"], stride)
        x = (outer + shortcut).relu()
    assert x.shape == (2, 64, 2, 2)
    x = F.linear(x.flatten(1), w["67.weight"], w["67.bias"]).relu()
    torch.testing.assert_close(logits, F.linear(x, w["69.weight"], w["69.bias"]))


def test_resnet_block_by_hand() -> None:
    """The shortcut is added after the second norm, and the sum goes through the last ReLU."""
    from prunekit_nets.resnet import Basic

    block = Basic(1, 1, stride=1).eval()
    with torch.no_grad():
        for convolution, size in ((block.conv1, 2.0), (block.conv2, -1.0)):
            convolution.weight.zero_()
            convolution.weight[:, :, 1, 1] = size
        y = block(torch.tensor([-2.0, 3.0]).reshape(2, 1, 1, 1))
    # -2: the branch is cut to 0, -2 + 0 is cut to 0; 3: -6 + 3 is cut to 0.
    assert y.flatten().tolist() == [0.0, 0.0]
    with torch.no_grad():
        block.conv2.weight.neg_()
        y = block(torch.tensor([-2.0, 3.0]).reshape(2, 1, 1, 1))
    torch.testing.assert_close(y.flatten(), torch.tensor([0.0, 9.0]), rtol=0, atol=1e-3)


def test_linear_networks_are_linear() -> None:
    network = build("lin-4", (1, 4, 4))
    x, y = torch.rand(2, 3, 1, 4, 4).double().unbind()
    network.double()
    torch.testing.assert_close(network(x) + network(y), 2 * network((x + y) / 2))


def test_wide_resnet_block_by_hand() -> None:
    """The shortcut starts from the activated input where channels change, else from the input."""
    from prunekit_nets.wide_resnet import Block

    def constant(block: Block) -> Block:
        with torch.no_grad():
            block.conv1.weight.zero_()
            block.conv1.weight[:, :, 1, 1] = 1.0
            block.conv2.weight.zero_()
            block.conv2.weight[:, :, 1, 1] = 1.0
            if block.convShortcut is not None:
                block.convShortcut.weight.fill_(10.0)
        return block.eval()

    x = torch.tensor([-2.0, 3.0]).reshape(2, 1, 1, 1)
    with torch.no_grad():
        same = constant(Block(1, 1, stride=1))(x)
        wider = constant(Block(1, 2, stride=2))(x)
    # -2 is cut to 0 by the first ReLU; 3 passes both convolutions.
    torch.testing.assert_close(same.flatten(), torch.tensor([-2.0, 6.0]), rtol=0, atol=1e-4)
    # Two channels of 3, summed to 6 by the second convolution, and a shortcut of 30.
    expected = torch.tensor([[0.0, 0.0], [36.0, 36.0]])
    torch.testing.assert_close(wider.flatten(1), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["small-cnn", "cifar-small", "mnist-large"])
def test_small_cnns_can_be_normalised(name: str) -> None:
    """Each convolution is followed by a norm of its channels, and nothing else changes."""
    plain, normed = build(name), build(name, batch_norm=True)
    kinds = [type(layer).__name__ for layer in normed]
    assert kinds.count("BatchNorm2d") == kinds.count("Conv2d")
    assert all(kinds[i + 1] == "BatchNorm2d" for i, kind in enumerate(kinds) if kind == "Conv2d")
    assert [k for k in kinds if k != "BatchNorm2d"] == [type(layer).__name__ for layer in plain]
    images = torch.rand(4, *CIFAR)
    normed.eval()
    # Fresh running statistics and scales change nothing but the epsilon in the denominator.
    for layer in normed:
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 0.0
    plain.load_state_dict(
        dict(zip(plain.state_dict(), (v for k, v in weights_of(normed)), strict=True))
    )
    torch.testing.assert_close(normed(images), plain(images))


def weights_of(network: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Those of convolutions and linear layers, in order."""
    return [
        (name, parameter)
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        for name, parameter in module.named_parameters()
    ]


@pytest.mark.parametrize(
    "name",
    [
        "small-cnn", "cifar-small", "cifar-large", "vgg4-bn", "wrn-28-1", "mnist-large", "lin-2",
        "vgg4-without-maxpool", "cifar-resnet18", "cifar-resnet-verified",
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 14)])
def test_networks_take_the_shape_of_the_data(name: str, shape: Shape) -> None:
    network = build(name, shape, classes=3)
    logits = network(torch.rand(2, *shape))
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "smallest"),
    [
        ("cifar-small", 4), ("cifar-large", 4), ("vgg2", 4), ("vgg4-bn", 4), ("vgg6", 8),
        ("vgg8-bn", 16), ("vgg11", 16), ("vgg13", 16), ("vgg16-bn", 16), ("wrn-28-1", 1),
        ("small-cnn", 1), ("mnist-small", 4), ("mnist-large", 4), ("cifar-resnet-verified", 4),
        ("vgg4-without-maxpool", 1), ("lin-1", 1), ("cifar-resnet18", 1), ("cifar-resnet50", 1),
    ],
)  # fmt: skip
def test_smallest_images(name: str, smallest: int) -> None:
    network = outline(name, (3, smallest, smallest)).to_empty(device="cpu").eval()
    assert network(torch.zeros(1, 3, smallest, smallest)).shape == (1, 10)
    if smallest > 1:
        with pytest.raises(UserError) as error:
            outline(name, (3, 40, smallest - 1))
        text = str(error.value)
        assert text.startswith(f"{name} needs images of at least {smallest} x {smallest} pixels")
        assert f"40 x {smallest - 1}" in text
        assert "\n" not in text


def prunable(network: nn.Module) -> list[tuple[torch.Tensor, float]]:
    """Weights of convolutions and linear layers, each with its sqrt(2 / fan_in)."""
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return [(m.weight.detach(), sqrt(2 / prod(m.weight.shape[1:]))) for m in layers]


def test_initializations_have_the_variance_of_he() -> None:
    torch.manual_seed(0)
    for weight, size in prunable(build("cifar-small", how="kaiming-normal")):
        # Standard error of a standard deviation: about 1 / sqrt(2n), 4 of them.
        assert abs(weight.std() / size - 1) < 4 / sqrt(2 * weight.numel())
        assert weight.abs().max() > 2 * size
    for weight, size in prunable(build("cifar-small", how="kaiming-uniform")):
        # Uniform within +-size * sqrt(3) has the standard deviation `size`.
        assert weight.abs().max() <= size * sqrt(3)
        assert weight.abs().max() > size * sqrt(3) * 0.98
        assert abs(weight.std() / size - 1) < 4 / sqrt(2 * weight.numel())
    for weight, size in prunable(build("cifar-small", how="signed-constant")):
        torch.testing.assert_close(weight.abs(), torch.full_like(weight, size))
        assert abs((weight > 0).float().mean() - 0.5) < 4 / sqrt(4 * weight.numel())


def test_biases_and_norms_start_neutral_and_the_seed_decides() -> None:
    torch.manual_seed(1)
    first = build("vgg4-bn").state_dict()
    torch.manual_seed(1)
    second = build("vgg4-bn").state_dict()
    torch.manual_seed(2)
    third = build("vgg4-bn").state_dict()
    for key, value in first.items():
        assert torch.equal(value, second[key])
        if key.endswith("bias"):
            assert not value.any()
    assert torch.equal(first["features.1.weight"], torch.ones(64))
    assert not torch.equal(first["features.0.weight"], third["features.0.weight"])


def test_signed_constant_keeps_the_signs_of_kaiming_normal() -> None:
    torch.manual_seed(3)
    normal = prunable(build("small-cnn", how="kaiming-normal"))
    torch.manual_seed(3)
    constant = prunable(build("small-cnn", how="signed-constant"))
    for (a, _), (b, _) in zip(normal, constant, strict=True):
        assert torch.equal(a.sign(), b.sign())


@pytest.mark.parametrize("how", ["kaiming-normal", "kaiming-uniform", "signed-constant"])
def test_keep_ratio_scales_the_start_once(how: Initialization) -> None:
    torch.manual_seed(4)
    dense = build("vgg2-bn", how=how)
    torch.manual_seed(4)
    sparse = build("vgg2-bn", how=how, keep_ratio=0.04)
    for (a, size), (b, _) in zip(prunable(dense), prunable(sparse), strict=True):
        torch.testing.assert_close(b, 5 * a)
        if how == "signed-constant":
            torch.testing.assert_close(b.abs(), torch.full_like(b, 5 * size))
    assert torch.equal(sparse.state_dict()["features.1.weight"], torch.ones(64))
