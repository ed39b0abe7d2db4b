"""What identifies a network that Python hands over: no two that differ are taken for one."""

import functools
import threading

import pytest
import torch
from prunekit_python.identity import identify
from torch import nn
from torch.nn import functional as F


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def hook(self, module, inputs, output):
        return output * self.factor


class Secret:
    """Leaves what it holds out of its pickle."""

    def __init__(self, held):
        self.held = held

    def __getstate__(self):
        return {}


@functools.lru_cache
def cached(x):
    return x


def make(**attributes):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    for name, value in attributes.items():
        setattr(net[1], name, value)
    return net


def hooked(factor):
    net = make()
    net[1].register_forward_hook(Scale(factor).hook)
    return net


LAMBDAS = [lambda x: x, lambda x: -x]


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (hooked(1), hooked(1), hooked(-5)),
        (make(act=LAMBDAS[0]), make(act=LAMBDAS[0]), make(act=LAMBDAS[1])),
        (make(look={0: 1}.get), make(look={0: 1}.get), make(look={0: 2}.get)),
        (make(add=torch.ones(2).add), make(add=torch.ones(2).add), make(add=torch.zeros(2).add)),
        (make(act=F.gelu), make(act=F.gelu), make(act=F.softplus)),
        (make(my_hooks=[1]), make(my_hooks=[1]), make(my_hooks=[2])),
    ],
    ids=["bound method", "lambdas on a line", "bound builtin", "tensor method", "gelu", "hooks"],
)
def test_networks_that_differ_have_different_hashes(one, same, other):
    assert "unique" not in identify(one)
    assert identify(one) == identify(same)
    assert identify(one) != identify(other)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Secret(1), "a Secret hides its state from pickle"),
        (threading.Lock(), "cannot pickle '_thread.lock' object"),
    ],
)
def test_what_cannot_be_read_is_never_shared(value, reason):
    first, second = identify(make(held=value)), identify(make(held=value))
    assert first["unique"] == reason
    assert first["content"] != second["content"]


def test_a_function_that_pickle_writes_by_name_is_known_by_its_source():
    found = identify(make(act=cached))
    assert "unique" not in found
    assert found == identify(make(act=cached))
    assert found != identify(make(act=functools.lru_cache(make)))


def test_a_class_that_its_own_closure_names_ends():
    def make_class():
        class Again(nn.Module):
            def forward(self, x):
                return Again

        return Again

    assert "unique" not in identify(make_class()())
