"""Channels that belong together, on networks whose groups can be told by hand."""

import pytest
import timm
import torch
from prunekit_nets import prunekit_architectures
from torch import nn
from torch.nn import functional as F
from torch_pruning import (
    DependencyGraph,
    prune_conv_out_channels,
    prune_linear_out_channels,
)

from prunekit.catalog.component import Use
from prunekit.contexts import ArchitectureContext
from prunekit.contracts import Clock, Scores
from prunekit.evaluation import eval_mode
from prunekit.graph.groups import Group, average_units, find_groups, follow
from prunekit.graph.leaking import LEAK
from prunekit.pruning.layers import find_prunable
from prunekit.pruning.masks import apply_masks
from prunekit.pruning.selection import Selection, count_units, meets, select_masks
from prunekit.testing import example_context
from prunekit.training.masking import LearnedScores

CLOCK = Clock(0, 10, 0, 2)
IMAGES = (2, 3, 8, 8)
CUDA = torch.cuda.is_available()


class Net(nn.Module):
    """Layers by name, and what is done with them; `last` takes 8 x 8 images of the channels."""

    def __init__(self, forward, last, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.last = nn.Linear(last, 3)
        self.does = forward

    def forward(self, x):
        return self.last(self.does(self, x).flatten(1))


def conv(inputs, outputs, size=3, **more):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **more)


def residual(n, x):
    z = n.c0(x)
    return F.max_pool2d(F.relu(z + n.c2(F.relu(n.b2(n.c1(F.relu(n.b1(z))))))), 2)


def squeezed(n, x):
    z = F.relu(n.bn(n.a(x)))
    return n.c(z * torch.sigmoid(n.up(F.relu(n.down(z.mean((2, 3), keepdim=True))))))


def attention(n, x):
    tokens = n.a(x).flatten(2).transpose(1, 2)
    q, k, v = n.qkv(tokens).reshape(len(x), 64, 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = (
        (q @ k.transpose(-2, -1)).softmax(-1) @ v
        if n.by_hand
        else (F.scaled_dot_product_attention(q, k, v))
    )
    return n.out(mixed.transpose(1, 2).reshape(len(x), 64, 8)).transpose(1, 2)


def selected(n, x):
    weigh = n.w(x.mean((2, 3))).view(-1, 2, 4, 1, 1).softmax(1)
    return (torch.stack([n.a(x), n.b(x)], 1) * weigh).sum(1)


def nonlocally(n, x):
    y = n.a(x)
    q, k, v = (layer(y).flatten(2) for layer in (n.q, n.k, n.v))
    seen = v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)
    return y + n.o(seen.unflatten(2, (8, 8)))


def attend(by_hand):
    net = Net(attention, 64 * 5, a=conv(3, 6), qkv=nn.Linear(6, 24), out=nn.Linear(8, 5))
    net.by_hand = by_hand
    return net


NETS = {
    # (network, sizes of groups by their weights, weights that stay dense)
    "a chain": (
        lambda: Net(lambda n, x: n.b(F.relu(n.bn(n.a(x)))).relu(), 384,
                    a=conv(3, 4), bn=nn.BatchNorm2d(4), b=conv(4, 6)),
        {"a": 4, "b": 6}, "",
    ),
    "normalisation behind the activation": (
        lambda: Net(lambda n, x: n.b(n.bn(n.a(x).relu())), 384,
                    a=conv(3, 4), bn=nn.BatchNorm2d(4), b=conv(4, 6)),
        {"a": 4, "b": 6}, "",
    ),
    "a pre-activation block": (
        lambda: Net(residual, 64, c0=conv(3, 4, bias=False), b1=nn.BatchNorm2d(4),
                    c1=conv(4, 5, bias=False), b2=nn.BatchNorm2d(5), c2=conv(5, 4, bias=False)),
        {"c0 c2": 4, "c1": 5}, "",
    ),
    "a sum in place": (
        lambda: Net(lambda n, x: n.a(x).add_(n.b(x)).relu_(), 256, a=conv(3, 4), b=conv(3, 4)),
        {"a b": 4}, "",
    ),
    "a shared normalisation": (
        lambda: Net(lambda n, x: n.bn(n.b(F.relu(n.bn(n.a(x))))), 256,
                    a=conv(3, 4), b=conv(4, 4), bn=nn.BatchNorm2d(4)),
        {"a b": 4}, "",
    ),
    "a layer that is called twice": (
        lambda: Net(lambda n, x: n.b(F.relu(n.b(F.relu(n.a(x))))), 256, a=conv(3, 4), b=conv(4, 4)),
        {"a b": 4}, "",
    ),
    "a layer that takes the image and its own channels": (
        lambda: Net(lambda n, x: n.b(n.a(n.a(x))), 256, a=conv(3, 3), b=conv(3, 4)),
        {"b": 4}, "a",
    ),
    "a layer that takes two others": (
        lambda: Net(lambda n, x: n.b(n.a(x)) + n.b(n.c(x)).relu(), 256, a=conv(3, 3), c=conv(3, 3),
                    b=conv(3, 4)),
        {"a c": 3, "b": 4}, "",
    ),
    "a concatenation under one normalisation": (
        lambda: Net(lambda n, x: n.c(n.bn(torch.cat([n.a(x), n.b(x)], 1)).relu()), 128,
                    a=conv(3, 4), b=conv(3, 3), bn=nn.BatchNorm2d(7), c=conv(7, 2)),
        {"a": 4, "b": 3, "c": 2}, "",
    ),
    "a concatenation in a sum": (
        lambda: Net(lambda n, x: torch.cat([n.a(x), n.b(x)], 1) + n.c(x), 448,
                    a=conv(3, 4), b=conv(3, 3), c=conv(3, 7)),
        {"a b c": 7}, "",
    ),
    "a depthwise convolution": (
        lambda: Net(lambda n, x: n.c(n.bd(n.d(n.ba(n.a(x)).relu())).relu()), 128,
                    a=conv(3, 4), ba=nn.BatchNorm2d(4), d=conv(4, 4, groups=4),
                    bd=nn.BatchNorm2d(4), c=conv(4, 2)),
        {"a d": 4, "c": 2}, "",
    ),
    "a convolution in groups": (
        lambda: Net(lambda n, x: n.d(n.a(x).relu()).relu(), 384,
                    a=conv(3, 4), d=conv(4, 6, groups=2)),
        {"a d": 2}, "",
    ),
    "groups of inputs that stay": (
        lambda: Net(lambda n, x: n.d(x), 384, d=conv(3, 6, groups=3)), {}, "d",
    ),
    "squeeze and excitation": (
        lambda: Net(squeezed, 128, a=conv(3, 4), bn=nn.BatchNorm2d(4), down=conv(4, 3, 1),
                    up=conv(3, 4, 1), c=conv(4, 2)),
        {"a up": 4, "down": 3, "c": 2}, "",
    ),
    "a gated linear unit": (
        lambda: Net(lambda n, x: n.b(torch.mul(*n.a(x).chunk(2, 1))), 128,
                    a=conv(3, 6), b=conv(3, 2)),
        {"a": 3, "b": 2}, "",
    ),
    "pixels out of channels": (
        lambda: Net(lambda n, x: n.b(F.pixel_shuffle(n.a(x), 2)), 512,
                    a=conv(3, 8), b=conv(2, 2)),
        {"a": 2, "b": 2}, "",
    ),
    "a shortcut that pads channels": (
        lambda: Net(lambda n, x: n.b(x) + F.pad(n.a(x), (0, 0, 0, 0, 1, 1)), 320,
                    a=conv(3, 3), b=conv(3, 5)),
        {"a b": 5}, "",
    ),
    "heads, fused": (lambda: attend(False), {"a": 6, "qkv": 4, "out": 5}, ""),
    "heads, by hand": (lambda: attend(True), {"a": 6, "qkv": 4, "out": 5}, ""),
    "a sum over a stack": (
        lambda: Net(lambda n, x: torch.stack([n.a(x), n.b(x)]).sum(0), 256, a=conv(3, 4),
                    b=conv(3, 4)),
        {"a b": 4}, "",
    ),
    "branches that are weighed by a softmax": (
        lambda: Net(selected, 256, a=conv(3, 4), b=conv(3, 4), w=nn.Linear(3, 8)),
        {"a b w": 4}, "",
    ),
    "the largest of two channels": (
        lambda: Net(lambda n, x: n.a(x).unflatten(1, (4, 2)).amax(2), 256, a=conv(3, 8)),
        {"a": 4}, "",
    ),
    "a sum of all channels": (
        lambda: Net(lambda n, x: n.a(x).sum(1), 64, a=conv(3, 4)), {"a": 4}, "",
    ),
    "channels that are shuffled": (
        lambda: Net(lambda n, x: n.b(n.a(x).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)),
                    512, a=conv(3, 8), b=conv(8, 8, groups=4)),
        {"a b": 4}, "",
    ),
    "a map between all places": (
        lambda: Net(nonlocally, 256, a=conv(3, 4), q=conv(4, 3, 1), k=conv(4, 3, 1),
                    v=conv(4, 2, 1), o=conv(2, 4, 1)),
        {"a o": 4, "q k": 3, "v": 2}, "",
    ),
    "packed attention": (
        lambda: Net(lambda n, x: n.m(*[n.a(x).flatten(2).transpose(1, 2)] * 3)[0], 256,
                    a=conv(3, 4), m=nn.MultiheadAttention(4, 2, batch_first=True)),
        {"a": 4}, "m.in_proj_weight m.out_proj",  # also where torch would take its fast path
    ),
    "a recurrent layer": (
        lambda: Net(lambda n, x: n.m(n.a(x).flatten(2).transpose(1, 2))[0], 128, a=conv(3, 4),
                    m=nn.LSTM(4, 2, batch_first=True)),
        {}, "a",
    ),
    "a linear layer on tokens": (
        lambda: Net(lambda n, x: n.b(n.a(x.flatten(2).transpose(1, 2)).relu()), 128,
                    a=nn.Linear(3, 5), b=nn.Linear(5, 2)),
        {"a": 5, "b": 2}, "",
    ),
    "an affine layer of one's own": (
        lambda: Net(lambda n, x: n.b(n.own(n.a(x))), 128, a=conv(3, 4), own=Affine(4),
                    b=conv(4, 2)),
        {"a": 4, "b": 2}, "",
    ),
    # What a removed channel would leave is no zero.
    "a sigmoid": (
        lambda: Net(lambda n, x: n.b(n.a(x).sigmoid()), 128, a=conv(3, 4), b=conv(4, 2)),
        {"b": 2}, "a",
    ),
    "a sigmoid under a normalisation": (
        lambda: Net(lambda n, x: n.b(n.bn(n.a(x).sigmoid())), 128, a=conv(3, 4),
                    bn=nn.BatchNorm2d(4), b=conv(4, 2)),
        {"a": 4, "b": 2}, "",
    ),
    "a constant": (
        lambda: Net(lambda n, x: n.b(n.a(x) + 0.5), 128, a=conv(3, 4), b=conv(4, 2)),
        {"b": 2}, "a",
    ),
    "a sum with the image": (
        lambda: Net(lambda n, x: n.b(n.a(x) + x), 128, a=conv(3, 3), b=conv(3, 2)),
        {"b": 2}, "a",
    ),
    "a normalisation without scale and shift": (
        lambda: Net(lambda n, x: n.b(n.bn(n.a(x))), 128, a=conv(3, 4),
                    bn=nn.BatchNorm2d(4, affine=False), b=conv(4, 2)),
        {"b": 2}, "a",
    ),
    "a normalisation that is frozen": (
        lambda: Net(lambda n, x: n.b(n.bn(n.a(x))), 128, a=conv(3, 4),
                    bn=nn.BatchNorm2d(4).requires_grad_(False), b=conv(4, 2)),
        {"b": 2}, "a",
    ),
    # What meets all channels at once.
    "a normalisation over channels": (
        lambda: Net(lambda n, x: n.b(n.gn(n.a(x))), 128, a=conv(3, 4), gn=nn.GroupNorm(2, 4),
                    b=conv(4, 2)),
        {"b": 2}, "a",
    ),
    "a softmax over channels": (
        lambda: Net(lambda n, x: n.b(n.a(x).softmax(1)), 128, a=conv(3, 4), b=conv(4, 2)),
        {"b": 2}, "a",
    ),
    "one channel that scales others": (
        lambda: Net(lambda n, x: n.b(n.a(x) * n.s(x).sigmoid()), 128, a=conv(3, 4), s=conv(3, 1),
                    b=conv(4, 2)),
        {"a": 4, "b": 2}, "s",
    ),
    "one mean of all channels": (
        lambda: Net(lambda n, x: n.b(n.a(x).mean(1, keepdim=True)), 128, a=conv(3, 4),
                    b=conv(1, 2)),
        {"b": 2}, "a",
    ),
    # What does not become small when what it takes does.
    "a sign": (
        lambda: Net(lambda n, x: n.b(n.a(x).sign()), 128, a=conv(3, 4), b=conv(4, 2)),
        {"b": 2}, "a",
    ),
    "a normalization by statistics of the image": (
        lambda: Net(lambda n, x: n.b(n.c(F.instance_norm(n.a(x), eps=1e-12)).relu()), 128,
                    a=conv(3, 4), c=conv(4, 4), b=conv(4, 2)),
        {"c": 4, "b": 2}, "a",
    ),
    "channels of length 1": (
        lambda: Net(lambda n, x: n.b(F.normalize(n.a(x).flatten(2), dim=2).view(-1, 4, 8, 8)), 128,
                    a=conv(3, 4), b=conv(4, 2)),
        {"b": 2}, "a",
    ),
    # What happens in training alone, or with several images.
    "a sigmoid in training": (
        lambda: Net(lambda n, x: n.b(n.a(x).sigmoid() if n.training else n.a(x)), 128,
                    a=conv(3, 4), b=conv(4, 2)),
        {"b": 2}, "a",
    ),
    "a sum in batches": (
        lambda: Net(lambda n, x: n.c(n.a(x)) + n.c(n.b(x) + (n.a(x) if len(x) > 1 else 0)), 128,
                    a=conv(3, 4), b=conv(3, 4), c=conv(4, 2)),
        {"a b": 4, "c": 2}, "",
    ),
    # What is not there for a gate.
    "a layer of tokens and of vectors": (
        lambda: Net(lambda n, x: n.a(x.flatten(2).transpose(1, 2)).mean(1) + n.a(x[:, :, 0, 0]), 4,
                    a=nn.Linear(3, 4)),
        {"a": 4}, "",
    ),
    "a layer whose output has other shapes": (
        lambda: Net(lambda n, x: n.bn(n.b(x.mean((2, 3)))) + n.bn(n.a(x).flatten(2)).mean(2), 4,
                    a=conv(3, 4), b=nn.Linear(3, 4), bn=nn.BatchNorm1d(4)),
        {}, "a b",
    ),
    "half of a batch normalisation's input stays": (
        lambda: Net(lambda n, x: n.bn(n.a(x)) + n.bn(x), 192, a=conv(3, 3),
                    bn=nn.BatchNorm2d(3)),
        {}, "a",
    ),
    "dropout that stays on": (
        lambda: Net(lambda n, x: n.b(F.dropout(n.a(x), 1e-9, True)), 128, a=conv(3, 4),
                    b=conv(4, 2)),
        {"a": 4, "b": 2}, "",
    ),
    "a weight that something else uses": (
        lambda: Net(lambda n, x: n.b(n.a(x) * n.own + 0 * n.a.weight.sum()), 128, a=conv(3, 4),
                    own=nn.Parameter(torch.ones(4, 1, 1)), b=conv(4, 2)),
        {"b": 2}, "a",
    ),
    "scales in three dimensions": (
        lambda: Net(lambda n, x: n.b(n.a(x) * n.own), 128, a=conv(3, 4),
                    own=nn.Parameter(torch.ones(4, 1, 1)), b=conv(4, 2)),
        {"a": 4, "b": 2}, "",
    ),
    "a weight that is used apart": (
        lambda: Net(lambda n, x: n.b(F.conv2d(n.a(x), n.a.weight[:, :1].repeat(1, 4, 1, 1))), 72,
                    a=conv(3, 4), b=conv(4, 2)),
        {"b": 2}, "a",
    ),
    "a layer that is not called": (
        lambda: Net(lambda n, x: F.conv2d(x, n.a.weight, padding=1), 256, a=conv(3, 4)), {}, "a",
    ),
    "a normalisation that something else uses": (
        lambda: Net(lambda n, x: n.b(n.bn(n.a(x))) + n.bn.bias.sum(), 128, a=conv(3, 4),
                    bn=nn.BatchNorm2d(4), b=conv(4, 2)),
        {}, "a b",
    ),
    "written into": (
        lambda: Net(written, 256, a=conv(3, 2), b=conv(3, 4)), {}, "a b",
    ),
}  # fmt: skip


def written(n, x):
    z = n.b(x)
    z[:, :2] = n.a(x)
    return z


class Affine(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * self.scale.view(-1, 1, 1) + self.shift.view(-1, 1, 1)


def disturb(net):
    """Values as of a trained network: none is at its start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point() and (value.dim() == 1 or "gamma" in name):
                value += 0.3 + 0.3 * torch.rand_like(value)


@torch.no_grad()
def check_removal(net, groups, x):
    """Half of all units: gates and zeros are one function; readers' weights then do not matter."""
    net.eval()
    named = dict(net.named_parameters())
    start = Scores({n: torch.rand_like(named[n]) for group in groups for n in group.weights}, True)
    selection = Selection(0.5, structure="channel", groups=groups)
    whole = net(x)
    learned = LearnedScores(net, start, selection, {}, "freeze")
    with learned.effective(CLOCK), eval_mode(net):
        gated = net(x)
    learned.detach()
    net.eval()
    masks = select_masks(start, selection)
    for group in groups:
        assert count_units(masks, selection)[group.name] == group.size - group.size // 2
    masks |= follow(masks, groups)
    apply_masks(net, masks)
    final = net(x)
    size = final.abs().max()
    assert (gated - final).abs().max() <= 100 * LEAK * size
    assert (whole - final).abs().max() > 1e-3 * size
    for group in groups:
        kept = torch.zeros(group.size, dtype=torch.bool)
        for name, units in group.weights.items():
            kept[units[masks[name].flatten(1).any(1)]] = True
        for name, units in group.readers.items():
            gone = (units >= 0) & ~kept[units]
            named[name][:, gone] = torch.randn_like(named[name][:, gone])
    assert torch.equal(net(x), final)


@pytest.mark.parametrize("kind", NETS)
def test_channels_that_meet_are_one_group(kind):
    make, expected, dense = NETS[kind]
    torch.manual_seed(0)
    net = make()
    disturb(net)
    weights = find_prunable(net, ["last.*"])
    groups, reasons = find_groups(net, torch.rand(1, *IMAGES[1:]), weights)
    found = {" ".join(n.removesuffix(".weight") for n in g.weights): g.size for g in groups}
    assert found == expected
    assert [name.removesuffix(".weight") for name in reasons] == dense.split()
    if groups:
        check_removal(net, groups, torch.rand(IMAGES))


def test_dropout_changes_no_group_and_a_network_that_cannot_train_has_groups():
    class Judged(nn.Module):
        def forward(self, x):
            assert not self.training
            return x

    found = []
    for rate, last in ((0.0, nn.Identity()), (0.1, nn.Identity()), (0.0, Judged())):
        net = timm.create_model(
            "vit_tiny_patch16_224", num_classes=3, img_size=16, patch_size=8, depth=1,
            drop_rate=rate, attn_drop_rate=rate, drop_path_rate=rate, proj_drop_rate=rate,
        )  # fmt: skip
        net.head_drop = nn.Sequential(net.head_drop, last)
        groups, dense = find_groups(net, torch.zeros(1, 3, 16, 16), find_prunable(net))
        found.append(([group.size for group in groups], dense))
    assert found[0] == found[1] == found[2]
    assert found[0][0] == [3, 768]


def test_what_would_enlarge_a_leak_is_named():
    """Two branches, of which one goes through a sign: it alone stays, and the operator is told."""
    net = Net(lambda n, x: n.b(n.a(x).sign()) + n.c(n.d(x)), 128, a=conv(3, 4), b=conv(4, 2),
              c=conv(4, 2), d=conv(3, 4))  # fmt: skip
    groups, dense = find_groups(net, torch.zeros(1, *IMAGES[1:]), find_prunable(net, ["last.*"]))
    assert [[*group.weights] for group in groups] == [["b.weight", "c.weight"], ["d.weight"]]
    assert dense == {"a.weight": "sign would enlarge what gates let through"}


def test_what_opens_where_a_gate_closes_is_no_leak():
    """Behind the ReLU: 1 - 10 is nothing, and 1 - 10 * LEAK is not far from 1."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 1, 1, bias=False), nn.ReLU())
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(1)
        net[1].weight.copy_(torch.tensor([1.0, -10.0]).view(1, 2, 1, 1))
    groups, dense = find_groups(net, torch.zeros(1, 3, 2, 2), ["0.weight"])
    assert [group.size for group in groups] == [2]
    assert not dense


def test_a_group_says_where_its_channels_are():
    """Concatenated: 4 channels of a, 3 of b, of which the normalisation is shared."""
    net = NETS["a concatenation under one normalisation"][0]()
    groups, dense = find_groups(net, torch.zeros(1, *IMAGES[1:]), find_prunable(net))
    assert dense == {"last.weight": "the output of the network"}
    _, b, _ = groups
    assert {name: units.tolist() for name, units in b.weights.items()} == {"b.weight": [0, 1, 2]}
    of_both = [-1, -1, -1, -1, 0, 1, 2]
    assert {name: units.tolist() for name, units in b.vectors.items()} == {
        "b.bias": [0, 1, 2], "bn.weight": of_both, "bn.bias": of_both,
    }  # fmt: skip
    assert {name: (dim, units.tolist()) for name, (dim, units) in b.gates.items()} == {
        "bn": (1, of_both)
    }
    assert {name: units.tolist() for name, units in b.readers.items()} == {"c.weight": of_both}


def test_tracing_leaves_the_network_and_the_generators_alone():
    net = NETS["a pre-activation block"][0]().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    find_groups(net, torch.rand(1, *IMAGES[1:], generator=torch.Generator()), find_prunable(net))
    assert torch.equal(torch.rand(()), expected)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


TWO = Group(
    3,
    {"a": torch.tensor([0, 1, 2]), "b": torch.tensor([0, 0, 1, 1, 2, 2])},
    {"v": torch.tensor([-1, 0, 1, 2])}, {}, {},
)  # fmt: skip


def test_a_unit_counts_as_the_mean_of_its_channels():
    """b has two channels for each unit: (1 + 2 + 3) / 3, (5 + 0 + 1) / 3, (3 + 9 + 9) / 3."""
    a, b = torch.tensor([1.0, 5.0, 3.0]), torch.tensor([2.0, 3.0, 0.0, 1.0, 9.0, 9.0])
    assert average_units(TWO, {"a": a, "b": b}).tolist() == [2, 2, 7]


def test_layers_of_a_group_keep_the_same_channels():
    """Scores that compare within a layer only are divided by its root mean square first."""
    values = {"a": torch.tensor([[3.0], [2.0], [1.0]]), "b": torch.zeros(6, 1)}
    values["b"][4:] = 1e-3
    selection = Selection(0.34, structure="channel", groups=[TWO])
    raw = select_masks(Scores(values), selection)
    assert raw["a"].flatten().tolist() == [True, True, False]
    assert raw["b"].flatten().tolist() == [True, True, True, True, False, False]
    assert follow(raw, [TWO])["v"].tolist() == [True, True, True, False]
    scaled = select_masks(Scores(values, layerwise=True), selection)
    # a: 3, 2 and 1 over 2.16; b: 0, 0 and 1 over 0.58, twice.
    assert scaled["a"].flatten().tolist() == [True, False, True]


def test_counts_of_a_group_are_those_of_its_first_layer():
    values = {"a": torch.rand(3, 2), "b": torch.rand(6, 2), "c": torch.rand(4, 2)}
    alone = Group(4, {"c": torch.arange(4)}, {}, {}, {})
    selection = Selection(0.5, structure="channel", groups=[TWO, alone])
    scores = Scores(values, keep={"a": 2, "b": 0, "c": 2})
    assert meets(scores, selection)  # 7 units, of which 3 go
    masks = select_masks(scores, selection)
    assert count_units(masks, selection) == {"a": 2, "c": 2}
    assert int(masks["b"].sum()) == 8
    assert not meets(Scores(values, keep={"a": 2, "b": 0, "c": 3}), selection)


def test_what_an_earlier_stage_removed_of_a_group_stays_so():
    values = {"a": torch.ones(3, 1), "b": torch.ones(6, 1)}
    values["a"][0] = 9
    alive = {"a": torch.tensor([[False], [True], [True]])}
    alive["b"] = torch.tensor([[False], [False], [True], [True], [True], [True]])
    masks = select_masks(Scores(values), Selection(0.4, structure="channel", groups=[TWO]), alive)
    assert masks["a"].flatten().tolist() == [False, True, True]
    assert masks["b"].flatten().tolist() == [False, False, True, True, True, True]


@pytest.mark.parametrize(
    "kind", ["a pre-activation block", "squeeze and excitation", "a depthwise convolution"]
)
def test_scores_of_a_group_learn_together(kind):
    """Removed channels get gradients, in every layer of the group."""
    torch.manual_seed(0)
    net = NETS[kind][0]()
    groups, _ = find_groups(net, torch.zeros(1, *IMAGES[1:]), find_prunable(net))
    named = dict(net.named_parameters())
    start = Scores({n: torch.randn_like(named[n]) for g in groups for n in g.weights}, True)
    selection = Selection(0.5, structure="channel", groups=groups)
    learned = LearnedScores(net, start, selection, {}, "train")
    before = dict(net.named_parameters())
    assert sum(name.endswith("score") for name in before) == len(start.values)
    with learned.effective(CLOCK):
        net(torch.rand(IMAGES)).square().sum().backward()
    for group in (group for group in groups if len(group.gates) > 1):
        gradients = {n: learned.parts[n].score.grad for n in group.weights}
        sizes = {n: average(group, n, g) for n, g in gradients.items()}
        assert all((size > 0).all() for size in sizes.values()), group.name
    learned.detach()
    assert net.state_dict().keys() == NETS[kind][0]().state_dict().keys()


def average(group, name, gradient):
    """Size of the gradient in each unit that a weight has."""
    units = group.weights[name]
    return torch.stack([gradient[units == u].abs().sum() for u in units.unique()])


NAMES = ("small-cnn", "cifar-resnet-verified", "vgg4-bn", "cifar-resnet18", "wrn-28-1")


@pytest.mark.parametrize("name", NAMES)
def test_all_but_the_classifier_can_lose_channels(name):
    net = build_net(name)
    disturb(net)
    weights = find_prunable(net)
    groups, dense = find_groups(net, torch.zeros(1, 3, 16, 16), weights)
    assert list(dense) == [list(weights)[-1]]
    check_removal(net, groups, torch.rand(2, 3, 16, 16))


def build_net(name):
    component = next(c for c in prunekit_architectures() if c.name == name)
    context = example_context(ArchitectureContext, shape=(3, 16, 16), classes=4)
    torch.manual_seed(0)
    return Use(component, component.options(), "nets").build(context)


def test_the_stages_of_a_wide_resnet():
    """Pre-activation: 16 channels of the stem meet those of the first stack; 3 stacks of 4."""
    groups, _ = find_groups(
        build_net("wrn-28-1"), torch.zeros(1, 3, 16, 16), find_prunable(build_net("wrn-28-1"))
    )
    streams = [group for group in groups if len(group.weights) > 1]
    assert [(group.size, len(group.weights)) for group in streams] == [(16, 5), (32, 5), (64, 5)]
    assert all(name.endswith("bn1") for name in streams[0].gates), "gates behind the first norms"
    assert len(groups) == 3 + 12


FAMILIES = {
    # What stays dense: the classifier, and what a normalization over channels, or tokens, takes.
    "resnet18": 1,
    "mobilenetv3_small_050": 1,
    "efficientnet_b0": 1,
    "convnext_atto": 29,
    "vit_tiny_patch16_224": 26,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_of_timms_families(name):
    more = {"img_size": 32, "patch_size": 8, "depth": 12} if name.startswith("vit") else {}
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5, **more)
    disturb(net)
    weights = find_prunable(net)
    groups, dense = find_groups(net, torch.zeros(1, 3, 32, 32), weights)
    assert len(dense) == FAMILIES[name]
    check_removal(net, groups, torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize("name", ["cifar-resnet18", "wrn-28-1", "mobilenetv3_small_050"])
def test_groups_are_those_of_torch_pruning(name):
    """Where its dependency graph is right: layers that its group prunes along their outputs."""
    net = timm.create_model(name, num_classes=5) if "_" in name else build_net(name)
    x = torch.rand(1, 3, 32, 32)
    weights = find_prunable(net)
    groups, _ = find_groups(net, x, weights)
    graph = DependencyGraph().build_dependency(net.eval(), example_inputs=x)
    modules = dict(net.named_modules())
    names = {module: f"{name}.weight" for name, module in modules.items()}
    for group in groups:
        module = modules[group.name.removesuffix(".weight")]
        # A depthwise convolution has its channels from what it takes, and is never the first.
        linear = isinstance(module, nn.Linear)
        prune = prune_linear_out_channels if linear else prune_conv_out_channels
        theirs = {
            names[dependency.target.module]
            for dependency, _ in graph.get_pruning_group(module, prune, [0])
            if graph.is_out_channel_pruning_fn(dependency.handler)
            and isinstance(dependency.target.module, nn.Conv2d | nn.Linear)
        }
        assert theirs == set(group.weights)


def test_a_depthwise_convolution_that_is_excluded_stays_and_lets_channels_pass():
    net = NETS["a depthwise convolution"][0]()
    disturb(net)
    groups, dense = find_groups(net, torch.rand(1, *IMAGES[1:]), ["a.weight", "c.weight"])
    assert [[*group.weights] for group in groups] == [["a.weight"], ["c.weight"]]
    assert [*groups[0].gates] == ["bd"]
    assert not dense
    check_removal(net, groups, torch.rand(IMAGES))


def test_a_later_layer_alone_says_which_units_stay():
    """Its channels are in another order: channel 0 is of unit 2."""
    order = torch.tensor([2, 0, 1])
    units = torch.arange(3)
    group = Group(3, {"a": units, "b": order}, {"v": units}, {}, {})
    masks = {"b": torch.tensor([[True], [False], [True]])}
    assert follow(masks, [group])["v"].tolist() == [False, True, True]
    assert average_units(group, {"b": torch.tensor([1.0, 2.0, 3.0])}).tolist() == [2, 3, 1]


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="no GPU"))]
)
def test_units_with_unlike_numbers_of_channels(device):
    """b has three channels for unit 0 and one for unit 1: (3 + 1 + 2 + 6) / 4, (5 + 7) / 2."""
    group = Group(2, {"a": torch.arange(2), "b": torch.tensor([0, 0, 1, 0])}, {}, {}, {})
    a = torch.tensor([3.0, 5.0], device=device, requires_grad=True)
    b = torch.tensor([1.0, 2.0, 7.0, 6.0], device=device, requires_grad=True)
    found = average_units(group, {"a": a, "b": b})
    assert found.device == a.device
    assert found.tolist() == [3, 6]
    found.backward(torch.tensor([4.0, 2.0], device=device))
    assert (a.grad.tolist(), b.grad.tolist()) == ([1, 1], [1, 1, 1, 1])
    many = torch.randint(7, (4000,), generator=torch.Generator().manual_seed(0))
    values = torch.rand(4000, generator=torch.Generator().manual_seed(0)).to(device)
    group = Group(7, {"a": many}, {}, {}, {})
    first = average_units(group, {"a": values})
    assert all(torch.equal(average_units(group, {"a": values}), first) for _ in range(20))
