"""What kernels for sparse layers gain: `uv run python benchmarks/sparse.py [CASE...]`.

Ratios over the floor, the bare dense calls that the mathematics cannot avoid on the same network
and images: for TRADES-10 13 forward passes, 10 backward ones to the images and 2 whole ones; for
PGD-20 20 forward and backward ones; for certification forward ones. The product's side has all
else: seeds, masks, metrics, the optimizer. Arms take turns in one process; medians, and the range,
of the ratios of each round, in processor time, or with --threads in time. Weights are random, masks
by magnitude, as many in each layer. Before anything is timed, logits are compared with dense ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from masks import CLASSES, SHAPE, make_network, make_step, prune, score
from prunekit_adversarial.attacks import pgd, plan_attack
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.catalog.component import Use
from prunekit.catalog.registry import load_registry
from prunekit.contracts import Scores, Threat
from prunekit.evaluation import frozen
from prunekit.pruning.masks import apply_masks
from prunekit.pruning.selection import Selection, select_masks
from prunekit.training.compute import Compute, open_compute
from prunekit.training.masking import Weights

CASES = (
    "vgg4-bn 32 0.99 finetune",
    "vgg4-bn 32 0.95 finetune",
    "cifar-resnet18 16 0.99 finetune",
    "cifar-resnet18 16 0.95 finetune",
    "vgg16-bn 32 0.99 finetune",
    "vgg16-bn 32 0.95 finetune",
    "wrn-28-4 8 0.99 finetune",
    "wrn-28-4 8 0.95 finetune",
    "vgg4-bn 32 0.99 prune",
    "vgg4-bn 128 0.99 pgd",
    "vgg4-bn 256 0.99 certify",
)
ROUNDS = 5

Arm = Callable[[], object]


def bare_trades(network: nn.Module, x: Tensor, y: Tensor) -> None:
    """13 forward passes, 10 backward ones to the images, 2 whole ones."""
    network.eval()
    with torch.no_grad():
        network(x)
    bare_attack(network, x, y, 10)
    network.train()
    network.zero_grad()
    (F.cross_entropy(network(x), y) + F.cross_entropy(network(x), y)).backward()


def bare_attack(network: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """So many forward passes, and backward ones to the images."""
    network.eval().requires_grad_(False)
    for _ in range(steps):
        moved = x.clone().requires_grad_()
        torch.autograd.grad(F.cross_entropy(network(moved), y), moved)
    network.requires_grad_(True)


@torch.no_grad()
def bare_forward(network: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = network.eval()(x)
    return logits


@torch.no_grad()
def forward(network: nn.Module, x: Tensor) -> Tensor:
    with frozen(network):
        return network(x) * 1


def make_arms(case: str, compute: Compute) -> tuple[Arm, Arm, str]:
    """The floor, what prunekit does, and how far the two are from each other."""
    name, batch, sparsity, what = case.split()
    network = make_network(name)
    magnitudes = Scores({n: value.abs() for n, value in score(network).values.items()})
    masks = select_masks(magnitudes, Selection(float(sparsity)))
    x, y = torch.rand(int(batch), *SHAPE), torch.randint(CLASSES, (int(batch),))
    apply_masks(network, masks)
    for _ in range(3):
        network.train()(x)  # statistics under which something is left of the images
    dense = bare_forward(network, x)
    with compute.active():
        error = (forward(network, x) - dense).abs().max() / dense.abs().max()
    equal = f"logits differ by {float(error):.0e}"
    if what == "pgd":
        attack = plan_attack(Threat("linf", 8 / 255), 20)
        return partial(bare_attack, network, x, y, 20), partial(pgd, network, x, y, attack), equal
    if what == "certify":
        return partial(bare_forward, network, x), partial(forward, network, x), equal
    twin = make_network(name)
    twin.load_state_dict(network.state_dict())
    own = Weights(network, masks) if what == "finetune" else None
    masking = own or prune(network, Selection(float(sparsity)))
    network.train()
    return partial(bare_trades, twin, x, y), make_step(masking, x, y), equal


def compare(case: str, compute: Compute) -> None:
    floor, ours, equal = make_arms(case, compute)
    ratios = []
    clock = time.process_time if compute.threads == 1 else time.perf_counter
    for number in range(ROUNDS + 1):
        spent = []
        for arm in (floor, ours):
            with compute.active() if arm is ours else nullcontext():
                arm() if number == 0 else None  # kernels are compiled, indices and memory made
                start = clock()
                arm()
                spent.append(clock() - start)
        if number:
            ratios.append(spent[0] / spent[1])
    middle = statistics.median(ratios)
    print(
        f"{case:<34} {middle:5.1f}x  ({min(ratios):.1f} to {max(ratios):.1f}); {equal}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=CASES, help=f'such as "{CASES[0]}"')
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    component = load_registry().find("backend", "numba").component
    compute = open_compute("cpu", asked.threads, "auto", Use(component, component.options()))
    for case in asked.cases:
        compare(case, compute)


if __name__ == "__main__":
    main()
