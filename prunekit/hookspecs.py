"""The hooks: one a kind, all of one shape. Each docstring shows a complete plugin.

A plugin is a module that an entry point of the group `prunekit` names:

    [project.entry-points.prunekit]
    mine = "my_plugin"

Hooks only declare; what a component does is imported when a recipe uses it.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from prunekit.component import Component

hookspec = pluggy.HookspecMarker("prunekit")


@hookspec
def prunekit_objectives() -> Iterable[Component]:
    """Training losses. `build` returns an `Objective`.

    # my_plugin/__init__.py
    from prunekit import Component, hookimpl

    @hookimpl
    def prunekit_objectives():
        yield Component(name="label-noise", summary="Cross-entropy on logits with noise",
                        build="my_plugin.loss:build")

    # my_plugin/loss.py
    import torch
    from torch.nn import functional as F
    from prunekit.contracts import Loss

    def build(options, context):
        def step(x, y, clock):
            logits = context.model(x)
            return Loss(F.cross_entropy(logits + 0.1 * torch.randn_like(logits), y), logits)
        return step
    """
    raise NotImplementedError


@hookspec
def prunekit_pruners() -> Iterable[Component]:
    """Scores of weights. `build` returns a `Pruner`; budgets and structures are the core's.

    # my_plugin/__init__.py
    from prunekit import Component, hookimpl

    @hookimpl
    def prunekit_pruners():
        yield Component(name="small-first", summary="Keeps the smallest weights",
                        build="my_plugin.small:build")

    # my_plugin/small.py
    from prunekit.contracts import Scores

    def build(options, context):
        return lambda context: Scores({n: -w.abs() for n, w in context.weights.items()})
    """
    raise NotImplementedError


@hookspec
def prunekit_architectures() -> Iterable[Component]:
    """Networks. `build` returns an `nn.Module` from pixels in [0, 1] to logits.

    # my_plugin/__init__.py
    from prunekit import Component, hookimpl

    @hookimpl
    def prunekit_architectures():
        yield Component(name="linear-net", summary="One linear layer",
                        build="my_plugin.linear:build")

    # my_plugin/linear.py
    from math import prod
    from torch import nn

    def build(options, context):
        return nn.Sequential(nn.Flatten(), nn.Linear(prod(context.shape), context.classes))
    """
    raise NotImplementedError


@hookspec
def prunekit_datasets() -> Iterable[Component]:
    """Labelled images. `build` returns `Data`; `facts` tells the shape before a file is touched.

    # my_plugin/__init__.py
    from prunekit import Component, Facts, hookimpl

    @hookimpl
    def prunekit_datasets():
        yield Component(name="stripes", summary="Bright left or bright right halves",
                        build="my_plugin.stripes:build",
                        facts=lambda options: Facts((1, 4, 4), 2, train=64, test=32))

    # my_plugin/stripes.py
    import torch
    from prunekit.contracts import Data
    from prunekit.data import Arrays

    def build(options, context):
        def part(n):
            labels = torch.arange(n) % 2
            images = torch.zeros(n, 1, 4, 4, dtype=torch.uint8)
            images[labels == 0, :, :, :2] = 200
            images[labels == 1, :, :, 2:] = 200
            return Arrays(images, labels)
        return Data(part(64), part(32), shape=(1, 4, 4), classes=2)
    """
    raise NotImplementedError


@hookspec
def prunekit_evaluators() -> Iterable[Component]:
    """Judgements of a network. `build` returns an `Evaluator`.

    # my_plugin/__init__.py
    from prunekit import Component, hookimpl

    @hookimpl
    def prunekit_evaluators():
        yield Component(name="confidence", summary="Mean confidence of the prediction",
                        build="my_plugin.confidence:build")

    # my_plugin/confidence.py
    import torch
    from prunekit.contracts import Result

    def build(options, context):
        @torch.no_grad()
        def evaluate(model, batches):
            top = torch.cat([model(x).softmax(1).amax(1) for x, y in batches])
            return Result({"confidence": float(top.mean())}, {"confidence": top.cpu().numpy()})
        return evaluate
    """
    raise NotImplementedError


@hookspec
def prunekit_reporters() -> Iterable[Component]:
    """Listeners to a run's events. `build` returns a `Reporter`.

    # my_plugin/__init__.py
    from prunekit import Component, hookimpl

    @hookimpl
    def prunekit_reporters():
        yield Component(name="beep", summary="Rings the bell when a run is done",
                        build="my_plugin.beep:build")

    # my_plugin/beep.py
    import sys
    from prunekit.report import RunDone

    def build(options, context):
        def report(event):
            if isinstance(event, RunDone):
                sys.stderr.write("\\a")
        return report
    """
    raise NotImplementedError
