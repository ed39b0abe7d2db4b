"""The smoothing plugin: losses, bounds against exact sums, sampling, certificates, resume."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import prunekit_smoothing
import prunekit_smoothing.certify
import pytest
import torch
from prunekit_smoothing import CertifyOptions, SmoothingOptions, plan_looks, reach
from prunekit_smoothing.bounds import (
    certified_radius,
    log_evidence,
    lower_bound,
    needed,
    upper_bound,
)
from prunekit_smoothing.certify import Certify, Tally
from prunekit_smoothing.sampling import NO_CLASS, Chunk, Sampler
from scipy.special import ndtr
from scipy.stats import binom
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.catalog.component import Use
from prunekit.contexts import EvaluatorContext
from prunekit.contracts import Clock
from prunekit.errors import Interrupted, OptionError
from prunekit.testing import example_context

CLOCK = Clock(0, 1, 0, 1)
COMPONENTS = {
    component.name: component
    for declare in (prunekit_smoothing.prunekit_objectives, prunekit_smoothing.prunekit_evaluators)
    for component in declare()
}


def build(name: str, model: nn.Module | None = None, context: Any = (), **options: Any) -> Any:
    """Build as the core does: from the declaration."""
    component = COMPONENTS[name]
    use: Use[Any] = Use(component, component.options(**options))
    return use.build(example_context(EvaluatorContext, model=model, **dict(context)))


def make_net() -> nn.Module:
    """A float64 net of (B, 1, 4, 4), in train mode, whose batch norm differs between the modes."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    ).double()


def make_batch(n: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.rand(n, 1, 4, 4, dtype=torch.float64), torch.arange(n) % 3


class Linear(nn.Module):
    """Logits (w.v, -w.v) with v = x - 1/2, counting images. Smoothed, it has known probabilities.

    w has length 1, so that an image at w.v = d is of class 0 with probability Phi(d / sigma).
    """

    def __init__(self, fail: float | None = None) -> None:
        super().__init__()
        self.register_buffer("w", F.normalize(torch.arange(1.0, 17.0), dim=0))
        self.calls, self.images, self.fail = 0, 0, fail
        self.shapes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.images += len(x)
        self.shapes.append(len(x))
        margin = (x.flatten(1) - 0.5) @ self.w.to(x.dtype)
        if self.fail is not None:
            margin = margin.where(margin < self.fail, float("nan"))
        return torch.stack([margin, -margin], 1)

    def at(self, distances: Any) -> Tensor:
        """Images so far on the side of class 0, (B, 1, 4, 4)."""
        d = torch.as_tensor(distances, dtype=torch.float32)
        return (0.5 + d[:, None] * self.w).reshape(-1, 1, 4, 4)


def certify(model: nn.Module, x: Tensor, y: Tensor, size: int = 4, **options: Any) -> Any:
    evaluate = build("certify", model, **options)
    return evaluate(model, zip(x.split(size), y.split(size), strict=True))


# --- training ------------------------------------------------------------------------------------


def test_stability_training_is_cross_entropy_and_kl_to_the_noisy_prediction() -> None:
    model, (x, y) = make_net(), make_batch()
    twin = copy.deepcopy(model)
    torch.manual_seed(5)
    loss = build("smoothing", model, sigma=0.5, beta=3.0)(x, y, CLOCK)
    torch.manual_seed(5)
    noise = torch.randn_like(x)
    clean = twin(x)
    p = clean.softmax(1)
    q = twin(x + 0.5 * noise).softmax(1)
    natural = -p.log()[range(6), y].mean()
    stability = (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(loss.value, natural + 3 * stability)
    torch.testing.assert_close(loss.terms["natural"], natural.detach())
    torch.testing.assert_close(loss.terms["stability"], stability.detach())
    torch.testing.assert_close(loss.logits, clean.detach())
    (natural + 3 * stability).backward()  # through both arguments of the KL
    loss.value.backward()
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    # x first, then the noisy images: running statistics are those of two forwards in that order.
    assert int(model[1].num_batches_tracked) == 2
    torch.testing.assert_close(model[1].running_mean, twin[1].running_mean)


def test_noise_training_is_cross_entropy_on_the_noisy_images() -> None:
    model, (x, y) = make_net(), make_batch()
    torch.manual_seed(5)
    loss = build("smoothing", model, sigma=0.5, loss="noise", label_smoothing=0.3)(x, y, CLOCK)
    torch.manual_seed(5)
    logits = model(x + 0.5 * torch.randn_like(x))
    log = logits.log_softmax(1)
    expected = -(0.7 * log[range(6), y] + 0.3 * log.mean(1)).mean()
    torch.testing.assert_close(loss.value, expected)
    torch.testing.assert_close(loss.logits, logits.detach())


def test_noise_is_not_clamped() -> None:
    seen = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.flatten(1)[:, :3]

    x, y = torch.ones(200, 1, 4, 4), torch.zeros(200, dtype=torch.long)
    build("smoothing", Spy(), sigma=0.25)(x, y, CLOCK)
    assert torch.equal(seen[0], x)
    noise = seen[1] - 1
    assert float(noise.std()) == pytest.approx(0.25, rel=0.05)
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert (noise > 0).float().mean() == pytest.approx(0.5, abs=0.05)


def test_validation_averages_the_noisy_copies_of_each_image() -> None:
    model = Linear().eval()
    x, y = model.at([10.0, -10.0, 0.0]), torch.zeros(3, dtype=torch.long)
    torch.manual_seed(0)
    found = build("smoothing", model, validation_draws=200).validate(x, y)
    assert found["accuracy"].tolist() == [1, 0, 1]
    assert found["noisy_accuracy"][:2].tolist() == [1, 0]
    assert float(found["noisy_accuracy"][2]) == pytest.approx(0.5, abs=0.12)
    assert model.calls == 201


def test_beta_belongs_to_stability_training() -> None:
    assert SmoothingOptions().beta == 6.0
    assert SmoothingOptions(beta=0.0).beta == 0
    assert SmoothingOptions(loss="noise").beta is None
    with pytest.raises(OptionError, match="remove beta"):
        SmoothingOptions(loss="noise", beta=1.0)
    passes = COMPONENTS["smoothing"].forward_passes
    assert [passes(SmoothingOptions(loss=loss)) for loss in ("stability", "noise")] == [2, 1]


# --- bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 100, 1000])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_fixed_bounds_cover(n: int, alpha: float) -> None:
    """Summing the binomial's probabilities exactly: the bound is above p with alpha at most."""
    counts = np.arange(n + 1)
    lower = np.array([lower_bound(k, n, alpha) for k in counts])
    upper = np.array([upper_bound(k, n, alpha) for k in counts])
    assert (np.diff(lower) > 0).all()
    # p next to each possible bound, where the coverage is worst, and a grid.
    grid = np.unique(np.r_[lower - 1e-9, lower + 1e-9, np.linspace(0, 1, 101)].clip(0, 1))
    for p in grid:
        pmf = binom.pmf(counts, n, p)
        assert pmf[lower > p].sum() <= alpha * (1 + 1e-6)
        assert pmf[upper < p].sum() <= alpha * (1 + 1e-6)
    # And no more cautious than that: right below a bound all of alpha is used.
    k = n // 2 + 1
    assert binom.sf(k - 1, n, lower[k]) == pytest.approx(alpha, rel=1e-6)


def test_bounds_at_the_edges() -> None:
    assert lower_bound(0, 10, 0.05) == 0
    assert upper_bound(10, 10, 0.05) == 1
    assert lower_bound(10_000, 10_000, 0.001) == pytest.approx(0.001**1e-4, rel=1e-12)
    assert upper_bound(0, 50, 0.05) == pytest.approx(1 - 0.05 ** (1 / 50), rel=1e-12)
    assert certified_radius(0.5, 0.25) == 0
    assert certified_radius(0.0, 0.25) == -math.inf
    assert certified_radius(float(ndtr(2.0)), 0.25) == pytest.approx(0.5)


def test_looks_of_sequential_sampling() -> None:
    assert plan_looks(CertifyOptions()) == (10_000,)
    looks = plan_looks(CertifyOptions(sequential=True))
    assert looks[:3] == (100, 200, 300)
    assert looks[-5:] == (8500, 8900, 9300, 9700, 10_000)
    assert plan_looks(CertifyOptions(n=100, radii=(0.01,), sequential=True)) == (100,)
    assert plan_looks(CertifyOptions(n=150, radii=(0.01,), sequential=True)) == (100, 150)
    assert plan_looks(CertifyOptions(n=10_050, sequential=True))[-2:] == (9700, 10_050)


def test_evidence_by_hand() -> None:
    """Two of three hit, p = 1/2: 0.3 times the mean over q in (1/2, 1) of q^2 (1 - q), by 1/8."""
    mean = 2 * ((1 / 3 - 1 / 4) - (1 / 24 - 1 / 64))
    assert log_evidence(2, 3, 0.5) == pytest.approx(math.log(0.3 * 8 * mean))
    assert log_evidence(1, 3, 0.5) == log_evidence(0, 0, 0.5) == -math.inf


@pytest.mark.parametrize("radius", [0.0, 0.1, 110 / 255, 0.7])
def test_what_a_radius_needs_certifies_it_and_hardly_less_does(radius: float) -> None:
    p = needed(radius, 0.25)
    assert certified_radius(p, 0.25) >= radius > certified_radius(p - 1e-12, 0.25)


def simulate(p: float, runs: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The sequential rule on binomial samples instead of images: (bounds, samples used)."""
    rule = Certify(CertifyOptions(sequential=True, **options), 0)
    steps = np.diff(rule.looks, prepend=0)
    hits = np.random.default_rng(0).binomial(steps, p, (runs, len(steps))).cumsum(1)
    bounds, used = np.empty(runs), np.empty(runs)
    for run, row in enumerate(hits):
        tally = Tally(0)
        for tally.samples, k in zip(rule.looks, row, strict=True):
            tally.hits = int(k)
            rule._decide(tally)
            if tally.decided:
                break
        bounds[run], used[run] = tally.lower, tally.samples
    return bounds, used


@pytest.mark.parametrize("radius", [0.0, 0.1, 0.25, 0.4])
def test_sequential_rule_certifies_wrongly_with_alpha_at_most(radius: float) -> None:
    """p just below each threshold, where errors are likeliest; one bound serves all radii."""
    p = float(ndtr(radius / 0.25)) - 1e-6
    runs, alpha = 4000, 0.05
    radii = (0.1, 0.25, 0.4)
    bounds, _ = simulate(p, runs, n=2000, alpha=alpha, radii=radii)
    wrong = int((bounds > p).sum())
    # At an error rate of alpha, more than this many come with probability 1e-4.
    assert wrong <= binom.isf(1e-4, runs, alpha)
    assert wrong > 0  # the looks do spend alpha


def test_repeated_looks_at_the_fixed_bound_would_not_hold() -> None:
    """The test above can fail: with all of alpha at every look, errors are too many."""
    p = float(ndtr(1.0)) - 1e-6
    looks = plan_looks(CertifyOptions(n=2000, alpha=0.05, radii=(0.25,), sequential=True))
    steps = np.diff(looks, prepend=0)
    hits = np.random.default_rng(0).binomial(steps, p, (4000, len(steps))).cumsum(1)
    naive = [[lower_bound(int(k), n, 0.05) > p for k, n in zip(row, looks, strict=True)]
             for row in hits]  # fmt: skip
    assert np.any(naive, axis=1).sum() > binom.isf(1e-4, 4000, 0.05)


def test_sequential_sampling_saves_most_where_the_answer_is_clear() -> None:
    _, sure = simulate(0.9999, 200, radii=(0.25,))
    _, hopeless = simulate(0.3, 200, radii=(0.25,))
    _, close = simulate(float(ndtr(1.0)) + 0.01, 200, radii=(0.25,))
    assert sure.mean() < 150
    assert hopeless.mean() < 250
    assert 1000 < close.mean() < 10_000


def test_futility_is_not_jumped_at() -> None:
    """It costs hardly a certificate that the last look alone would give."""
    p, runs = float(ndtr(1.0)) + 0.016, 400
    bounds, _ = simulate(p, runs, radii=(0.25,))
    level, least = math.log(1000), needed(0.25, 0.25)
    enough = next(k for k in range(10_001) if log_evidence(k, 10_000, least) >= level)
    last = float(binom.sf(enough - 1, 10_000, p))
    assert 0.3 < last < 0.9
    assert (bounds >= ndtr(1.0)).sum() >= binom.ppf(1e-3, runs, last)


# --- sampling ------------------------------------------------------------------------------------


def sample(model: nn.Module, x: Tensor, chunks: list[Chunk], batch: int, seed: int = 0) -> Any:
    sampler = Sampler(model, 0.25, seed, batch)
    return {c: classes for found in sampler.sample(x, chunks, "estimate") for c, classes in found}


def test_a_chunk_does_not_depend_on_its_company() -> None:
    model = Linear()
    x = model.at([0.1, 0.0, -0.1])
    chunks = [Chunk(row, 7 + row, k, 100) for row in range(3) for k in range(4)]
    alone = {c: sample(model, x, [c], 100)[c] for c in chunks}
    for batch in (30, 100, 250, 1000, 5000):
        found = sample(model, x, chunks[::-1], batch)
        assert all(torch.equal(found[c], alone[c]) for c in chunks)
    drawn = {tuple(classes.tolist()) for classes in alone.values()}
    assert len(drawn) == len(chunks)  # no chunk is another's
    other = sample(model, x, chunks, 1000, seed=1)
    assert not any(torch.equal(other[c], alone[c]) for c in chunks)
    model.shapes.clear()
    sample(model, x, chunks, 250)
    assert model.shapes == [200] * 6
    model.shapes.clear()
    sample(model, x, chunks[:1], 30)
    assert model.shapes == [30, 30, 30, 10]


def test_samples_have_the_probability_that_they_should() -> None:
    model, sigma = Linear(), 0.25
    distances = [-0.3, 0.0, 0.1, 0.5]
    chunks = [Chunk(row, row, k, 100) for row in range(4) for k in range(200)]
    found = sample(model, model.at(distances), chunks, 1000)
    for row, d in enumerate(distances):
        hits = sum(int((found[c] == 0).sum()) for c in chunks if c.row == row)
        low, high = binom.interval(1 - 1e-4, 20_000, ndtr(d / sigma))
        assert low <= hits <= high


def test_outputs_that_are_no_numbers_are_misses() -> None:
    model = Linear(fail=0.0)  # where it would say class 0, it fails
    (found,) = sample(model, model.at([0.0]), [Chunk(0, 0, 0, 1000)], 100).values()
    assert set(found.tolist()) == {NO_CLASS, 1}
    x, y = model.at([2.0, -2.0]), torch.tensor([0, 1])
    result = certify(model, x, y, n=1000, radii=(0.25,))
    assert result.records["count"].tolist() == [0, 1000]
    assert result.records["abstained"].tolist() == [True, False]
    assert result.records["correct"].tolist() == [False, True]


# --- certificates --------------------------------------------------------------------------------


def test_certified_radius_of_a_linear_network_is_below_the_true_one() -> None:
    model = Linear()
    distances = np.linspace(-0.5, 1.0, 40)
    x, y = model.at(distances), torch.zeros(40, dtype=torch.long)
    for sequential in (False, True):
        # Noise of this seed; wrong for one of 40 images with probability 0.04 at most.
        result = certify(model, x, y, n=2000, radii=(0.25, 0.5), sequential=sequential)
        records = result.records
        # The smoothed network is the network: class 0 where d > 0, robust within |d|.
        assert (records["radius"] <= np.abs(distances)).all()
        sure = np.abs(distances) > 0.1
        assert (records["prediction"] == (distances < 0))[sure].all()
        assert records["abstained"][np.abs(distances) < 0.01].all()
        assert not records["abstained"][sure].any()
        tight = (np.abs(distances) > 0.56) & (np.abs(distances) < 0.7)
        assert (records["radius"][tight] >= (0.5 if sequential else 0.47)).all()
        right = (records["prediction"] == 0) & ~records["abstained"]
        assert (records["correct"] == right).all()
        certified = (right & (records["radius"] >= 0.25)).mean()
        assert result.metrics["certified@0.25"] == pytest.approx(certified)
        found = result.metrics["certified@0.25"]
        assert found.low < certified < found.high
        assert result.metrics["accuracy"] == pytest.approx(right.mean())
        assert result.metrics["abstained"] == pytest.approx(records["abstained"].mean())
        assert result.metrics["accuracy"].n == 40
        assert result.metrics["sigma"] == 0.25
        assert (result.metrics["alpha"], result.metrics["n0"]) == (0.001, 100)


def test_images_whose_samples_all_agree_have_the_largest_radius() -> None:
    model = Linear()
    result = certify(model, model.at([9.0, 9.0, -9.0]), torch.zeros(3, dtype=torch.long))
    assert result.records["count"].tolist() == [10_000] * 3
    assert result.records["samples"].tolist() == [10_000] * 3
    largest = 0.25 * 3.1986  # Phi^-1(0.001 ** (1 / 10,000)) = 3.1986
    assert result.records["radius"] == pytest.approx([largest] * 3, abs=1e-4)
    assert largest < 0.80
    assert reach(CertifyOptions()) == pytest.approx(result.records["radius"][0], rel=1e-9)
    assert result.records["prediction"].tolist() == [0, 0, 1]
    assert result.metrics["acr"] == pytest.approx(2 / 3 * largest, abs=1e-4)
    assert result.metrics["certified@0.75"] == pytest.approx(2 / 3)
    assert result.metrics["accuracy"] == pytest.approx(2 / 3)
    assert result.records["precision"].tolist() == ["float32"] * 3
    assert model.images == 3 * 10_100


def test_precision_is_that_of_the_network_that_was_sampled() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    x, y = torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.long)
    options: dict[str, Any] = {"n": 100, "radii": (0.1,)}
    assert set(certify(net, x, y, **options).records["precision"]) == {"float32"}
    with torch.autocast("cpu", torch.bfloat16):
        assert set(certify(net, x, y, **options).records["precision"]) == {"bfloat16"}
    assert set(certify(net.double(), x.double(), y, **options).records["precision"]) == {"float64"}


def test_sequential_sampling_agrees_with_the_fixed_number_and_takes_less() -> None:
    distances = np.linspace(-1, 1, 60)
    y = torch.zeros(60, dtype=torch.long)
    results, images = [], []
    for sequential in (False, True):
        model = Linear()
        options: dict[str, Any] = {"radii": (0.25, 0.5), "sequential": sequential, "batch": 1000}
        results.append(certify(model, model.at(distances), y, size=20, **options))
        images.append(model.images)
    fixed, quick = results
    for r in (0, 0.25, 0.5):
        verdicts = [res.records["correct"] & (res.records["radius"] >= r) for res in results]
        assert (verdicts[0] == verdicts[1]).mean() >= 0.96
        assert not (verdicts[1] & ~verdicts[0]).any()
    assert images[1] == 60 * quick.metrics["passes"]
    assert quick.metrics["passes"] < fixed.records["samples"].mean() / 4
    assert set(quick.records["radius"]) == {0, 0.25, 0.5}
    assert "acr" not in quick.metrics
    assert "passes" not in fixed.metrics


@pytest.mark.parametrize("sequential", [False, True])
def test_result_depends_neither_on_batches_nor_on_forward_passes(sequential: bool) -> None:
    model = Linear()
    x, y = model.at(np.linspace(-0.3, 0.5, 11)), torch.zeros(11, dtype=torch.long)
    options: dict[str, Any] = {"n": 1030, "n0": 130, "radii": (0.1, 0.2), "alpha": 1e-5}
    options["sequential"] = sequential
    results = [
        certify(model, x, y, size=size, batch=batch, **options)
        for size, batch in ((11, 100), (1, 100), (4, 1000), (11, 37))
    ]
    for other in results[1:]:
        assert other.metrics == results[0].metrics
        for name, record in results[0].records.items():
            np.testing.assert_array_equal(record, other.records[name])
    assert max(results[0].records["samples"]) == 1030


class Killed(Exception):
    """The process ends here."""


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("batch", [100, 300])
def test_an_evaluation_cut_at_every_forward_pass_gives_the_same_result(
    sequential: bool, batch: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prunekit_smoothing.certify, "SAVE_SECONDS", 0.0)
    options: dict[str, Any] = {
        "n": 730, "radii": (0.1, 0.3), "sequential": sequential, "batch": batch,
    }  # fmt: skip
    distances = [0.02, 0.6, -0.1, 0.3, 0.12]
    y = torch.zeros(5, dtype=torch.long)
    whole, model = Linear(), Linear()
    expected = certify(whole, whole.at(distances), y, size=4, **options)
    x = model.at(distances)
    batches = list(zip(x.split(4), y.split(4), strict=True))

    def cut() -> None:
        raise Killed

    cuts, kept = 0, tmp_path / "certify.json"
    states = set()
    while True:
        cutting = {"scratch": tmp_path, "pause": cut}
        try:
            found = build("certify", model, cutting, **options)(model, batches)
            break
        except Killed:
            cuts += 1
            states.add(kept.read_text())
    assert len(states) == cuts > (10 if batch == 100 else 4)  # every start got on
    assert found.metrics == expected.metrics
    for name, record in expected.records.items():
        np.testing.assert_array_equal(record, found.records[name])


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"done": [{}], "group": [], "look": 0}',
        '{"done": [], "group": [{"prediction": 0, "hits": 2, "samples": 1}], "look": 0}',
        '{"done": [], "group": [{"prediction": 0, "hits": "1", "samples": 1}], "look": 0}',
        '{"done": [], "group": [{"prediction": 0}], "look": 9}',
    ],
)
def test_damaged_counts_are_told_and_drawn_again(content: str, tmp_path: Any) -> None:
    model = Linear()
    batches = [(model.at([0.3, 0.02]), torch.zeros(2, dtype=torch.long))]
    expected = build("certify", model, {}, n=200, radii=(0.1,))(model, batches)
    (tmp_path / "certify.json").write_text(content)
    with pytest.warns(match=r"certify\.json is damaged .* computed again"):
        found = build("certify", model, {"scratch": tmp_path}, n=200, radii=(0.1,))(model, batches)
    assert found.metrics == expected.metrics


def test_no_sample_is_drawn_twice_after_a_kill(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prunekit_smoothing.certify, "SAVE_SECONDS", 0.0)
    model = Linear()
    batches = [(model.at([0.3, 0.3]), torch.zeros(2, dtype=torch.long))]
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise Interrupted

    context = {"scratch": tmp_path, "pause": stop}
    with pytest.raises(Interrupted):
        build("certify", model, context, n=1000, radii=(0.1,))(model, batches)
    assert model.images == 900  # 100 of both that choose, 700 of the first that count
    found = build("certify", model, context, n=1000, radii=(0.1,))(model, batches)
    assert model.images == 2200
    assert found.records["samples"].tolist() == [1000, 1000]


def test_counts_are_not_written_at_every_step(tmp_path: Any) -> None:
    model = Linear()
    batches = [(model.at([0.3, 0.3]), torch.zeros(2, dtype=torch.long))]
    build("certify", model, {"scratch": tmp_path}, n=500, radii=(0.1,))(model, batches)
    assert list(tmp_path.iterdir()) == []  # it took less than SAVE_SECONDS


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"radii": ()}, "name a radius"),
        ({"radii": (0.25, 0.25)}, "two radii are 0.25"),
        ({"radii": (0.25, 1.0)}, "up to 0.7996, but not 1;"),
        ({"radii": (0.25,), "n": 11}, "increase n"),
        ({"radii": (0.798,), "sequential": True}, "up to 0.796"),
    ],
)
def test_radii_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        CertifyOptions(**options)


def test_forward_passes_are_told_beforehand() -> None:
    assert COMPONENTS["certify"].forward_passes(CertifyOptions()) == 10_100
