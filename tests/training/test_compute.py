"""Where a run computes: what decides its key, and the threads that torch uses meanwhile."""

import pytest
import torch
from torch import nn

from prunekit.errors import UserError
from prunekit.training.compute import Compute, find_device, open_compute


def test_the_key_is_of_what_decides_the_bits():
    one, two = (Compute(torch.device("cpu"), threads) for threads in (1, 7))
    assert one.key() == two.key() == {"device": "cpu", "precision": "fp32", "ranks": 1}
    assert one.describe() != two.describe()
    assert Compute(torch.device("cuda:1"), 1).key()["device"] == "cuda"


def test_threads_hold_inside_and_are_back_outside():
    before = torch.get_num_threads()
    compute = open_compute("cpu", before + 1)
    with compute.active():
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    assert open_compute("cpu").threads == before


def test_a_network_is_placed():
    network = nn.Linear(1, 1)
    assert open_compute("cpu").place(network) is network


def test_a_device_that_is_not_there_is_told():
    with pytest.raises(UserError, match=r"no device 'tpu' here.*write auto, cpu, cuda"):
        find_device("tpu")
