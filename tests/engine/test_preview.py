"""What the dry run says a stage costs is what it costs."""

import json

import pytest
import torch
from torch import nn

from prunekit.engine.engine import Engine
from prunekit.engine.handed_over import plan_recipe
from prunekit.engine.preview import preview_plan
from prunekit.judging import LOOKS
from prunekit.report import StageDone, StageStarted
from prunekit.store.stages import Store
from prunekit.training.compute import open_compute

CALLS = [0]


class Counting(nn.Module):
    """Tells nearly all images right, and no attack of a tiny radius from that."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 2)
        nn.init.constant_(self.fc.bias, 5.0)
        self.fc.bias.data[1] = -5

    def forward(self, x):
        CALLS[0] += 1
        return self.fc(x.flatten(1))


PGD = {"use": "pgd-at", "steps": 2, "validation_steps": 3}
FINETUNE = {"kind": "finetune", "epochs": 2, "optimizer": {"use": "sgd", "lr": 1e-6}}
TAUGHT = [{**FINETUNE, "kind": "pretrain", "objective": "benign"}, FINETUNE]
PRUNE = {"kind": "prune", "sparsity": 0.5}


def make_plan(objective, stages):
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(256, (50, 1, 8, 8), generator=draw, dtype=torch.uint8)
    y = torch.zeros(50, dtype=torch.int64)
    y[[0, 49]] = 1
    recipe = {
        "dataset": {"use": "given", "batch_size": 8, "validation": 8 / 38},
        "threat": {"eps": 1e-4},
        "objective": objective,
        "stage": stages,
    }
    return plan_recipe(recipe, Counting(), (x[:38], y[:38], x[38:], y[38:]), None, "cpu")


@pytest.mark.parametrize("pruner", ["score", "harp"])
def test_scores_that_start_as_sensitivities_take_a_pass_before_training(pruner, tmp_path):
    passes = []
    for start in ("scaled", "snip"):
        stage = {**PRUNE, "pruner": {"use": pruner, "start": start}, "epochs": 1}
        told = preview_plan(make_plan("benign", [stage]), tmp_path / "out", tmp_path / "store")
        passes.append(told["runs"][0]["stages"][0]["forward_passes"])
    assert passes == [LOOKS + 4 + 1, LOOKS + 4 + 1 + 1]


@pytest.mark.parametrize(
    ("objective", "stages", "passes"),
    [
        # Each validated stage and each evaluator looks at the network first.
        # 30 images of 38 in 4 batches of 8 (2 epochs), 8 to validate in one batch.
        ("benign", [FINETUNE], [LOOKS + 8 * 1 + 2 * 1]),
        (PGD, [FINETUNE], [LOOKS + 8 * 3 + 2 * 5]),
        ({**PGD, "use": "trades"}, [FINETUNE], [LOOKS + 8 * 5 + 2 * 5]),
        ({**PGD, "use": "mart"}, [FINETUNE], [LOOKS + 8 * 4 + 2 * 5]),
        (
            {"use": "n-fgsm", "validation_steps": 3},
            [{**FINETUNE, "validate": {"use": "pgd", "steps": 2, "restarts": 2}}],
            [LOOKS + 8 * 2 + 2 * (5 + 1 + 2 * 3)],
        ),
        # The teacher's passes count: here it is the network itself, before it is finetuned.
        (
            {"use": "rslad", "steps": 2, "validation_steps": 3},
            TAUGHT,
            [LOOKS + 8 + 2, LOOKS + 8 * 5 + 2 * 5],
        ),
        (
            {"use": "rslad", "steps": 2, "validation_steps": 3, "igdm": 1},
            [TAUGHT[0], {**FINETUNE, "wrap": ["awp"]}],
            [LOOKS + 8 + 2, LOOKS + 8 * (8 + 3) + 2 * 5],
        ),
        (
            {"use": "saad", "steps": 2, "validation_steps": 3, "natural": 1},
            [TAUGHT[0], {**FINETUNE, "wrap": ["awp"]}],
            [LOOKS + 8 + 2, LOOKS + 8 * (8 + 3) + 2 * 5],
        ),
        # 2 steps on each batch, so that it passes over the images once.
        (
            {"use": "free-adv", "replays": 2, "validation_steps": 3},
            [FINETUNE],
            [LOOKS + 8 * 1 + 1 * 5],
        ),
        ({"use": "smoothing", "validation_draws": 3}, [FINETUNE], [LOOKS + 8 * 2 + 2 * 4]),
        # Both of its passes go through the loss; one attack serves them.
        (PGD, [{**FINETUNE, "wrap": ["awp"]}], [LOOKS + 8 * 4 + 2 * 5]),
        # Four batches go through the objective for the statistics of each of two averages.
        (
            PGD,
            [{**FINETUNE, "wrap": [{"use": "swa", "start": 0}]}],
            [LOOKS + 8 * 3 + 2 * (5 + 4 * 3)],
        ),
        # It begins with the second epoch: before, there is no average to measure.
        (PGD, [{**FINETUNE, "wrap": ["swa"]}], [LOOKS + 8 * 3 + 2 * 5 + 4 * 3]),
        (
            PGD,
            [{**FINETUNE, "wrap": [{"use": "awp", "start": 1}]}],
            [LOOKS + 8 * 3 + 4 * 1 + 2 * 5],
        ),
        # At 2 points of the way, on 5 batches: those of an epoch and one more.
        (
            PGD,
            [{**PRUNE, "pruner": {"use": "fashapley", "steps": 2, "batches": 5}}],
            [2 * 5 * 3],
        ),
        (PGD, [{**PRUNE, "pruner": "movement"}], [4 * 3]),
        (PGD, [{**PRUNE, "pruner": {"use": "movement", "batches": 3}}], [3 * 3]),
        (PGD, [{**PRUNE, "pruner": "snip", "bn": "recalibrate"}], [1 + 4]),
        # Statistics are made anew with one pass over the images, also after scores were learned.
        ("benign", [{**PRUNE, "epochs": 1, "bn": "recalibrate"}], [LOOKS + 4 + 1 + 4]),
        ("benign", [{**PRUNE, "pruner": "lwm", "bn": "recalibrate"}], [4]),
        ("benign", [{**PRUNE, "pruner": "lwm"}], [0]),
        ("benign", [{**PRUNE, "epochs": 1}], [LOOKS + 4 + 1]),
        # 12 images in two batches.
        (
            "benign",
            [
                FINETUNE,
                {"kind": "evaluate", "with": ["clean", {"use": "pgd", "steps": 2, "restarts": 2}]},
            ],
            [LOOKS + 10, 2 * LOOKS + 2 * (1 + (1 + 2 * 3))],
        ),
    ],
)
def test_the_forward_passes_that_are_told_are_made(objective, stages, passes, tmp_path):
    plan = make_plan(objective, stages)
    told = preview_plan(plan, tmp_path / "out", tmp_path / "store")["runs"][0]["stages"]
    assert [stage["forward_passes"] for stage in told] == passes
    json.dumps(told)
    made, start = [], [0]

    def report(event):
        if isinstance(event, StageStarted):
            start[0] = CALLS[0]
        if isinstance(event, StageDone):
            made.append(CALLS[0] - start[0])

    # Without a rehearsal.
    engine = Engine(Store(tmp_path / "store"), open_compute("cpu"), report, smoke=True)
    (folder,) = engine.run(plan, tmp_path / "out")
    assert folder.error == ""
    assert made == passes
