"""What reaches a product: the weight with its zeros, or another kernel that is made of it."""

import copy
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunekit.errors import RunError, UserError
from prunekit.graph import groups, watching
from prunekit.graph.groups import find_groups
from prunekit.graph.watching import CHANGED, UNUSED, watch_weights
from prunekit.pruning.layers import find_faults, find_prunable, find_unprunable, watch_network
from prunekit.pruning.masks import apply_masks, count_weights, measure_sparsity

ONES = torch.ones(6, 1)
CENTRE = torch.eye(6) - 1 / 6
BLUR = torch.ones(1, 1, 3, 3) / 9


def standardise(w):
    std, mean = torch.std_mean(w, dim=1, keepdim=True)
    return (w - mean) / (std + 1e-5)


INTACT = {
    "plain": lambda w, x: F.linear(x, w),
    "product": lambda w, x: x @ w.T,
    "einsum": lambda w, x: torch.einsum("ni,oi->no", x, w),
    "batched": lambda w, x: torch.bmm(x[None], w.t()[None])[0],
    "convolved": lambda w, x: F.conv2d(x[..., None, None], w[..., None, None]).flatten(1),
    "in parts": lambda w, x: torch.cat([F.linear(x, part) for part in w.split(2)], 1),
    "joined": lambda w, x: F.linear(x, torch.cat([w[3:], w[:3]])),
    "padded": lambda w, x: F.linear(F.pad(x, (0, 1)), F.pad(w, (0, 1))),
    "copied": lambda w, x: F.linear(x, torch.ones(5, 6).copy_(w.data)),
    "cast": lambda w, x: F.linear(x.bfloat16(), w.bfloat16()).float(),
    "scaled": lambda w, x: F.linear(x, w / w.norm()),
    "scaled by rows": lambda w, x: F.linear(x, F.normalize(w)),
    "spectral norm": lambda w, x: F.linear(x, w / torch.linalg.matrix_norm(w, 2)),
    "scaled output": lambda w, x: F.linear(x, w) / w.norm(),
    "magnitudes": lambda w, x: F.linear(x, w.abs()),
    "signs": lambda w, x: F.linear(x, (w.sign() - w).detach() + w),
    "quantised": lambda w, x: F.linear(x, torch.fake_quantize_per_tensor_affine(w, 0.1, 3, 0, 9)),
    "masked": lambda w, x: F.linear(x, w * torch.ones(5, 6).tril()),
    "power iteration": lambda w, x: F.linear(x, w / torch.dot(ONES[1:, 0], w.mv(ONES[:, 0]))),
    "images in between": lambda w, x: F.linear(x @ CENTRE, w),
}  # fmt: skip
CHANGING = {
    "mean": lambda w, x: F.linear(x, w - w.mean()),
    "detached mean": lambda w, x: F.linear(x, w - w.data.mean()),
    "mean by a product": lambda w, x: F.linear(x, w - (w @ ONES) / 6),
    "standardised": lambda w, x: F.linear(x, standardise(w)),
    "from the least": lambda w, x: F.linear(x, w - w.amin()),
    "softmax": lambda w, x: F.linear(x, w.softmax(1)),
    "softplus": lambda w, x: F.linear(x, F.softplus(w)),
    "two signs": lambda w, x: F.linear(x, torch.where(w >= 0, 1.0, -1.0)),
    "clamped": lambda w, x: F.linear(x, w.clamp(0.1)),
    "noise": lambda w, x: F.linear(x, w + 0.01 * torch.randn_like(w)),
    "in place": lambda w, x: F.linear(x, w.clone().add_(1)),
    "sums": lambda w, x: F.linear(x, w.cumsum(1)),
    "of itself": lambda w, x: F.linear(x, w.t() @ w),
    "summed up": lambda w, x: F.linear(x, w.sum(0, keepdim=True)),
    "elsewhere": lambda w, x: F.linear(x, w.flip(0) + w),
    "plain and changed": lambda w, x: F.linear(x, w) + F.linear(x, w - w.mean()),
    "added to the image": lambda w, x: x[:, None] + w,
    "centred by a product": lambda w, x: F.linear(x, w @ CENTRE),
    "by einsum": lambda w, x: F.linear(x, torch.einsum("oi,ij->oj", w, CENTRE)),
    "by bmm": lambda w, x: F.linear(x, torch.bmm(w[None], CENTRE[None])[0]),
    "by addmm": lambda w, x: F.linear(x, torch.addmm(w, w, CENTRE)),
    "by tensordot": lambda w, x: F.linear(x, torch.tensordot(CENTRE[:5, :5], w, 1)),
    "by linear": lambda w, x: F.linear(x, F.linear(CENTRE, w).t()),
    "product with noise": lambda w, x: F.linear(x, w @ torch.linalg.qr(torch.rand(6, 6))[0]),
    "product with ones": lambda w, x: F.linear(x, w @ x.new_ones(6, 6)),
    "blurred": lambda w, x: F.linear(x, F.conv2d(w[None, None], BLUR, padding=1)[0, 0]),
    "blurred in groups": lambda w, x: F.linear(
        x, F.conv1d(w[None], BLUR[0, 0, :1].expand(5, 1, 3), padding=1, groups=5)[0]
    ),
    "as a kernel of constants": lambda w, x: F.linear(
        x, F.conv2d(CENTRE[None, None], w[None, None], padding=(2, 3))[0, 0, :, :6]
    ),
    "on constants": lambda w, x: x[:, :5] + F.linear(ONES.T, w),
}
NOWHERE = {
    "ignored": lambda w, x: x,
    "another's": lambda w, x: F.linear(x, torch.from_numpy(w.detach().numpy().copy())),
}


def make_layer(use):
    class Layer(nn.Linear):
        def forward(self, x):
            return use(self.weight, x)

    return Layer(6, 5)


class Functional(nn.Module):
    """Uses a plain layer's weight itself."""

    def __init__(self, use):
        super().__init__()
        self.layer, self.use = nn.Linear(6, 5), use

    def forward(self, x):
        return self.use(self.layer.weight, x)


@pytest.mark.parametrize(
    ("use", "fault"),
    [
        *(pytest.param(use, "", id=name) for name, use in INTACT.items()),
        *(pytest.param(use, CHANGED, id=name) for name, use in CHANGING.items()),
        *(pytest.param(use, UNUSED, id=name) for name, use in NOWHERE.items()),
    ],
)
def test_what_becomes_of_a_weight(use, fault):
    torch.manual_seed(0)
    layer, net = make_layer(use), Functional(use)
    before = {n: v.clone() for n, v in (*layer.state_dict().items(), *net.state_dict().items())}
    drawn = torch.get_rng_state()
    assert find_faults(layer) == {"weight": fault}  # a class of its own is tried alone
    assert find_faults(net) == {"layer.weight": ""}
    watch_network(net, (6,))
    assert find_faults(net) == {"layer.weight": fault}
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, value in (*layer.state_dict().items(), *net.state_dict().items()):
        assert torch.equal(value, before[name])


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = standardise(self.weight.flatten(1)).view_as(self.weight)
        return F.conv2d(x, w, self.bias, padding=1)


class WithinConvolution(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Blurred(nn.Conv2d):
    def forward(self, x):
        w = F.conv2d(self.weight, BLUR, padding=1)
        return F.conv2d(x, w, self.bias, padding=1)


@pytest.mark.parametrize("kind", [Standardised, WithinConvolution, Blurred])
def test_a_changed_kernel_is_left_out_and_named(kind):
    net = nn.Sequential(kind(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 2))
    for _ in range(2):  # alone, and in the network
        assert list(find_prunable(net)) == ["2.weight"]
        assert list(find_prunable(net, ["0.*"])) == ["2.weight"]
        masks = {"2.weight": torch.arange(64).view(2, 32) < 16}
        # 48 of 64 are removed, and the 18 that stay dense count.
        assert measure_sparsity(count_weights(net, masks)) == pytest.approx(48 / 82)
        with pytest.raises(UserError, match=r"0\.weight cannot have a mask: it is changed before"):
            apply_masks(net, {"0.weight": torch.zeros(2, 1, 3, 3, dtype=torch.bool)})
        with pytest.raises(RunError, match=r"left dense: 0\.weight \(changed before"):
            find_prunable(net[:1])
        watch_network(net, (1, 4, 4))


def test_a_tied_weight_has_to_suit_both_layers():
    net = nn.Sequential(nn.Linear(6, 6), make_layer(CHANGING["mean"]))
    net[1].weight = net[0].weight
    assert find_faults(net) == {"0.weight": CHANGED}
    watch_network(net, (6,))
    assert find_faults(net) == {"0.weight": CHANGED}


def test_a_network_that_cannot_be_watched_is_left_dense():
    def fail(weight, x):
        assert weight.any(1).all()
        assert weight.abs().min() > 0
        return F.linear(x, weight)

    layer = make_layer(fail)
    assert find_faults(layer)["weight"].startswith("cannot be watched: AssertionError")
    assert layer.weight.abs().min() > 0


def test_buffers_that_a_forward_changes_are_as_before():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 5)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += 1
            return self.layer(x) * torch.rand(())

    net = Counting().train()
    watch_network(net, (6,))
    assert net.seen == 0
    assert net.training


class Restless(nn.Module):
    """Changes in its forward pass whatever a network can change."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(6, 5), nn.Linear(5, 2)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        self.calls = self.calls + 1
        noise = np.random.rand() + random.random()
        return self.last(self.layer(x) * (torch.rand(()) + noise))


@pytest.mark.parametrize(
    "look",
    [
        lambda net: watch_network(net, (6,)),
        lambda net: find_groups(net, torch.zeros(1, 6), ["layer.weight", "last.weight"]),
    ],
    ids=["watched", "traced"],
)
def test_looking_at_a_network_leaves_no_trace(look):
    net = Restless().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    own = dict(net.named_buffers())
    draws = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    look(net)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(own[name] is value for name, value in net.named_buffers())
    assert net.training
    assert draws == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )


NO_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["python", "cuda", "cpu", "cublas"])
def test_memory_that_runs_out_is_no_property_of_the_network(error, monkeypatch):
    """Otherwise what is pruned would depend on how much memory is free."""

    def fail(*args, **kwargs):
        raise error

    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    for module, name in ((watching, "_follow"), (net[1], "forward")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(type(error)):
                watch_weights(
                    net,
                    {"0.weight": net[0].weight},
                    lambda: net[1](F.linear(torch.ones(1, 6), net[0].weight.abs())),
                    [],
                )
    for rule in (fail, None):
        monkeypatch.setattr(groups, "find_rule", lambda call, rule=rule: rule)
        with pytest.raises(type(error)) if rule else nullcontext():
            find_groups(net, torch.zeros(1, 6), ["0.weight"])


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("graph", torch.eye(5).to_sparse())

    def forward(self, x):
        return x @ self.graph.to_dense()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
@pytest.mark.parametrize("make", [lambda: torch.jit.script(nn.BatchNorm1d(5)), Sparse])
def test_parts_that_are_no_plain_modules_are_no_obstacle(make):
    net = nn.Sequential(nn.Linear(6, 5), make(), nn.Linear(5, 2))
    before = net[0].weight.clone()
    watch_network(net, (6,))
    assert find_faults(net) == {"0.weight": "", "2.weight": ""}
    assert torch.equal(net[0].weight, before)


def test_a_layer_alone_is_tried_once():
    calls = []

    def use(weight, x):
        calls.append(weight.clone())
        return F.linear(x, weight - weight.mean())

    layer = make_layer(use)
    for _ in range(3):
        assert find_faults(layer) == {"weight": CHANGED}
        assert find_unprunable(layer) == {"weight": "Layer"}
    assert len(calls) == 2  # half of its entries, and the other half
    assert find_faults(copy.deepcopy(layer)) == {"weight": CHANGED}
    assert len(calls) == 2
