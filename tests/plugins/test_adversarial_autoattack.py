"""AutoAttack through pyautoattack: its settings, its loop, few classes, resume, side effects."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prunekit_adversarial import ATTACKS, AutoAttackOptions, count_autoattack, prunekit_evaluators
from torch import Tensor, nn

from prunekit import RunError, Use, UserError
from prunekit.contexts import EvaluatorContext
from prunekit.contracts import Threat
from prunekit.errors import Interrupted, OptionError
from prunekit.judging import Examination, watching
from prunekit.testing import check_component, example_context

pyautoattack = pytest.importorskip("pyautoattack")
make_suite = importlib.import_module("prunekit_adversarial.suite").make_suite

LINF, BALL = Threat("linf", 0.03), Threat("l2", 0.4)
COMPONENT = next(c for c in prunekit_evaluators() if c.name == "autoattack")
FEW = {"steps": 5, "queries": 20}


def build(threat: Threat | None = LINF, *, random: bool = False, **options: Any) -> Any:
    use: Use[Any] = Use(COMPONENT, COMPONENT.options(**options), threat=threat)
    found = Examination(random=random, mixed=False, moved=(), finite=True)
    return use.build(example_context(EvaluatorContext, examination=found))


def make(judge: Any, model: nn.Module, classes: int = 10) -> Any:
    """The suite that an evaluator works with."""
    device = torch.device("cpu")
    return make_suite(judge.threat, judge.options, model, device, classes, judge.random)


def make_net(classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes)
    )


def make_batches(model: nn.Module, sizes: tuple[int, ...] = (24, 9)) -> list[tuple[Tensor, Tensor]]:
    """Images that the network knows, but for the second of each batch."""
    torch.manual_seed(1)
    batches = []
    model.eval()
    for size in sizes:
        x = torch.rand(size, 1, 8, 8)
        y = model(x).argmax(1)
        y[1] = (y[1] + 1) % 3
        batches.append((x, y))
    return batches


@pytest.mark.parametrize("threat", [LINF, BALL], ids=["linf", "l2"])
def test_standard_has_the_settings_of_the_reference(threat: Threat) -> None:
    suite = make(build(threat), make_net())
    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    reference = pyautoattack.AutoAttack(
        make_net(), norm=norm, eps=threat.eps, seed=0, device=torch.device("cpu")
    )
    assert reference.attacks_to_run == list(ATTACKS)
    for part in ("apgd", "apgd_targeted", "fab", "square"):
        found, expected = vars(getattr(suite, part)), vars(getattr(reference, part))
        left_out = ("model", "predict")
        assert {k: v for k, v in found.items() if k not in left_out} == {
            k: v for k, v in expected.items() if k not in left_out
        }
    shorter = pyautoattack.autopgd_base.APGDAttack(make_net(), n_iter=40, eps=0.1)
    found = make(build(steps=40), make_net()).apgd_targeted
    for name in ("n_iter", "n_iter_2", "n_iter_min", "size_decr"):
        assert getattr(found, name) == getattr(shorter, name)


@pytest.mark.parametrize("threat", [LINF, BALL], ids=["linf", "l2"])
def test_attacks_follow_each_other_as_in_the_reference(threat: Threat) -> None:
    model = make_net()
    batches = make_batches(model)
    evaluate = build(threat, **FEW)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evaluate(model, iter(batches))
    expected = []
    for x, y in batches:
        suite = make(evaluate, model)
        suite.attacks_to_run = list(ATTACKS)
        _, prediction = suite.run_standard_evaluation(x, y, batch_size=len(x))
        expected += (prediction == y).tolist()
    assert result.records["correct"].tolist() == expected
    attack = result.records["attack"]
    assert attack.dtype.kind == "U"
    assert [i for i, name in enumerate(attack) if name == "misclassified"] == [1, 25]
    assert {"robust", "apgd-ce"} <= {*attack} <= {"robust", "misclassified", *ATTACKS}
    assert (result.records["correct"] == (attack == "robust")).all()
    assert result.metrics["accuracy"] == pytest.approx(np.mean(expected))
    assert result.metrics["accuracy"].n == 33
    assert result.metrics["accuracy"].low < result.metrics["accuracy"]


def test_standard_is_a_label_for_nothing_less() -> None:
    assert build()._is_standard(10)
    assert build()._is_standard(4)
    assert build(attacks=ATTACKS)._is_standard(10)
    assert not build()._is_standard(3)
    for options in ({"steps": 99}, {"queries": 10}, {"restarts": 2}, {"attacks": ("apgd-ce",)}):
        assert not build(**options)._is_standard(10)


@pytest.mark.parametrize(
    ("classes", "chosen", "targets"),
    [(2, "apgd-ce fab square", 1), (3, "apgd-ce fab square", 2),
     (4, "apgd-ce apgd-t fab-t square", 3), (10, "apgd-ce apgd-t fab-t square", 9),
     (100, "apgd-ce apgd-t fab-t square", 9)],
)  # fmt: skip
def test_any_number_of_classes(classes: int, chosen: str, targets: int) -> None:
    model = make_net(classes)
    evaluate = build(**FEW, seed=3)
    assert " ".join(evaluate._choose(classes)) == chosen
    suite = make(evaluate, model, classes)
    assert suite.apgd_targeted.n_target_classes == suite.fab.n_target_classes == targets
    x = torch.rand(4, 1, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evaluate(model, [(x, model.eval()(x).argmax(1))])
    assert result.metrics["standard"] == 0
    assert result.metrics["seed"] == 3


def test_attacks_that_want_more_classes_are_refused() -> None:
    model = make_net(3)
    with pytest.raises(UserError, match=r'at least 4 classes.*"apgd-ce", "fab", "square"'):
        build(attacks=("apgd-ce", "apgd-t"))(model, make_batches(model))
    with pytest.raises(UserError, match=r"\[threat\]"):
        build(None)
    with pytest.raises(OptionError):
        AutoAttackOptions(attacks=())


def test_a_chosen_attack_on_a_linear_network_is_exact() -> None:
    # Logits (w.v, -w.v): robust where w.v > eps * |w|_1.
    w = torch.randn(64, generator=torch.Generator().manual_seed(3))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([w, -w]))
        model[1].bias.copy_(model[1].weight @ torch.full((64,), -0.5))
    ratios = torch.tensor([-0.5, 0.5, 0.9, 1.1, 2.0])
    x = (0.5 + ratios[:, None] * LINF.eps * w.abs().sum() * w / w.dot(w)).reshape(5, 1, 8, 8)
    for name in ("apgd-ce", "fab"):
        evaluate = build(attacks=(name,), steps=20)
        result = evaluate(model, [(x, torch.zeros(5, dtype=torch.long))])
        expected = ["misclassified", name, name, "robust", "robust"]
        assert result.records["attack"].tolist() == expected


def test_nothing_of_the_network_changes() -> None:
    model = make_net(3)
    batches = make_batches(model)
    model.train()
    model[0].weight.requires_grad_(False)
    model[4].bias.grad = torch.ones(3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = build(**FEW, attacks=("fab",))(model, batches)
    assert "fab" in result.records["attack"]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * 5]
    assert model[4].bias.grad.tolist() == [1, 1, 1]
    assert all(p.grad is None for p in model.parameters() if p is not model[4].bias)
    assert logging.getLogger("auto-attack").handlers == []


def test_goes_on_after_the_last_batch_that_is_done(tmp_path: Path) -> None:
    model = make_net()
    batches = make_batches(model, (6, 6, 3))

    def evaluate(given: Any, folder: Path | None) -> Any:
        use = build(**FEW, attacks=("apgd-ce", "square"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return type(use)(use.threat, use.options, folder)(model, given)

    def cut_off() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches[:2]
        raise KeyboardInterrupt

    expected = evaluate(batches, None)
    with pytest.raises(KeyboardInterrupt):
        evaluate(cut_off(), tmp_path)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    found = evaluate(batches, tmp_path)
    assert found.metrics == expected.metrics
    assert found.records["attack"].tolist() == expected.records["attack"].tolist()
    assert max(calls) == 3  # of the batches before, nothing but one image to count classes


def test_what_autoattack_doubts_is_warned_of() -> None:
    class Probabilities(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :10].softmax(1)

    class Flat(nn.Module):
        """Without a gradient; only Square moves all pixels of a column the same way."""

        def forward(self, x: Tensor) -> Tensor:
            return (20 * x.mean((1, 2))).round()

    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model: nn.Module = Probabilities()
    with pytest.warns(UserWarning, match="probability distribution") as caught:
        build(steps=2, attacks=("apgd-ce",))(model, [(x, model(x).argmax(1))] * 2)
    assert len(caught) == 1
    model = Flat()
    with pytest.warns(UserWarning, match="autoattack: ") as caught:
        result = build(steps=2, queries=100)(model, [(x, model(x).argmax(1))])
    texts = [str(w.message) for w in caught]
    assert any("points with zero gradient" in text for text in texts)
    assert any("Square, which uses no gradients" in text for text in texts)
    assert not any("flags_doc" in text for text in texts)
    assert "square" in result.records["attack"]


def test_counts_its_passes() -> None:
    model = make_net()
    with torch.no_grad():  # nothing fools it
        model[4].weight.mul_(1e-3)
        model[4].bias.copy_(torch.arange(10.0))
    x, y = torch.rand(2, 1, 8, 8), torch.full((2,), 9)
    for name in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"):
        options = {"steps": 6, "queries": 40, "attacks": (name,), "restarts": 2}
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        hook = model.register_forward_pre_hook(count)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build(**options)(model, [(x, y)])
        hook.remove()
        checks = calls - count_autoattack(AutoAttackOptions(**options))
        # Of every attack and target: which images are left, and whether they still are.
        assert 0 <= checks < 60, (name, checks)


class Noisy(nn.Module):
    """A network whose forward draws, in evaluation mode too."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.net = make_net(classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x + 0.05 * torch.randn_like(x))
        return logits


@pytest.mark.parametrize(
    ("classes", "chosen"), [(2, "apgd-ce"), (3, "apgd-ce apgd-dlr"), (10, "apgd-ce apgd-dlr")]
)
def test_a_network_that_answers_at_random_gets_the_version_for_it(
    classes: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = build(steps=3, random=True)
    model = Noisy(classes).eval()
    assert " ".join(evaluate._choose(classes)) == chosen
    assert make(evaluate, model, classes).apgd.eot_iter == 20
    assert make(build(steps=3), model, classes).apgd.eot_iter == 1
    assert not build(attacks=ATTACKS, random=True)._is_standard(10)
    ran = []
    run = pyautoattack.AutoAttack.run_standard_evaluation
    monkeypatch.setattr(
        pyautoattack.AutoAttack,
        "run_standard_evaluation",
        lambda self, *a, **k: ran.append(self) or run(self, *a, **k),
    )
    x = torch.rand(8, 1, 8, 8)
    with pytest.warns(UserWarning, match="answers at random: version rand.* over 20 draws") as told:
        result = evaluate(model, [(x, model.net(x).argmax(1))])
    # The advice to take this version would mislead.
    assert not any('version="rand"' in str(w.message) for w in told)
    assert {suite.attacks_to_run[0] for suite in ran} <= set(chosen.split())
    assert {(s.version, s.apgd.eot_iter) for s in ran} == {("rand", 20)}
    assert (result.metrics["standard"], result.metrics["draws"]) == (0, 20)


def test_attacks_named_for_a_random_network_run_as_named_over_20_draws() -> None:
    evaluate = build(attacks=("apgd-ce", "square"), steps=2, queries=3, random=True)
    assert evaluate._choose(10) == ("apgd-ce", "square")
    model = Noisy().eval()
    x = torch.rand(4, 1, 8, 8)
    with pytest.warns(UserWarning, match="answers at random: named attacks"):
        result = evaluate(model, [(x, model.net(x).argmax(1))])
    assert result.metrics["standard"] == 0


class Rounded(nn.Module):
    """The mean of the image, rounded: class 0 where it is below 1/2; no gradient anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        high = (x.mean((1, 2, 3)) - 0.5).sign()
        return torch.stack([-high, high, high - 5, high - 6], 1)


@pytest.mark.parametrize("attacks", [("apgd-ce",), ("fab",), None], ids=["apgd", "fab", "all"])
def test_images_without_a_gradient_are_attacked_again(attacks: Any) -> None:
    # A step of the leaking gradient is along its sign: robust where the mean is below 0.5 - eps.
    values = torch.tensor([0.4, 0.469, 0.471, 0.49, 0.6])
    x, y = values[:, None, None, None].expand(5, 1, 4, 4).contiguous(), torch.zeros(5).long()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = build(attacks=attacks, steps=8, queries=200)(Rounded().eval(), [(x, y)])
    assert result.records["correct"].tolist() == [True, True, False, False, False]
    assert result.records["zero_gradient"].tolist() == [True] * 4 + [False]
    flat = result.metrics["zero_gradient"]
    assert (flat, flat.n, flat.doubtful) == (4, 4, True)


def test_a_network_without_a_gradient_to_its_images_is_named_and_square_does() -> None:
    model = make_net().eval()

    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = model(x.detach())
            return logits

    x = torch.rand(4, 1, 8, 8)
    y = model(x).argmax(1)
    with pytest.raises(RunError, match=r'no gradient through.*attacks = \["square"\]'):
        build(**FEW)(Detached(), [(x, y)])
    result = build(attacks=("square",), queries=3)(Detached(), [(x, y)])
    assert not result.records["zero_gradient"].any()


def test_nan_near_an_image_counts_as_wrong_whatever_class_it_names() -> None:
    class Hole(nn.Module):
        """All logits are NaN off the multiples of 1/4: the first of them is the label's."""

        def forward(self, x: Tensor) -> Tensor:
            off = ((4 * x).round() != 4 * x).flatten(1).any(1)
            return x.flatten(1)[:, :10].masked_fill(off[:, None], torch.nan)

    x = torch.zeros(3, 1, 8, 8)
    x[:, 0, 0, 0] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluate = build(attacks=("apgd-ce",), steps=3)
        with watching(model := Hole().eval(), evaluate.watch):
            evaluate.watch.begin(x, 0)
            result = evaluate(model, [(x, torch.zeros(3).long())])
    assert result.records["correct"].tolist() == [False] * 3


def test_contract() -> None:
    check_component(COMPONENT)


@pytest.mark.parametrize("calls", [3, 40, 400])
def test_a_stop_within_a_batch_keeps_the_attacks_that_are_done(calls: int, tmp_path: Path) -> None:
    """Stopped at any forward pass, it goes on to the records of one that was not stopped."""
    model = make_net()
    batches = make_batches(model)
    whole = build(**FEW)(model, batches)
    left = calls

    def pause() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Interrupted

    judge = dataclasses.replace(build(**FEW), scratch=tmp_path, pause=pause)
    with pytest.raises(Interrupted):
        judge(model, batches)
    left = 10**9
    again = judge(model, batches)
    assert again.records["attack"].tolist() == whole.records["attack"].tolist()
    assert again.metrics == whole.metrics
    # Of what was done, at most one attack on one batch is done again.
    assert 10**9 - left < 2 * count_passes(model, batches)


@pytest.mark.parametrize(
    "content", ["{", "{}", "[[], [], {}, []]", '[["robust"], [1], {}]', '[["robust"], [], {}]']
)
def test_damaged_work_is_told_and_done_again(content: str, tmp_path: Path) -> None:
    batches = make_batches(model := make_net())
    whole = build(**FEW)(model, batches)
    (tmp_path / "autoattack.json").write_text(content)
    with pytest.warns(match=r"autoattack\.json is damaged .* computed again"):
        again = dataclasses.replace(build(**FEW), scratch=tmp_path)(model, batches)
    assert again.records["attack"].tolist() == whole.records["attack"].tolist()


def count_passes(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> int:
    passes = []
    dataclasses.replace(build(**FEW), pause=lambda: passes.append(1))(model, batches)
    return len(passes)
