"""The training loop: what it chooses, how it stops, and that going on changes no bit."""

import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from prunekit.contracts import Loss, OptimizerChoice, Scores
from prunekit.data.batches import Arrays, Extra, Feed
from prunekit.data.seeds import generator
from prunekit.errors import Interrupted, RunError, UserError
from prunekit.pruning.layers import find_prunable
from prunekit.pruning.masks import apply_masks
from prunekit.pruning.selection import Selection
from prunekit.report import EpochDone, Note, Progress, StageStarted, Stop
from prunekit.store.tensors.checkpoint import read_checkpoint
from prunekit.training import loop, progress
from prunekit.training.loop import Fit, fit
from prunekit.training.masking import LearnedScores, Weights

BATCHES = 3  # of 4, 4 and 2 images


def make_split(n, seed):
    draw = generator(seed)
    images = torch.randint(256, (n, 1, 8, 8), generator=draw, dtype=torch.uint8)
    return Arrays(images, torch.randint(3, (n,), generator=draw))


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(5, 3),
    )  # fmt: skip


class Plain:
    """CE, as objectives are; `watch(model)` is called before each step."""

    def __init__(self, model, watch):
        self.model, self.watch = model, watch

    def __call__(self, x, y, clock):
        self.watch(self.model)
        logits = self.model(x + 0.1 * torch.randn_like(x))
        return Loss(F.cross_entropy(logits, y), logits, {"term": logits.mean()})


class Stateful(Plain):
    """Two steps on each batch, and noise that persists from batch to batch."""

    def __init__(self, model, watch):
        super().__init__(model, watch)
        self.noise = torch.zeros(4, 1, 8, 8)

    def __call__(self, x, y, clock):
        self.x = x
        return super().__call__(x + self.noise[: len(x)], y, clock)

    def after_step(self):
        self.noise = self.noise * 0.9
        self.noise[: len(self.x)] += 0.1 * self.x + 0.01 * torch.rand_like(self.x)

    def state_dict(self):
        return {"noise": self.noise}

    def load_state_dict(self, state):
        assert state.keys() == {"noise"}
        self.noise = state["noise"]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.1)


def nothing(*_):
    pass


def make_job(folder, kind="pretrain", watch=nothing, report=nothing, stop=None, **changes):
    model = make_net()
    weights = find_prunable(model)
    if kind == "scores":
        start = {name: weight.detach().clone() for name, weight in weights.items()}
        trained = LearnedScores(
            model,
            Scores(start, True),
            Selection(0.6, lambda layers: layers.scores, compares=True),
            {},
            "train",
        )
    elif kind == "finetune":
        chosen = {name: weight.detach() > 0 for name, weight in weights.items()}
        apply_masks(model, chosen)
        trained = Weights(model, chosen)
    else:
        trained = Weights(model, {})
    objective = Stateful if kind == "stateful" else Plain
    job = {
        "masking": trained,
        "objective": objective(model, watch),
        "optimizer": OptimizerChoice(adam if kind == "adam" else sgd, 0.1,
                                     lambda clock: 1 - clock.fraction),
        "epochs": 2,
        "seed": (0, 0),
        "stage": "pretrain",
        "kind": "pretrain",
        "key": "k",
        "report": report,
        "stop": stop or Stop(),
        "checkpoint": folder / "progress.safetensors",
        "replays": 2 if kind == "stateful" else 1,
    }  # fmt: skip
    feed = {
        "train": make_split(10, 1),
        "validation": make_split(7, 2),
        "size": 4,
        "device": torch.device("cpu"),
        "augment": ("crop", "flip"),
        "extra": Extra(make_split(5, 3), 0.5) if kind == "extra" else None,
    }
    feed |= {name: changes.pop(name) for name in (*feed, "limit") if name in changes}
    return Fit(**{**job, "feed": Feed(**feed), **changes})


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_to_the_end(folder, kind, stops=()):
    """Train, stopped at the given steps and started anew: (final, path, history, starts)."""
    path, stops, starts = [], list(stops), 0
    while True:
        stop = Stop()

        def watch(model, stop=stop):
            path.append(snapshot(model))
            if len(path) - 1 in stops:
                stop.requested = True

        job = make_job(folder, kind, watch, stop=stop)
        starts += 1
        try:
            history = fit(job)
        except Interrupted:
            continue
        return snapshot(job.masking.model), path, history, starts


KINDS = ("pretrain", "adam", "finetune", "scores", "stateful", "extra")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return {kind: run_to_the_end(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", range(2 * BATCHES))
def test_a_resumed_training_ends_with_the_same_bits(tmp_path, undisturbed, kind, batch):
    replays = 2 if kind == "stateful" else 1
    final, path, history, _ = undisturbed[kind]
    assert len(path) == 2 * BATCHES * replays
    for step in {batch * replays, batch * replays + replays - 1}:
        folder = tmp_path / str(step)
        folder.mkdir()
        got, resumed, again, starts = run_to_the_end(folder, kind, [step])
        assert starts == 2
        assert len(resumed) == len(path)  # no step twice
        assert all(map(same, path, resumed))
        assert again == history
        assert same(got, final)


def test_a_training_may_be_stopped_at_every_batch(tmp_path, undisturbed):
    got, _, history, starts = run_to_the_end(tmp_path, "scores", range(6))
    assert starts == 7
    assert same(got, undisturbed["scores"][0])
    assert history == undisturbed["scores"][2]


@pytest.mark.parametrize("label", ["training", "validating"])
def test_a_stop_from_a_report_keeps_everything(tmp_path, undisturbed, label):
    stop, events = Stop(), []

    def report(event):
        events.append(event)
        stop.requested |= isinstance(event, Progress) and event.label == label

    with pytest.raises(Interrupted):
        fit(make_job(tmp_path, report=report, stop=stop))
    later = []
    job = make_job(tmp_path, report=later.append)
    assert fit(job) == undisturbed["pretrain"][2]
    assert same(snapshot(job.masking.model), undisturbed["pretrain"][0])
    (started,) = [e for e in later if isinstance(e, StageStarted)]
    assert (started.epoch, started.batch) != (0, 0)
    told = [e.epoch for e in [*events, *later] if isinstance(e, EpochDone) and not e.stored]
    assert told == [1, 2]


def test_epochs_of_one_batch_can_be_stopped(tmp_path):
    stop = Stop()
    job = make_job(tmp_path, watch=lambda model: setattr(stop, "requested", True), stop=stop,
                   epochs=5, limit=1)  # fmt: skip
    with pytest.raises(Interrupted):
        fit(job)
    assert read_checkpoint(job.checkpoint)[1]["at"]["epoch"] == 1


def test_long_epochs_are_saved_between_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    seen = []
    job = make_job(tmp_path, watch=lambda model: seen.append(job.checkpoint.exists()), epochs=1)
    fit(job)
    assert seen == [False, True, True]


def test_the_same_run_twice_and_another_seed(tmp_path, undisturbed):
    final = undisturbed["pretrain"][0]
    job = make_job(tmp_path)
    torch.manual_seed(99)  # nothing depends on what was drawn before
    fit(job)
    assert same(snapshot(job.masking.model), final)
    other = make_job(tmp_path, seed=(1, 0), checkpoint=tmp_path / "other")
    fit(other)
    assert not same(snapshot(other.masking.model), final)


def test_a_damaged_checkpoint_is_told_and_left_aside(tmp_path):
    job = make_job(tmp_path)
    job.checkpoint.write_bytes(b"junk")
    (tmp_path / "whole").mkdir()
    told = []
    job.report = told.append
    assert fit(job) == fit(make_job(tmp_path / "whole"))
    (note,) = (event for event in told if isinstance(event, Note))
    assert re.search(r"progress\.safetensors is damaged.*: the stage starts anew", note.text)
    (aside,) = tmp_path.glob("*damaged*")
    assert aside.read_bytes() == b"junk"


class Told(Plain):
    """Validation says what the test wants, epoch by epoch."""

    def __init__(self, values, ramp=0):
        self.values, self.ramp, self.epoch = values, ramp, -1

    def __call__(self, x, y, clock):
        self.epoch = clock.epoch
        return super().__call__(x, y, clock)

    def validate(self, x, y):
        return {"told": torch.full((len(y),), self.values[self.epoch])}

    def settled(self, clock):
        return clock.epoch >= self.ramp


def train_told(folder, values, ramp=0, notes=None, made=Told, **changes):
    """(rows that were best when they came, epoch whose weights the model has)."""
    objective = made(values, ramp)
    ends = {}

    def report(event):
        if isinstance(event, EpochDone):
            ends[event.epoch] = snapshot(job.masking.model)
        elif isinstance(event, Note) and notes is not None:
            notes.append(event)

    job = make_job(folder, report=report, epochs=len(values), objective=objective,
                   **{"select": "told", **changes})  # fmt: skip
    objective.model, objective.watch = job.masking.model, nothing
    history = fit(job)
    final = snapshot(job.masking.model)
    (kept,) = [epoch for epoch, end in ends.items() if same(end, final)]
    return [row["epoch"] for row in history if row["best"]], kept


def make_told(folder, values, kind="scores", report=nothing):
    objective = Told(values)
    job = make_job(folder, kind, report=report, epochs=len(values), select="told",
                   objective=objective)  # fmt: skip
    objective.model, objective.watch = job.masking.model, nothing
    return job


def test_a_checkpoint_holds_what_changed(tmp_path):
    """Neither the frozen weights, nor the best epoch a second time, are in what an epoch writes."""
    seen = []

    def report(event):
        if isinstance(event, EpochDone):
            files = {f.name: (f.stat().st_ino, load_file(f)) for f in sorted(tmp_path.iterdir())}
            seen.append(files)

    job = make_told(tmp_path, [0.5, 0.1, 0.6], report=report)
    frozen = [p.detach().clone() for p in job.masking.model.parameters() if not p.requires_grad]
    assert [tuple(p.shape) for p in frozen] == [(5,), (5, 64), (3,), (3, 5)]
    fit(job)
    beside = [[name for name in files if name != "progress.safetensors"] for files in seen]
    assert beside == [["progress-1.safetensors"]] * 2 + [["progress-3.safetensors"]]
    first, second = (files["progress-1.safetensors"][0] for files in seen[:2])
    assert first == second
    for files in seen:
        written = [value for _, tensors in files.values() for value in tensors.values()]
        assert not any(v.shape == p.shape and torch.equal(v, p) for v in written for p in frozen)
    # Scores of the newest epoch lie beside if it is the best; their momentum is always here.
    shapes = [
        sum(v.shape == (5, 64) for v in files["progress.safetensors"][1].values()) for files in seen
    ]
    assert shapes == [1, 2, 1]


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("number", range(7))
def test_a_kill_between_the_files_changes_no_bit(tmp_path, monkeypatch, number, written):
    values, writes = [0.1, 0.5, 0.3, 0.6], []
    (tmp_path / "whole").mkdir()
    whole = make_told(tmp_path / "whole", values)
    expected = fit(whole)
    really = progress.write_pieces

    def write(*args):
        writes.append(args[0].name)
        if len(writes) == number + 1:
            if written:
                really(*args)
            raise KeyboardInterrupt
        return really(*args)

    monkeypatch.setattr(progress, "write_pieces", write)
    with pytest.raises(KeyboardInterrupt):
        fit(make_told(tmp_path, values))
    job = make_told(tmp_path, values, report=refuse_notes)
    assert fit(job) == expected
    assert same(snapshot(job.masking.model), snapshot(whole.masking.model))
    left = {f.name for f in tmp_path.glob("progress-*")} - {"progress-4.safetensors"}
    # What the last save did not come to remove is the store's to delete.
    assert left == ({"progress-2.safetensors"} if number == 6 and written else set())


def refuse_notes(event):
    assert not isinstance(event, Note), event.text


@pytest.mark.parametrize("harm", ["change", "remove"])
def test_a_damaged_best_epoch_starts_the_stage_anew(tmp_path, harm):
    values, told = [0.5, 0.1], []
    job = make_told(tmp_path, values)
    fit(job)
    beside = tmp_path / "progress-1.safetensors"
    content = beside.read_bytes()
    beside.unlink()
    if harm == "change":
        beside.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = make_told(tmp_path, values, report=told.append)
    fit(again)
    (note,) = (event for event in told if isinstance(event, Note))
    assert re.search(r"progress.*\.safetensors is damaged.*: the stage starts anew", note.text)
    assert same(snapshot(again.masking.model), snapshot(job.masking.model))
    assert len(list(tmp_path.glob("*damaged*"))) == (2 if harm == "change" else 1)


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "ramp", "best", "kept"),
    [
        ([0.1, 0.5, 0.3], 0, [1, 2], 2),
        ([0.5, 0.1, 0.5], 0, [1, 3], 3),  # a tie goes to the later
        ([0.9, 0.1, 0.2], 1, [2, 3], 3),  # before the ramp ends none can win
        ([0.9, 0.1, 0.2], 9, [3], 3),  # nothing ever settles
        ([NAN, 0.1, NAN], 0, [2], 2),
        ([NAN, NAN], 0, [2], 2),
    ],
)
def test_the_best_epoch_is_kept(tmp_path, values, ramp, best, kept):
    assert train_told(tmp_path, values, ramp) == (best, kept)


@pytest.mark.parametrize(
    ("values", "ramp", "kept", "epochs"),
    [
        ([0.5, 0.4, 0.4, 0.9], 0, 1, 3),  # two epochs without a better one
        ([0.5, 0.4, 0.6, 0.5, 0.4, 0.9], 0, 3, 5),
        ([0.5, 0.5, 0.5, 0.9], 0, 3, 3),  # ties are no better, but of equal ones the later is kept
        ([0.9, 0.1, 0.2, 0.1, 0.1, 0.9], 1, 3, 5),  # nothing counts before the ramp ends
        ([0.9, 0.1, 0.2], 9, 3, 3),
        ([NAN, NAN, NAN, 0.1, NAN, 0.1], 0, 6, 6),
    ],
)
def test_patience_ends_a_training(tmp_path, values, ramp, kept, epochs):
    notes = []
    assert train_told(tmp_path, values, ramp, notes, patience=2)[1] == kept
    why = (
        f"stage 'pretrain' ends after epoch {epochs} of {len(values)} with the weights of epoch "
        f"{kept}: validation.told has not risen for 2 epochs"
    )
    assert [n.text for n in notes] == ([why] if epochs < len(values) else [])
    assert not any(n.warning for n in notes)


class Fails(Told):
    """Fails where the metric is below that of the epoch before."""

    def halts(self, history):
        before, now = [0.0, *(row["validation.told"] for row in history)][-2:]
        return f"{now:g} after {before:g}" if now < before else ""


@pytest.mark.parametrize("select", ["told", "last"])
@pytest.mark.parametrize(
    ("values", "ramp", "kept", "ended"),
    [
        ([0.5, 0.6, 0.2, 0.9], 0, 2, "0.2 after 0.6"),
        ([0.5, 0.6, 0.2], 0, 2, "0.2 after 0.6"),  # the last epoch is not kept either
        ([0.5, 0.5, 0.6], 0, 3, ""),
        ([0.5, 0.7, 0.6, 0.8, 0.7], 2, 2, "0.6 after 0.7"),  # the first that settles is not kept
        ([0.3, 0.35, 0.42, 0.0, 0.0], 3, 3, "0 after 0.42"),
        ([0.5, 0.1, 0.2, 0.1, 0.3], 2, 1, "0.1 after 0.5"),  # nor one before it settles
        ([0.5, 0.6, 0.2], 9, 2, "0.2 after 0.6"),  # nor the last, where none ever does
        ([0.5, 0.6, 0.7], 9, 3, ""),
    ],
)
def test_a_training_that_fails_ends_with_an_epoch_before(
    tmp_path, values, ramp, kept, ended, select
):
    notes = []
    values = [*map(float, torch.tensor(values))]
    made = train_told(tmp_path, values, ramp, notes, Fails, select=select)
    assert made[1] == kept
    assert [note.text.endswith(f": {ended}") and note.warning for note in notes] == [True] * bool(
        ended
    )
    assert [", whose objective had not settled: " in n.text for n in notes] == [
        kept <= ramp
    ] * bool(ended)


def test_a_training_that_fails_with_nothing_to_go_back_to_goes_on(tmp_path, monkeypatch):
    """Masks that are not at their target cannot be kept."""
    notes, objective = [], Fails([0.5, 0.25, 0.75, 0.125])
    job = make_job(tmp_path, report=lambda e: notes.append(e) if isinstance(e, Note) else None,
                   epochs=4, objective=objective, select="told")  # fmt: skip
    objective.model, objective.watch = job.masking.model, nothing
    monkeypatch.setattr(job.masking, "settled", lambda clock: clock.epoch >= 2)
    assert [row["best"] for row in fit(job)] == [False, False, True, False]
    assert [note.text for note in notes] == [
        "stage 'pretrain': epoch 2 fails, and there is none before it to go back to: 0.25 after "
        "0.5",
        "stage 'pretrain' ends after epoch 4 of 4 with the weights of epoch 3: 0.125 after 0.75",
    ]


@pytest.mark.parametrize("epoch", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["patience", "halts", "unsettled"])
def test_a_training_resumed_before_its_early_end_ends_there(tmp_path, kind, epoch):
    """Killed behind any epoch, that of the end among them: nothing is trained any more then."""
    values = [0.5, 0.6, 0.6, 0.2, 0.9]

    class Kill(Exception):
        pass

    def train(folder, killed_after=0):
        """(weights, history, notes, epochs that were trained)."""
        told, trained = [], []

        def report(event):
            if isinstance(event, Note):
                told.append(event)
            elif isinstance(event, EpochDone) and not event.stored:
                trained.append(event.epoch)
                if event.epoch == killed_after:
                    raise Kill

        objective = (Told if kind == "patience" else Fails)(values, 9 * (kind == "unsettled"))
        job = make_job(folder, report=report, epochs=5, objective=objective, select="told",
                       patience=2 if kind == "patience" else None)  # fmt: skip
        objective.model, objective.watch = job.masking.model, nothing
        history = fit(job)
        return snapshot(job.masking.model), history, told, trained

    (tmp_path / "whole").mkdir()
    final, history, told, trained = train(tmp_path / "whole")
    assert (trained, len(told)) == ([1, 2, 3, 4], 1)
    assert "with the weights of epoch 3" in told[0].text
    (tmp_path / "cut").mkdir()
    with pytest.raises(Kill):
        train(tmp_path / "cut", epoch)
    resumed = train(tmp_path / "cut")
    assert same(resumed[0], final)
    assert resumed[1:] == (history, told, trained[epoch:])


def test_last_keeps_the_last(tmp_path):
    assert train_told(tmp_path, [0.9, 0.1, 0.2], select="last")[1] == 3


def test_last_needs_no_validation(tmp_path):
    nobody = make_split(7, 2)
    nobody = Arrays(nobody.images[:0], nobody.labels[:0])
    job = make_job(tmp_path, validation=nobody, select="last")
    history = fit(job)
    assert [row["epoch"] for row in history if row["best"]][-1] == 2
    assert not [name for name in history[0] if name.startswith("validation")]


def test_an_unknown_metric_lists_those_there_are(tmp_path):
    with pytest.raises(
        RunError, match=r"select = 'robust' .*there are: accuracy, balanced_accuracy, last"
    ):
        fit(make_job(tmp_path, select="robust"))


def test_rows_are_means_over_images(tmp_path):
    losses, sizes = [], []

    class Watched(Plain):
        def __call__(self, x, y, clock):
            loss = super().__call__(x, y, clock)
            losses.append(loss.value.item())
            sizes.append(len(y))
            return loss

    job = make_job(tmp_path, epochs=1)
    job.objective = Watched(job.masking.model, nothing)
    (row,) = fit(job)
    assert sizes == [4, 4, 2]
    expected = sum(loss * n for loss, n in zip(losses, sizes, strict=True)) / 10
    assert row["loss"] == pytest.approx(expected)
    assert {"term", "accuracy", "validation.accuracy"} < row.keys()
    job.masking.model.eval()
    x, y = job.feed.validation.images.float() / 255, job.feed.validation.labels
    accuracy = (job.masking.model(x).argmax(1) == y).float().mean().item()
    assert row["validation.accuracy"] == pytest.approx(accuracy)


def test_unbalanced_classes_get_a_balanced_validation_accuracy(tmp_path):
    images = make_split(10, 1).images
    skewed = Arrays(images, torch.tensor([0] * 7 + [1] * 3))
    even = Arrays(images, torch.tensor([0, 1] * 5))
    job = make_job(tmp_path, train=even, checkpoint=tmp_path / "even.safetensors")
    assert "validation.balanced_accuracy" not in fit(job)[0]
    job = make_job(tmp_path, train=skewed, validation=skewed, epochs=1)
    (row,) = fit(job)
    job.masking.model.eval()
    correct = (job.masking.model(images.float() / 255).argmax(1) == skewed.labels).float()
    balanced = (correct[:7].mean() + correct[7:].mean()) / 2
    assert row["validation.balanced_accuracy"] == pytest.approx(balanced.item())


def test_the_clock_and_the_rate(tmp_path):
    clocks, rates = [], []

    class Watched(Stateful):
        def __call__(self, x, y, clock):
            clocks.append(clock)
            rates.append(made[0].param_groups[0]["lr"])
            return super().__call__(x, y, clock)

    made = []
    job = make_job(tmp_path, replays=2)
    job.objective = Watched(job.masking.model, nothing)
    job.optimizer = OptimizerChoice(lambda p: made.append(sgd(p)) or made[0], 0.5,
                                    lambda clock: 1 - clock.fraction)  # fmt: skip
    fit(job)
    assert [c.step for c in clocks] == list(range(12))
    assert {(c.steps, c.epochs) for c in clocks} == {(12, 2)}
    assert [c.epoch for c in clocks] == [0] * 6 + [1] * 6
    assert rates == pytest.approx([0.5 * (1 - s / 12) for s in range(12)])


def test_clipping_bounds_the_gradient(tmp_path):
    norms = []

    class Watching(torch.optim.SGD):
        def step(self):
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
            super().step()

    choice = OptimizerChoice(lambda p: Watching(p, lr=0.1), 0.1, lambda clock: 1.0)
    fit(make_job(tmp_path, optimizer=choice, clip_norm=0.01))
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


class TurnsNan(Plain):
    at = 4

    def __call__(self, x, y, clock):
        loss = super().__call__(x, y, clock)
        return Loss(loss.value * (NAN if clock.step == self.at else 1), loss.logits)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    job = make_job(tmp_path)
    job.objective = TurnsNan(job.masking.model, nothing)
    with pytest.raises(RunError, match=r"not finite at step 4 \(epoch 2\).*lower.*lr"):
        fit(job)
    tensors, header = read_checkpoint(job.checkpoint)
    assert header["at"]["epoch"] == 1
    assert all(value.isfinite().all() for value in tensors.values())
    # What is kept can be gone on from.
    assert len(fit(make_job(tmp_path))) == 2


@pytest.mark.parametrize("kind", ["pretrain", "scores"])
def test_weights_that_are_not_finite_stop_it_too(tmp_path, kind):
    def harm(optimizer):
        step = optimizer.step

        def broken():
            step()
            optimizer.param_groups[0]["params"][0].data.view(-1)[0] = float("inf")

        optimizer.step = broken
        return optimizer

    job = make_job(tmp_path, kind)
    job.optimizer = OptimizerChoice(lambda p: harm(sgd(p)), 0.1, lambda clock: 0.0)
    with pytest.raises(RunError, match="not finite"):
        fit(job)
    assert not job.checkpoint.exists()


def test_too_few_images_are_told(tmp_path):
    with pytest.raises(UserError, match="no training batch"):
        fit(make_job(tmp_path, train=make_split(1, 1)))


def test_nothing_to_train_is_told(tmp_path):
    job = make_job(tmp_path)
    job.masking.parameters = list
    with pytest.raises(RunError, match="nothing to train"):
        fit(job)
