"""Every registered component keeps the contract of its kind; and the contract test can fail."""

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from prunekit import (
    Arrays,
    EvaluatorComponent,
    LearnedScores,
    LearnedWeights,
    ObjectiveComponent,
    option,
)
from prunekit.catalog.kinds import KINDS
from prunekit.catalog.registry import load_registry
from prunekit.contexts import DatasetContext, PrunerContext
from prunekit.contracts import Data, Loss, Result, Scores
from prunekit.testing import check_component, example_context, find_components

REGISTRY = load_registry()
# What Python gives is built of nothing here: see test_api.py.
ENTRIES = [e for e in REGISTRY.entries if e.kind in KINDS and e.component.name != "given"]
COLOUR = ("cifar", "vgg", "wrn", "imagenet", "timm", "torchvision")


@pytest.fixture
def table(tmp_path):
    """Options that a component cannot do without."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 8, 8), dtype=np.uint8)
    labels = np.arange(6) % 3
    np.savez(tmp_path / "my.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    np.savez(tmp_path / "extra.npz", image=images, label=labels)
    (tmp_path / "net.py").write_text(
        "from math import prod\nfrom torch import nn\n\ndef make(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), classes))\n"
    )
    return {
        "npz": {"file": "my.npz"},
        "extra-images": {"file": "extra.npz"},
        "image-folder": {"root": "nothing"},
        "python": {"file": "net.py"},
        "timm": {"model": "test_vit"},
        "torchvision": {"model": "mobilenet_v3_small"},
    }


def weigh(entries):
    """Of networks that differ in size alone, all but the first are slow."""
    families = set()
    for entry in entries:
        family = re.match(r"\D+", entry.component.name)[0]
        slow = entry.kind == "architecture" and family in families
        families.add(family)
        yield pytest.param(entry, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(
    "entry", list(weigh(ENTRIES)), ids=lambda e: f"{e.kind}-{e.component.name}"
)
def test_component_keeps_its_contract(entry, table, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_DATA", str(tmp_path / "nothing"))
    if entry.missing:
        pytest.skip(entry.status)
    options = table.get(entry.component.name, {})
    if entry.kind == "dataset" and "download" in {
        f.name for f in dataclasses.fields(entry.component.options)
    }:
        options = {"download": False}
    big = entry.kind == "architecture" and entry.component.name.startswith(COLOUR)
    shape = (3, 32, 32) if big else (1, 8, 8)
    if entry.component.name in ("wrn-28-10", "wrn-34-10"):
        shape = (3, 16, 16)
    check_component(entry.component, options, shape=shape, folder=tmp_path)


def test_nothing_is_broken():
    assert REGISTRY.broken == ()
    assert [e.component.name for e in REGISTRY.entries if e.problem] == []


def test_find_components_reads_a_plugin_module():
    names = [(c.kind, c.name) for c in find_components("prunekit_pruners")]
    assert {("pruner", "score"), ("pruner", "lwm"), ("pruner", "random")} <= set(names)
    assert {kind for kind, _ in names} == {"pruner"}


def test_an_example_context_has_what_its_kind_has():
    context = example_context(PrunerContext, sparsity=0.25)
    assert context.sparsity == 0.25
    assert context.weights.keys() == {
        name for name, p in context.model.named_parameters() if p.dim() > 1
    }
    assert not hasattr(example_context(DatasetContext), "model")
    with pytest.raises(TypeError, match="sparsity"):
        example_context(DatasetContext, sparsity=0.25)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    example_context(PrunerContext)
    assert torch.equal(torch.get_rng_state(), before)


def changes_weights(options, context):
    def step(x, y, clock):
        with torch.no_grad():
            next(context.model.parameters()).add_(1)
        logits = context.model(x)
        return Loss(torch.nn.functional.cross_entropy(logits, y), logits)

    return step


def leaves_eval_mode(options, context):
    def step(x, y, clock):
        context.model.eval()
        logits = context.model(x)
        return Loss(torch.nn.functional.cross_entropy(logits, y), logits)

    return step


def detaches_scores(options, context):
    def step(x, y, clock):
        weights = dict(context.model.named_parameters())
        logits = context.model(x)
        value = torch.nn.functional.cross_entropy(logits.detach(), y)
        return Loss(value + 0 * sum(w.sum() for w in weights.values() if w.dim() == 1), logits)

    return step


class Step:
    """An objective without a mistake."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x, y, clock):
        logits = self.model(x)
        return Loss(torch.nn.functional.cross_entropy(logits, y), logits)


def misspells_a_method(options, context):
    class Misspelt(Step):
        def after_steps(self):
            raise NotImplementedError

    return Misspelt(context.model)


def halts_without_a_reason(options, context):
    class Halting(Step):
        def halts(self, history):
            return "no progress" if len(history) > 1 else ""

    return Halting(context.model)


def forgets_half_a_pair(options, context):
    class Half(Step):
        def state_dict(self):
            return {}

    return Half(context.model)


def misspells_closing(options, context):
    class Report:
        def __call__(self, event): ...

        @staticmethod
        def closed(): ...

    return Report()


def misspells_a_part_of_the_data(options, context):
    class Images(Arrays):
        def augmented_batch(self, indices, names, batch_seeds): ...

    images = Images(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4) % 2)
    return Data(images, images, (1, 8, 8), 2)


@dataclasses.dataclass
class Helped(Step):
    """What an objective holds and hides is no method of its own, nor what torch defines."""

    model: torch.nn.Module
    measure: Callable[[float], float] = lambda value: value

    def _help(self): ...

    @property
    def name(self):
        return "helped"


class OfTorch(torch.nn.Module, Helped):
    def __init__(self, model):
        super().__init__()
        self.model = model

    __call__ = Step.__call__


def makes_no_mistake(options, context):
    return OfTorch(context.model)


def test_only_methods_of_its_own_have_to_be_known():
    check_component(
        ObjectiveComponent(name="good", summary="Good", build=f"{__name__}:makes_no_mistake")
    )


def forgets_a_layer(options, context):
    def score(context):
        name, weight = next(iter(context.weights.items()))
        return Scores({name: weight.abs()})

    return score


def changes_its_context(options, context):
    def score(context):
        for weight in context.weights.values():
            weight.zero_()
        return Scores({name: weight.abs() for name, weight in context.weights.items()})

    return score


def rounds_by_layer(options, context):
    def score(context):
        sizes = {name: weight.numel() for name, weight in context.weights.items()}
        keep = {name: n - int(context.sparsity * n) for name, n in sizes.items()}
        return Scores({name: w.abs() for name, w in context.weights.items()}, keep=keep)

    return score


def gives_arrays(options, context):
    return lambda context: Scores({n: w.numpy() for n, w in context.weights.items()})


class Late(LearnedScores):
    def moving(self):
        self.model.register_buffer("late", torch.zeros(1))
        return self.scores()


class Left(LearnedScores):
    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.model.register_buffer("left", torch.zeros(1))


def learns_late(options, context):
    return lambda context: context.train(context.attach(Scores(context.weights), Late))


def leaves_state(options, context):
    return lambda context: context.train(context.attach(Scores(context.weights), Left))


class Elsewhere(LearnedWeights):
    def detach(self):
        super().detach()
        self.trained["0.weight"].data.neg_()


def leaves_other_weights(options, context):
    start = Scores({name: weight.abs() for name, weight in context.weights.items()})
    return lambda context: context.train(context.attach(start, Elsewhere))


def takes_nothing(options, context):
    return lambda: None


@pytest.mark.parametrize(
    ("more", "build", "words"),
    [
        ({}, "changes_its_context", "changed the weights of its context; copy them"),
        (
            {"allocates": True},
            "rounds_by_layer",
            r"keeps 46 weights .* leaves 45 of 84",
        ),
        ({}, "gives_arrays", r"the scores of 0\.weight are a ndarray, no tensor"),
        (
            {"learns": True},
            "learns_late",
            "late came or went while it trained; make",
        ),
        ({"learns": True}, "leaves_state", "leaves another network behind: left came or went"),
        ({"learns": True}, "leaves_other_weights", "the network that it leaves.*not the judged"),
        ({}, "takes_nothing", "broken raises TypeError: takes_nothing.*positional argument"),
    ],
)
def test_a_broken_pruner_is_found(more, build, words):
    build = f"{__name__}:{build}"
    component = KINDS["pruner"](name="broken", summary="Broken on purpose", build=build, **more)
    with pytest.raises(AssertionError, match=words):
        check_component(component)


def test_an_example_attaches_and_trains_scores_of_ones_own():
    class Own(LearnedScores):
        pass

    context = example_context(PrunerContext)
    masking = context.attach(Scores(context.weights), Own)
    assert isinstance(masking, Own)
    assert context.train(masking).values.keys() == context.weights.keys()


def forgets_an_image(options, context):
    return lambda model, batches: Result({"accuracy": 0.5}, {"correct": np.zeros(3, bool)})


def prints(options, context):
    return print


@pytest.mark.parametrize(
    ("kind", "build", "words"),
    [
        ("objective", "changes_weights", "changed the weights"),
        ("objective", "leaves_eval_mode", "left train mode"),
        ("objective", "detaches_scores", "no gradient"),
        ("objective", "misspells_a_method", "after_steps.*did you mean 'after_step'"),
        ("objective", "halts_without_a_reason", "halts where nothing changes"),
        ("objective", "forgets_half_a_pair", r"Stateful: add load_state_dict\(\)"),
        ("reporter", "misspells_closing", "closed.*did you mean 'close'"),
        ("dataset", "misspells_a_part_of_the_data", "did you mean 'augmented_batches'"),
        ("pruner", "forgets_a_layer", "every weight"),
        ("evaluator", "forgets_an_image", "not one an image"),
        ("reporter", "prints", "stdout"),
    ],
)
def test_a_broken_component_is_found(kind, build, words):
    build = f"{__name__}:{build}"
    component = KINDS[kind](name="broken", summary="Broken on purpose", build=build)
    with pytest.raises(AssertionError, match=words):
        check_component(component)


@dataclasses.dataclass(frozen=True)
class NoHelp:
    steps: int = 3


@dataclasses.dataclass(frozen=True)
class OwnThreat:
    eps: float = option(0.1, help="a radius")
    norm: str = option("linf", help="a norm")


@dataclasses.dataclass(frozen=True)
class Taken:
    name: str = option("x", help="collides with the core's own key")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "Not_Kebab"}, "kebab-case"),
        ({"summary": "two\nlines"}, "one line"),
        ({"options": NoHelp}, "option\\(help"),
        ({"options": Taken}, "key of the core"),
        ({"options": OwnThreat}, "derive from prunekit.Threatened"),
        ({"build": "math"}, "module:function"),
        ({"sources": ("no_such_package",)}, "there is no package"),
        ({"sources": ("os.path",)}, "top-level"),
        ({"build": "math:nothing"}, "no function"),
    ],
)
def test_a_broken_declaration_is_found(changes, words):
    good = {"name": "good", "summary": "Good", "build": f"{__name__}:forgets_an_image"}
    with pytest.raises(AssertionError, match=words):
        check_component(EvaluatorComponent(**{**good, **changes}))
