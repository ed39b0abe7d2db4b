"""The hooks: one a kind, all of one shape. Each docstring shows a complete plugin and its test.

A plugin is a module that an entry point of the group `prunekit` names:

    [project.entry-points.prunekit]
    mine = "my_plugin"

Hooks only declare; what a component does is imported when a recipe uses it. `prunekit new plugin`
writes these examples to disk as a package of yours, and docs/plugins.md explains them.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from prunekit.catalog.component import Component

hookspec = pluggy.HookspecMarker("prunekit")


@hookspec
def prunekit_objectives() -> Iterable[Component]:
    """Training losses. `build` returns an `Objective`.

    # my_plugin/__init__.py
    from dataclasses import dataclass

    from prunekit import Component, hookimpl, option

    PRUNEKIT_API = 2


    @dataclass(frozen=True)
    class NoiseOptions:
        noise: float = option(0.1, help="standard deviation of the noise", low=0)


    @hookimpl
    def prunekit_objectives():
        yield Component(
            name="label-noise",
            summary="Cross-entropy on logits with noise",
            build="my_plugin.loss:build",
            options=NoiseOptions,
        )

    # my_plugin/loss.py
    import torch
    from prunekit.contracts import Loss
    from torch.nn import functional as F


    def build(options, context):
        def step(x, y, clock):
            logits = context.model(x)
            noisy = logits + options.noise * torch.randn_like(logits)
            return Loss(F.cross_entropy(noisy, y), logits)

        return step

    # tests/test_loss.py
    from math import log

    import pytest
    import torch
    from prunekit.contracts import Clock, Context

    from my_plugin import NoiseOptions
    from my_plugin.loss import build


    def test_without_noise_it_is_the_cross_entropy():
        model = torch.nn.Linear(1, 3)
        torch.nn.init.zeros_(model.weight)
        torch.nn.init.zeros_(model.bias)
        step = build(NoiseOptions(noise=0.0), Context(model=model))
        loss = step(torch.rand(2, 1), torch.tensor([0, 1]), Clock(0, 1, 0, 1))
        assert loss.value.item() == pytest.approx(log(3))
    """
    raise NotImplementedError


@hookspec
def prunekit_pruners() -> Iterable[Component]:
    """Scores of weights. `build` returns a `Pruner`; budgets and structures are the core's.

    # my_plugin/__init__.py
    from prunekit import Component, hookimpl

    PRUNEKIT_API = 2


    @hookimpl
    def prunekit_pruners():
        yield Component(
            name="small-first",
            summary="Keeps the smallest weights",
            build="my_plugin.small:build",
        )

    # my_plugin/small.py
    from prunekit.contracts import Scores


    def build(options, context):
        return lambda context: Scores({n: -w.abs() for n, w in context.weights.items()})

    # tests/test_small.py
    import torch
    from prunekit import NoOptions
    from prunekit.contracts import Context

    from my_plugin.small import build


    def test_the_smallest_weight_scores_highest():
        context = Context(weights={"layer.weight": torch.tensor([1.0, -3.0, 2.0])})
        scores = build(NoOptions(), context)(context)
        assert scores.values["layer.weight"].tolist() == [-1.0, -3.0, -2.0]
    """
    raise NotImplementedError


@hookspec
def prunekit_architectures() -> Iterable[Component]:
    """Networks. `build` returns an `nn.Module` from pixels in [0, 1] to logits.

    # my_plugin/__init__.py
    from prunekit import Component, hookimpl

    PRUNEKIT_API = 2


    @hookimpl
    def prunekit_architectures():
        yield Component(
            name="linear-net",
            summary="One linear layer",
            build="my_plugin.linear:build",
        )

    # my_plugin/linear.py
    from math import prod

    from torch import nn


    def build(options, context):
        return nn.Sequential(nn.Flatten(), nn.Linear(prod(context.shape), context.classes))

    # tests/test_linear.py
    from prunekit import NoOptions
    from prunekit.contracts import Context

    from my_plugin.linear import build


    def test_it_has_a_weight_for_each_pixel_and_class():
        model = build(NoOptions(), Context(shape=(1, 2, 2), classes=3))
        assert sum(p.numel() for p in model.parameters()) == 4 * 3 + 3
    """
    raise NotImplementedError


@hookspec
def prunekit_datasets() -> Iterable[Component]:
    """Labelled images. `build` returns `Data`; `facts` tells the shape before a file is touched.

    # my_plugin/__init__.py
    from prunekit import Component, Facts, hookimpl

    PRUNEKIT_API = 2


    @hookimpl
    def prunekit_datasets():
        yield Component(
            name="stripes",
            summary="Bright left or bright right halves",
            build="my_plugin.stripes:build",
            facts=lambda options: Facts((1, 4, 4), 2, train=64, test=32),
        )

    # my_plugin/stripes.py
    import torch
    from prunekit import Arrays
    from prunekit.contracts import Data


    def build(options, context):
        def part(n):
            labels = torch.arange(n) % 2
            images = torch.zeros(n, 1, 4, 4, dtype=torch.uint8)
            images[labels == 0, :, :, :2] = 200
            images[labels == 1, :, :, 2:] = 200
            return Arrays(images, labels)

        return Data(part(64), part(32), shape=(1, 4, 4), classes=2)

    # tests/test_stripes.py
    from prunekit import NoOptions
    from prunekit.contracts import Context

    from my_plugin.stripes import build


    def test_class_0_is_bright_on_the_left():
        data = build(NoOptions(), Context())
        assert data.train.labels[:2].tolist() == [0, 1]
        assert data.train.images[0, 0, 0].tolist() == [200, 200, 0, 0]
        assert data.train.images[1, 0, 0].tolist() == [0, 0, 200, 200]
    """
    raise NotImplementedError


@hookspec
def prunekit_evaluators() -> Iterable[Component]:
    """Judgements of a network. `build` returns an `Evaluator`.

    # my_plugin/__init__.py
    from prunekit import Component, hookimpl

    PRUNEKIT_API = 2


    @hookimpl
    def prunekit_evaluators():
        yield Component(
            name="confidence",
            summary="Mean confidence of the prediction",
            build="my_plugin.confidence:build",
        )

    # my_plugin/confidence.py
    import torch
    from prunekit.contracts import Result


    def build(options, context):
        @torch.no_grad()
        def evaluate(model, batches):
            top = torch.cat([model(x).softmax(1).amax(1) for x, y in batches]).cpu()
            return Result({"confidence": float(top.mean())}, {"confidence": top.numpy()})

        return evaluate

    # tests/test_confidence.py
    from math import log

    import pytest
    import torch
    from prunekit import NoOptions
    from prunekit.contracts import Context

    from my_plugin.confidence import build


    def test_confidence_is_the_largest_probability():
        evaluate = build(NoOptions(), Context())
        logits = torch.tensor([[0.0, log(3)], [0.0, 0.0]])  # 3/4, and 1/2
        result = evaluate(torch.nn.Identity(), [(logits, torch.tensor([0, 1]))])
        assert result.metrics["confidence"] == pytest.approx(0.625)
        assert result.records["confidence"] == pytest.approx([0.75, 0.5])
    """
    raise NotImplementedError


@hookspec
def prunekit_reporters() -> Iterable[Component]:
    """Listeners to a run's events. `build` returns a `Reporter`.

    # my_plugin/__init__.py
    from prunekit import Component, hookimpl

    PRUNEKIT_API = 2


    @hookimpl
    def prunekit_reporters():
        yield Component(
            name="beep",
            summary="Rings the bell when a run is done",
            build="my_plugin.beep:build",
        )

    # my_plugin/beep.py
    import sys

    from prunekit.report import RunDone


    def build(options, context):
        def report(event):
            if isinstance(event, RunDone):
                sys.stderr.write("\\a")

        return report

    # tests/test_beep.py
    from prunekit import NoOptions
    from prunekit.contracts import Context
    from prunekit.report import Note, RunDone

    from my_plugin.beep import build


    def test_it_rings_when_a_run_is_done(tmp_path, capsys):
        report = build(NoOptions(), Context())
        report(Note("not yet"))
        assert capsys.readouterr().err == ""
        report(RunDone("run", tmp_path, {}))
        assert capsys.readouterr().err == "\\a"
    """
    raise NotImplementedError


@hookspec
def prunekit_optimizers() -> Iterable[Component]:
    """Optimizers of weights or scores. `build` returns an `OptimizerChoice`.

    # my_plugin/__init__.py
    from dataclasses import dataclass

    from prunekit import Component, Use, hookimpl, option
    from prunekit.contracts import Schedule

    PRUNEKIT_API = 2


    @dataclass(frozen=True)
    class SignOptions:
        lr: float = option(0.001, help="learning rate", above=0)
        schedule: Use[Schedule] = option("cosine", help="how the rate changes")


    @hookimpl
    def prunekit_optimizers():
        yield Component(
            name="sign-sgd",
            summary="Steps of one length, along the signs of the gradient",
            build="my_plugin.sign_sgd:build",
            options=SignOptions,
            paper="Bernstein et al., ICML 2018, arXiv 1802.04434",
        )

    # my_plugin/sign_sgd.py
    import torch
    from prunekit.contracts import OptimizerChoice


    class SignSgd(torch.optim.Optimizer):
        def __init__(self, parameters, lr):
            super().__init__(parameters, {"lr": lr})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.sub_(group["lr"] * parameter.grad.sign())


    def build(options, context):
        def make(parameters):
            return SignSgd(parameters, options.lr)

        return OptimizerChoice(make, options.lr, options.schedule.build(context))

    # tests/test_sign_sgd.py
    import torch

    from my_plugin.sign_sgd import SignSgd


    def test_it_steps_along_the_sign():
        weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        optimizer = SignSgd([weight], lr=0.5)
        weight.grad = torch.tensor([3.0, -0.1])
        optimizer.step()
        assert weight.tolist() == [0.5, 1.5]
    """
    raise NotImplementedError


@hookspec
def prunekit_schedules() -> Iterable[Component]:
    """Schedules of the learning rate. `build` returns a `Schedule`.

    # my_plugin/__init__.py
    from prunekit import Component, hookimpl

    PRUNEKIT_API = 2


    @hookimpl
    def prunekit_schedules():
        yield Component(
            name="linear-decay",
            summary="Falls in a straight line to 0",
            build="my_plugin.linear_decay:build",
        )

    # my_plugin/linear_decay.py
    def build(options, context):
        return lambda clock: 1 - clock.fraction

    # tests/test_linear_decay.py
    from prunekit import NoOptions
    from prunekit.contracts import Clock, Context

    from my_plugin.linear_decay import build


    def test_it_is_a_line():
        schedule = build(NoOptions(), Context())
        assert [schedule(Clock(step, 4, 0, 1)) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    """
    raise NotImplementedError
