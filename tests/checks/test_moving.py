"""The contract test finds what budgets, schedules, rewirers and wrappers do wrong."""

import pytest
import torch

from prunekit import (
    BudgetComponent,
    RewirerComponent,
    SparsityScheduleComponent,
    WrapperComponent,
    share_out,
)
from prunekit.contracts import Scores
from prunekit.testing import check_component

MAGNITUDES = staticmethod(lambda moment: Scores({n: w.abs() for n, w in moment.weights.items()}))


class Rewires:
    due = staticmethod(lambda clock: clock.step == 4)
    __call__ = MAGNITUDES


class ForgetsALayer(Rewires):
    __call__ = staticmethod(
        lambda moment: Scores({n: w.abs() for n, w in list(moment.weights.items())[:1]})
    )


class ChangesWeights(Rewires):
    def __call__(self, moment):
        for weight in moment.weights.values():
            weight.add_(1)
        return Scores({n: w.abs() for n, w in moment.weights.items()})


class LooksAtTheStep(Rewires):
    seen = 0

    def due(self, clock):
        self.seen += 1
        return self.seen % 2 == 0


class DoesNotEnd(Rewires):
    __call__ = staticmethod(
        lambda m: Scores(
            {n: w.abs() for n, w in m.weights.items()}, keep=dict.fromkeys(m.weights, 9)
        )
    )


class Counts(Rewires):
    calls = 0

    def __call__(self, moment):
        self.calls += 1
        return Scores({n: w.abs() * (-1) ** self.calls for n, w in moment.weights.items()})


class DueNever(Rewires):
    due = staticmethod(lambda clock: None)


class NoDue:
    __call__ = MAGNITUDES


class Misspelt(Rewires):
    def dew(self, clock):
        return True


class LeavesWeights:
    def around(self, go, now):
        for weight in now.weights.values():
            weight.mul_(0.5)
        return go()


class RunsTwice:
    def around(self, go, now):
        go()
        return go()


class ReturnsNothing:
    def around(self, go, now):
        go()


class HalfAState:
    def after_step(self, now):
        pass

    def state_dict(self):
        return {}


class Forgets:
    """A rate that grows with each step, of which a resumed run knows nothing."""

    steps = 0

    def around(self, go, now):
        loss = go()
        self.steps += 1
        for parameter in now.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.steps)
        return loss


class HoldsANumber:
    def after_step(self, now):
        pass

    def state_dict(self):
        return {"steps": 3}

    def load_state_dict(self, state):
        pass


class JudgesTheSame:
    def after_step(self, now):
        pass

    def judged(self, model):
        return torch.no_grad()


class DoesNothing:
    pass


def counts(count):
    return lambda layers: dict.fromkeys(layers.scores, count)


@pytest.mark.parametrize(
    ("declaration", "build", "words"),
    [
        (RewirerComponent, ForgetsALayer, "must score every weight it is given, and no other"),
        (RewirerComponent, ChangesWeights, "a step that rewires changed a weight that stays"),
        (RewirerComponent, LooksAtTheStep, "`due` is not a function of the clock alone"),
        (RewirerComponent, DoesNotEnd, "write allocates=True where Scores has keep="),
        (RewirerComponent, Counts, "keeps a state of its own, which a resumed run has not"),
        (RewirerComponent, DueNever, "`due` gives a NoneType, not a bool"),
        (RewirerComponent, NoDue, r"has no due\(\)"),
        (WrapperComponent, Forgets, "keeps a state that state_dict"),
        (WrapperComponent, HoldsANumber, "steps is a int, not a tensor"),
        (BudgetComponent, lambda: lambda layers: None, "gives a NoneType, not a mapping"),
        (RewirerComponent, Misspelt, r"prunekit does not call dew\(\) of Misspelt; did you mean"),
        (
            WrapperComponent,
            LeavesWeights,
            "`around` does not bring everything back to the bit",
        ),
        (WrapperComponent, RunsTwice, "makes 2 passes, and declares others"),
        (WrapperComponent, ReturnsNothing, "`around` must return the loss of its last pass"),
        (WrapperComponent, HalfAState, r"only a part of Stateful: add load_state_dict\(\)"),
        (WrapperComponent, JudgesTheSame, "`averages` and `judged` differ"),
        (WrapperComponent, DoesNothing, "has neither `around` nor `after_step`"),
        (BudgetComponent, lambda: counts(5), "keeps 15 of 114 at sparsity 0.5, not about 57"),
        (BudgetComponent, lambda: counts(31), "keeps 31 of"),
        (BudgetComponent, lambda: lambda layers: {"a": 12}, "must name every layer, and no other"),
        (SparsityScheduleComponent, lambda: lambda clock: 2 * clock.fraction, r"not in \[0, 1\]"),
        (SparsityScheduleComponent, lambda: lambda clock: 0.5, "it does not end at 1"),
    ],
)
def test_what_is_wrong_is_found(declaration, build, words, broken):
    with pytest.raises(AssertionError, match=words):
        check_component(broken(declaration, build))


def test_what_is_right_passes(broken):
    check_component(broken(RewirerComponent, Rewires))
    even = lambda layers: share_out(  # noqa: E731
        dict.fromkeys(layers.scores, 1 - layers.sparsity),
        {n: s.numel() for n, s in layers.scores.items()},
        layers.total,
    )
    check_component(broken(BudgetComponent, lambda: even))


@pytest.fixture
def broken(monkeypatch):
    """Makes the declaration of what a function builds."""

    def make(declaration, build):
        monkeypatch.setattr("prunekit_wrappers.awp.build", lambda options, context: build())
        return declaration(name="broken", summary="Broken", build="prunekit_wrappers.awp:build")

    return make
