"""What masks cost a training step: `uv run python benchmarks/masks.py [NETWORK BATCH]...`.

TRADES-10 on one thread, 99 % removed. First, steps of a prune stage (budgets `layer` and `global`)
and of a finetune stage over the dense network's: medians of interleaved steps. Then the work on
masks alone (scores to masks to masked weights, and the gradient back), as a part of the dense step:
that hardly depends on what else the machine does. Ratios and parts, in process time.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from prunekit_adversarial.attacks import plan_attack
from prunekit_adversarial.objectives import Trades
from torch import Tensor, nn

from prunekit.catalog.registry import load_registry
from prunekit.contexts import ArchitectureContext
from prunekit.contracts import Clock, OptimizerChoice, Scores, Threat
from prunekit.pruning.layers import find_prunable
from prunekit.pruning.learning import effective_parameters
from prunekit.pruning.selection import Selection, select_masks
from prunekit.steps import Masking
from prunekit.testing import example_context, resolve
from prunekit.training.masking import LearnedScores, Weights
from prunekit.training.step import Stepper

SHAPE, CLASSES, CLOCK = (3, 32, 32), 10, Clock(0, 100, 0, 1)
LAYER = Selection(0.99)
GLOBAL = Selection(0.99, lambda layers: layers.scores, compares=True)
DEFAULT = ("cifar-large", "16", "cifar-large", "64", "cifar-resnet18", "16")
ROUNDS = 5


def make_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    component = load_registry().find("architecture", name).component
    context = example_context(ArchitectureContext, shape=SHAPE, classes=CLASSES)
    network: nn.Module = resolve(component, {}, Path.cwd()).build(context)
    return network


def score(network: nn.Module) -> Scores:
    return Scores({name: w.detach().clone() for name, w in find_prunable(network).items()})


def prune(network: nn.Module, selection: Selection) -> LearnedScores:
    return LearnedScores(network, score(network), selection, {})


def finetune(network: nn.Module) -> Weights:
    magnitudes = {name: value.abs() for name, value in score(network).values.items()}
    return Weights(network, select_masks(Scores(magnitudes), LAYER))


def sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, momentum=0.9, weight_decay=5e-4)


def make_step(masking: Masking, x: Tensor, y: Tensor) -> Callable[[], object]:
    attack = plan_attack(Threat("linf", 8 / 255), 10)
    objective = Trades(masking.model, attack, attack, beta=6.0)
    choice = OptimizerChoice(sgd, 0.01, lambda clock: 1.0)
    stepper = Stepper(masking, objective, choice, (0, 0))
    return lambda: stepper.take(x, y, CLOCK, [])


def work_on_masks(masking: LearnedScores) -> None:
    """What a prune step does and a dense one does not; the gradients are there in both."""
    with masking.effective(CLOCK):
        known = effective_parameters(masking.model)
        masked = [known[name] for name in masking.parts]
        torch.autograd.backward(masked, masked)
    for part in masking.parts.values():
        part.score.grad = None


def measure(arms: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each; they take turns."""
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(ROUNDS + 1):
        for name, arm in arms.items():
            start = time.process_time()
            arm()
            if number:  # the first is warm-up
                spent[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in spent.items()}


def compare(name: str, batch: int) -> None:
    x, y = torch.rand(batch, *SHAPE), torch.randint(CLASSES, (batch,))
    stages: dict[str, Masking] = {
        "dense": Weights(make_network(name), {}),
        "finetune": finetune(make_network(name)),
        "prune, layer": prune(make_network(name), LAYER),
        "prune, global": prune(make_network(name), GLOBAL),
    }
    arms = {stage: make_step(masking, x, y) for stage, masking in stages.items()}
    for stage, masking in stages.items():
        if isinstance(masking, LearnedScores):
            arms[f"masks of {stage}"] = lambda masking=masking: work_on_masks(masking)
    found = measure(arms)
    print(f"{name}, batch {batch}: dense step {1000 * found['dense']:.0f} ms")
    for arm, seconds in found.items():
        print(f"  {arm:<22} {seconds / found['dense']:.3f}")


def main() -> None:
    torch.set_num_threads(1)
    asked = sys.argv[1:] or DEFAULT
    for name, batch in zip(asked[::2], asked[1::2], strict=True):
        compare(name, int(batch))


if __name__ == "__main__":
    main()
