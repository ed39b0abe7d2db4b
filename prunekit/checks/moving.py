"""What budgets, schedules of the sparsity, rewirers and wrappers must do."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.catalog.component import Use
from prunekit.catalog.containment import ask
from prunekit.checks.examples import tiny_batches, tiny_network
from prunekit.checks.methods import build
from prunekit.checks.training import differing, same, snapshot
from prunekit.contexts import Context, NetworkContext
from prunekit.contracts import Clock, Loss, OptimizerChoice, Scores, Stateful
from prunekit.data.seeds import seed_all
from prunekit.errors import RunError
from prunekit.pruning.selection import Selection, select_masks
from prunekit.steps import (
    Around,
    Averaging,
    Following,
    Layers,
    Masking,
    Moment,
    Recalibrating,
)
from prunekit.training.masking import LearnedScores, Weights
from prunekit.training.rewiring import Rewired, Rewiring
from prunekit.training.step import Stepper, look

STEPS, EPOCH = 12, 6


def _clock(step: int) -> Clock:
    return Clock(step, STEPS, step // EPOCH, STEPS // EPOCH)


def check_sparsity_schedule(use: Use[Any], context: Context) -> None:
    """A function of the clock alone, in [0, 1], and 1 at the end."""
    schedule = build(use, context)
    clocks = [_clock(step) for step in range(STEPS + 1)]
    factors = [schedule(clock) for clock in clocks]
    assert all(0 <= f <= 1 for f in factors), "a fraction is not in [0, 1]"
    assert factors[-1] == 1, "it does not end at 1"
    assert factors == [schedule(clock) for clock in clocks], "is not a function of the clock alone"


def check_budget(use: Use[Any], context: Context) -> None:
    """Counts that add up, or scores of the same shapes; alike for alike layers."""
    budget = build(use, context)
    torch.manual_seed(0)
    scores = {"a": torch.rand(6, 4), "b": torch.rand(10, 6), "c": torch.rand(3, 10)}
    shapes = {name: score.shape for name, score in scores.items()}
    layers = Layers(scores, {}, shapes, 0.5, 57)
    for found in (budget(layers), budget(layers)):
        assert isinstance(found, Mapping), f"gives a {type(found).__name__}, not a mapping by layer"
        assert found.keys() == scores.keys(), "must name every layer, and no other"
        tensors = [isinstance(value, Tensor) for value in found.values()]
        assert all(tensors) or not any(tensors), "gives counts for some layers, scores for others"
        told = "gives counts, and declares that it gives scores"
        if any(tensors):
            told = "gives scores; declare counts=False"
        assert use.component.counts != any(tensors), told
    for name, value in found.items():
        whole = isinstance(value, Tensor) or (
            isinstance(value, int) and 0 <= value <= scores[name].numel()
        )
        assert whole, f"{name} keeps {value!r} of {scores[name].numel()}"
        assert not isinstance(value, Tensor) or value.shape == scores[name].shape, "shape of scores"
    masks = select_masks(Scores(scores), Selection(0.5, budget))
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert abs(kept - 57) <= len(scores), f"keeps {kept} of 114 at sparsity 0.5, not about 57"


def check_rewirer(use: Use[Any], context: NetworkContext) -> None:
    """Twelve steps, of which some rewire: exact counts, zeros, and the target at the end."""
    results = []

    class Fresh:
        """A rewirer that is built for every call, as for a run that resumes there."""

        def due(self, clock: Clock) -> Any:
            return use.build(context).due(clock)

        def __call__(self, moment: Moment) -> Any:
            return use.build(context)(moment)

    kept = build(use, context)
    for name in ("due", "__call__"):
        assert hasattr(kept, name), f"has no {name}()"
    for rewirer in (kept, build(use, context), Fresh()):
        model = tiny_network()
        names = [name for name, p in model.named_parameters() if p.dim() > 1]
        rewiring = Rewiring(
            rewirer,
            use.name,
            Selection(0.5),
            lambda clock: min(1.0, 0.5 + clock.fraction),
            names,
            (0, 0),
            ask(use, "gradients"),
            use.component.allocates,
        )
        try:
            results.append(_train_rewired(Rewired(model, {}, rewiring)))
        except RunError as error:
            raise AssertionError(str(error)) from None
    assert same(results[0], results[1]), "not repeatable under one seed"
    assert same(results[0], results[2]), "keeps a state of its own, which a resumed run has not"


def _train_rewired(masking: Rewired) -> dict[str, Tensor]:
    stepper = _make_stepper(masking)
    masking.rewire(_clock(0), stepper.optimizer)
    for step in range(STEPS):
        (x, y), _ = tiny_batches()
        before = {n: masking.weights()[n].clone() for n in masking.rewiring.weights}
        due = masking.due(_clock(step))
        assert isinstance(due, bool), f"`due` gives a {type(due).__name__}, not a bool"
        assert due == masking.due(_clock(step)), "`due` is not a function of the clock alone"
        row = {"epoch": 1, "loss": 1.0, "accuracy": 0.5, "validation.accuracy": 0.5}
        stepper.take(x, y, _clock(step), [row] * (step // EPOCH))
        masking.check()
        for name, weight in before.items():
            kept = masking.masks[name]
            stays = torch.equal(
                masking.weights()[name][kept & (weight != 0)], weight[kept & (weight != 0)]
            )
            assert not due or stays, "a step that rewires changed a weight that stays"
    assert masking.settled(_clock(STEPS - 1)), "it is not at the target at the end"
    masking.detach()
    return {**masking.model.state_dict(), **{f"{n}.mask": m for n, m in masking.masks.items()}}


def check_wrapper(use: Use[Any], context: NetworkContext) -> None:
    """Steps on weights and on scores: what is changed comes back, and a resume gives the same."""
    wrapper = build(use, context)
    known = isinstance(wrapper, Around | Following)
    assert known, "has neither `around` nor `after_step`"
    assert use.component.averages == isinstance(wrapper, Averaging), (
        "`averages` and `judged` differ"
    )
    for learned in (True,) if use.component.scores else (False, True):
        model = tiny_network()
        start = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() > 1}
        chosen = select_masks(Scores({n: v.abs() for n, v in start.items()}), Selection(0.5))
        masking: Masking = Weights(model, chosen)
        if learned:
            masking = LearnedScores(model, Scores(start), Selection(0.5), {})
        masking.after_step()
        wrapper = build(use, dataclasses.replace(context, model=model))
        stepper = _make_stepper(masking, wrapper)
        _check_passes(use, wrapper, masking, stepper)
        for step in range(STEPS):
            _take(stepper, step)
        if isinstance(wrapper, Recalibrating):
            asked = wrapper.batches(_short(STEPS - 1))
            assert asked <= use.component.batches(use.options), "asks for undeclared batches"
        if isinstance(wrapper, Averaging):
            before = snapshot(model)
            with wrapper.judged(model), masking.judged(_short(STEPS - 1)):
                assert not same(before, model.state_dict()), "its network is the trained one"
            # Masks follow what is trained in the next step.
            odd = differing(before, model.state_dict())
            moved = [name for name in odd if before[name].is_floating_point()]
            assert not moved, f"`judged` does not bring back {', '.join(moved)}"
        _check_resume(use, context, wrapper, stepper)


def _short(step: int) -> Clock:
    """Epochs of a step, so that what waits for the last ones has several."""
    return Clock(step, STEPS, step, STEPS)


def _take(stepper: Stepper, step: int) -> None:
    (x, y), _ = tiny_batches()
    seed_all(step)
    loss = stepper.take(x, y, _short(step), [])
    assert loss.value.isfinite(), "the loss is not finite"
    stepper.masking.check()


def _check_resume(use: Use[Any], context: NetworkContext, wrapper: Any, stepper: Stepper) -> None:
    """Another wrapper, with its state if it has one, goes on as this one does."""
    masking, model = stepper.masking, stepper.masking.model
    start, ends = snapshot(model), []
    twin: Any = build(use, dataclasses.replace(context, model=model))
    if isinstance(wrapper, Stateful):
        twin.load_state_dict(copy.deepcopy(wrapper.state_dict()))
        assert same(wrapper.state_dict(), twin.state_dict()), "its state does not restore it"
    for one in (wrapper, twin):
        model.load_state_dict(start)
        again = _make_stepper(masking, one)
        for step in range(STEPS - 3, STEPS):
            _take(again, step)
        ends.append(snapshot(model))
        if isinstance(one, Averaging):
            with one.judged(model):
                ends[-1] |= {f"judged.{name}": v for name, v in snapshot(model).items()}
    assert same(*ends), "keeps a state that state_dict() and load_state_dict() do not restore"


def _check_passes(use: Use[Any], wrapper: Any, masking: Masking, stepper: Stepper) -> None:
    """What `around` does to weights and to the number of passes."""
    if not isinstance(wrapper, Around):
        return
    (x, y), _ = tiny_batches()
    clock, passes = Clock(STEPS - 1, STEPS, 10**6, 10**6 + 1), 0
    now = look(masking, clock)

    def go() -> Loss:
        nonlocal passes
        passes += 1
        with masking.effective(clock, lend=True):
            loss = stepper.objective(x, y, clock)
            loss.value.backward()
        masking.after_backward()
        return loss

    lent = {**now.weights, **{f"scores of {name}": s for name, s in now.scores.items()}}
    before = {name: value.detach().clone() for name, value in lent.items()}
    assert isinstance(wrapper.around(go, now), Loss), (
        "`around` must return the loss of its last pass"
    )
    assert same(before, lent), "`around` does not bring everything back to the bit"
    assert passes == use.component.passes(use.options), (
        f"makes {passes} passes, and declares others"
    )


def _make_stepper(masking: Masking, *wrappers: Any) -> Stepper:
    model = masking.model

    def cross_entropy(x: Tensor, y: Tensor, clock: Clock) -> Loss:
        logits = model(x)
        return Loss(nn.functional.cross_entropy(logits, y), logits.detach())

    def make(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    choice = OptimizerChoice(make, 0.1, lambda clock: 1.0)
    return Stepper(masking, cross_entropy, choice, (0, 0), wrappers=wrappers)
