"""Where networks run on a backend: steps, attacks inside of them, judgements."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prunekit.contracts import Clock, Loss, OptimizerChoice, Scores
from prunekit.errors import UserError
from prunekit.evaluation import BACKEND, frozen, is_plain, plainly
from prunekit.pruning.selection import Selection
from prunekit.training.compute import open_compute
from prunekit.training.masking import LearnedScores, Weights
from prunekit.training.rewiring import Rewired, Rewiring
from prunekit.training.step import Stepper

CLOCK = Clock(1, 4, 0, 1)


class Noting:
    """A backend that only notes how it is entered."""

    def __init__(self):
        self.seen, self.depth = [], 0

    @contextmanager
    def around(self, model, masks, *, still):
        self.seen.append((self.depth, sorted(masks), still))
        self.depth += 1
        yield
        self.depth -= 1

    def chosen(self):
        return {"0.weight": "sparse", "2.weight": "2 groups"}


@pytest.fixture
def backend():
    noting = Noting()
    token = BACKEND.set(noting)
    yield noting
    BACKEND.reset(token)


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def take(masking):
    """A step with an attack inside."""

    def objective(x, y, clock):
        with frozen(masking.model) as network:
            network(x)
        logits = masking.model(x)
        return Loss(F.cross_entropy(logits, y), logits)

    choice = OptimizerChoice(torch.optim.SGD, 0.1, lambda clock: 1.0)
    stepper = Stepper(masking, objective, choice, (0, 0))
    stepper.take(torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]), CLOCK, [])


MASKS = {"0.weight": torch.eye(5, 4, dtype=torch.bool)}


def test_a_step_says_whose_removed_weights_need_no_gradient(backend):
    take(Weights(make_network(), MASKS))
    assert backend.seen == [(0, ["0.weight"], False), (1, [], True)]


def test_scores_want_the_whole_gradient(backend):
    network = make_network()
    start = Scores({"0.weight": torch.rand(5, 4)})
    take(LearnedScores(network, start, Selection(0.5), {}))
    assert backend.seen == [(0, [], False), (1, [], True)]


@pytest.mark.parametrize("due", [False, True])
def test_a_step_that_rewires_by_gradients_wants_them_all(backend, due):
    rewirer = SimpleNamespace(due=lambda clock: due)
    plan = Rewiring(
        rewirer,
        "noting",
        selection=Selection(0.5),
        schedule=lambda clock: 1.0,
        weights=["0.weight"],
        seed=(0, 0),
        gradients=True,
    )
    masking = Rewired(make_network(), MASKS, plan)
    assert sorted(masking.kept_only(CLOCK)) == ([] if due else ["0.weight"])


def test_a_judgement_stands_still(backend):
    with frozen(make_network()):
        pass
    assert backend.seen == [(0, [], True)]


def test_plainly_is_left_again():
    assert not is_plain()
    with plainly():
        assert is_plain()
    assert not is_plain()


def test_a_backend_for_another_device_is_refused_if_it_is_demanded():
    use = SimpleNamespace(component=SimpleNamespace(name="odd", devices=("mps",)))
    assert open_compute("cpu", mode="auto", use=use).sparse is None
    with pytest.raises(UserError, match=r'odd.*not on cpu; write sparse = "auto"'):
        open_compute("cpu", mode="on", use=use)


def test_what_was_chosen_is_recorded():
    noting = Noting()
    component = SimpleNamespace(name="noting", devices=("cpu",))
    use = SimpleNamespace(component=component, build=lambda context: noting)
    compute = open_compute("cpu", 1, "on", use)
    known = {"device": "cpu", "threads": 1, "precision": "fp32", "sparse": "on (noting)"}
    assert compute.take_chosen() == known
    with compute.active():
        layers = {"sparse_layers": ["0.weight"], "dense_layers": {"2.weight": "2 groups"}}
        assert compute.take_chosen() == known | layers
    assert BACKEND.get() is None
    assert compute.key()["sparse"] == "on (noting)"
    assert "sparse" not in open_compute("cpu", 1).key()
