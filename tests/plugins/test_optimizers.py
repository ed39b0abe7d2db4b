"""Schedules and warm-up by hand, and the optimisers' settings."""

import subprocess
import sys
from math import cos, pi, sqrt

import pytest
import torch
from prunekit_optimizers import StepOptions, prunekit_optimizers, prunekit_schedules

from prunekit.catalog.component import Use
from prunekit.contexts import Context
from prunekit.contracts import Clock
from prunekit.errors import OptionError
from prunekit.testing import example_context

FOUND = {("optimizer", c.name): c for c in prunekit_optimizers()}
FOUND |= {("schedule", c.name): c for c in prunekit_schedules()}


def build(kind, name, **options):
    component = FOUND[kind, name]
    return Use(component, component.options(**options)).build(example_context(Context))


def factors(schedule, epochs, per_epoch):
    steps = epochs * per_epoch
    return [schedule(Clock(s, steps, s // per_epoch, epochs)) for s in range(steps)]


def test_constant():
    assert factors(build("schedule", "constant"), 2, 2) == [1, 1, 1, 1]


def test_cosine_by_hand():
    expected = [1, (1 + sqrt(0.5)) / 2, 0.5, (1 - sqrt(0.5)) / 2]
    assert factors(build("schedule", "cosine"), 2, 2) == pytest.approx(expected)
    expected = [0.2 + 0.8 * f for f in expected]
    assert factors(build("schedule", "cosine", final=0.2), 2, 2) == pytest.approx(expected)


def test_cosine_by_epoch_is_hydras():
    """lr / 2 * (1 + cos(pi (e - 1) / E)), e from 1, the same throughout an epoch."""
    expected = [(1 + cos(pi * (e - 1) / 5)) / 2 for e in range(1, 6) for _ in range(3)]
    assert factors(build("schedule", "cosine", every="epoch"), 5, 3) == pytest.approx(expected)


def test_step_drops_at_its_milestones():
    schedule = build("schedule", "step", milestones=(0.5, 0.75), factor=0.1)
    assert factors(schedule, 4, 2) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("milestones", [(0.0,), (1.0,), (0.5, 30.0)])
def test_milestones_outside_the_stage_are_refused(milestones):
    with pytest.raises(OptionError, match="between 0 and 1"):
        StepOptions(milestones=milestones)


def test_cyclic_rises_and_falls_in_straight_lines():
    assert factors(build("schedule", "cyclic"), 2, 4) == [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]
    expected = [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert factors(build("schedule", "cyclic", peak=0.25), 2, 4) == pytest.approx(expected)


def test_warmup_climbs_to_the_full_rate():
    """Half an epoch of 4 steps: 1/2, then 1."""
    assert factors(build("schedule", "constant", warmup=0.5), 2, 4) == [0.5, *[1] * 7]
    assert factors(build("schedule", "constant", warmup=1), 1, 4) == [0.25, 0.5, 0.75, 1]
    plain = factors(build("schedule", "cosine"), 2, 4)
    warmed = factors(build("schedule", "cosine", warmup=1), 2, 4)
    assert warmed == pytest.approx([p * f for p, f in zip(plain, [0.25, 0.5, 0.75] + [1] * 5,
                                                          strict=True)])  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # g = 2 w + 0.5 w = 10, then w -= 0.1 g
        ("sgd", {"momentum": 0.0, "weight_decay": 0.5}, 3.0),
        # v = 8, w = 3.2; v = 0.5 * 8 + 6.4 = 10.4
        ("sgd-twice", {"momentum": 0.5, "weight_decay": 0.0}, 3.2 - 1.04),
        # Adam's first step is lr * sign(g)
        ("adam", {"weight_decay": 0.0}, 3.9),
        # decoupled: w (1 - lr * decay) - lr
        ("adamw", {"weight_decay": 0.5}, 4 * 0.95 - 0.1),
    ],
)
def test_optimizer_steps_by_hand(name, options, expected):
    name, _, twice = name.partition("-")
    schedule = Use(FOUND["schedule", "cosine"], FOUND["schedule", "cosine"].options())
    choice = build("optimizer", name, lr=0.1, schedule=schedule, **options)
    assert choice.lr == 0.1
    weight = torch.nn.Parameter(torch.tensor([4.0], dtype=torch.float64))
    optimizer = choice.make([weight])
    for _ in range(2 if twice else 1):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert weight.item() == pytest.approx(expected, abs=1e-6)
    assert choice.schedule(Clock(0, 10, 0, 1)) == 1


def test_nesterov_needs_momentum():
    with pytest.raises(OptionError, match="momentum above 0"):
        FOUND["optimizer", "sgd"].options(momentum=0.0, nesterov=True)


def test_a_step_leaves_the_compiler_of_torch_alone():
    """Importing it takes longer than all of a small run; what torch offers beside stays."""
    code = (
        "import sys, torch\n"
        "from prunekit_optimizers import optimizers\n"
        "for kind in (optimizers._SGD, optimizers._ADAM, optimizers._ADAMW):\n"
        "    weight, seen = torch.nn.Parameter(torch.ones(2)), []\n"
        "    optimizer = kind([weight], lr=0.1)\n"
        "    optimizer.register_step_post_hook(lambda *_: seen.append(1))\n"
        "    optimizer.zero_grad()\n"
        "    weight.sum().backward()\n"
        "    optimizer.step()\n"
        "    optimizer.load_state_dict(optimizer.state_dict())\n"
        "    assert seen and (weight < 1).all()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
