"""Sweeps: combinations, their names, and what `--set` does to them."""

import re
import textwrap

import pytest

from prunekit.recipe.toml.document import load_recipe
from prunekit.recipe.toml.sweep import label, unroll

RECIPE = """\
dataset = { use = "npz", file = "a.npz", batch_size = 7 }
seed = 0
[[stage]]
kind = "pretrain"
optimizer = { use = "sgd", momentum = 0.5 }
[[stage]]
kind = "prune"
sparsity = 0.9
pruner = "score"
"""


def combine(tmp_path, sweep, settings=()):
    """(settings, data) of each combination, and the problems without the file's name."""
    path = tmp_path / "r.toml"
    path.write_text(RECIPE + textwrap.dedent(sweep))
    problems = []
    found = list(unroll(load_recipe(path, settings), problems))
    return found, [f"{p.place.line}: {p.message}" for p in problems]


def test_no_sweep_is_one_combination_of_nothing(tmp_path):
    ((settings, recipe),), problems = combine(tmp_path, "")
    assert (settings, problems) == ({}, [])
    assert recipe.data["seed"] == 0


@pytest.mark.parametrize(
    "sweep",
    [
        '[sweep]\n"prune.sparsity" = [0.9, 0.95]\nseed = [0, 1, 2]\n',
        "[sweep]\nprune.sparsity = [0.9, 0.95]\nseed = [0, 1, 2]\n",
        "[sweep]\nseed = [0, 1, 2]\n[sweep.prune]\nsparsity = [0.9, 0.95]\n",
    ],
)
def test_every_combination_is_a_run(tmp_path, sweep):
    found, problems = combine(tmp_path, sweep)
    assert problems == []
    assert sorted((r.data["stage"][1]["sparsity"], r.data["seed"]) for _, r in found) == [
        (0.9, 0), (0.9, 1), (0.9, 2), (0.95, 0), (0.95, 1), (0.95, 2)
    ]  # fmt: skip
    assert all("sweep" not in r.data for _, r in found)


def test_cases_set_things_together_with_every_combination(tmp_path):
    found, problems = combine(
        tmp_path,
        """\
        [sweep]
        seed = [0, 1]
        [[sweep.case]]
        "prune.pruner" = "score"
        [[sweep.case]]
        prune.pruner = "lwm"
        "pretrain.epochs" = 5
        """,
    )
    assert problems == []
    assert [settings for settings, _ in found] == [
        {"seed": 0, "prune.pruner": "score"},
        {"seed": 1, "prune.pruner": "score"},
        {"seed": 0, "prune.pruner": "lwm", "pretrain.epochs": 5},
        {"seed": 1, "prune.pruner": "lwm", "pretrain.epochs": 5},
    ]


def test_another_component_drops_the_options_of_the_old_one(tmp_path):
    found, _ = combine(tmp_path, '[sweep]\n"pretrain.optimizer" = ["adam"]\ndataset = ["digits"]\n')
    data = found[0][1].data
    assert data["stage"][0]["optimizer"] == "adam"
    assert data["dataset"] == {"use": "digits", "batch_size": 7}


def test_a_component_is_set_before_its_options_in_whatever_order(tmp_path):
    found, problems = combine(
        tmp_path, '[sweep]\n"pretrain.optimizer.lr" = [1]\n"pretrain.optimizer" = ["adam"]\n'
    )
    assert problems == []
    assert found[0][1].data["stage"][0]["optimizer"] == {"use": "adam", "lr": 1}


def test_a_combination_that_is_there_twice_runs_once(tmp_path):
    found, _ = combine(tmp_path, "[sweep]\nseed = [0, 1, 0]\n")
    assert [settings["seed"] for settings, _ in found] == [0, 1]


def test_combinations_do_not_share_tables(tmp_path):
    found, _ = combine(tmp_path, '[sweep]\n"pretrain.optimizer.lr" = [1, 2]\n')
    found[0][1].data["stage"][0]["optimizer"]["lr"] = 99
    assert found[1][1].data["stage"][0]["optimizer"]["lr"] == 2


NOTHING = "'prun.x' names no stage and no section; did you mean 'prune'?"


@pytest.mark.parametrize(
    ("sweep", "problem"),
    [
        ("[sweep]", '10: [sweep] lists no values; write "prune.sparsity" = [0.9, 0.95]'),
        ("[sweep]\nseed = 3", "11: seed must be a list of values to try; write [3, ...]"),
        ("[sweep]\nseed = []", "11: seed lists no values to try; add some, or remove it"),
        ("[sweep.prune]\nbn = 1", "11: prune.bn must be a list of values to try; write [1, ...]"),
        (
            "[sweep.case]\nseed = 3",
            "10: each case of a sweep is a table of its own; write [[sweep.case]]",
        ),
        ('[sweep]\n"prun.x" = [1, 2]', f"11: {NOTHING}"),
        ("[[sweep.case]]\nseed = 1\n[[sweep.case]]\nprun.x = 1", f"13: {NOTHING}"),
    ],
)
def test_a_sweep_that_is_wrong_says_where_and_what_to_write(tmp_path, sweep, problem):
    _, problems = combine(tmp_path, sweep)
    assert set(problems) == {problem}


def test_a_swept_value_is_located_in_the_sweep(tmp_path):
    found, _ = combine(tmp_path, "[sweep]\nseed = [\n  1,\n  2,\n]\n")
    assert [r.locate(("seed",)).line for _, r in found] == [12, 13]


SWEEP = """\
[sweep]
"prune.pruner" = ["score", "lwm"]
seed = [0, 1]
"""


def test_set_decides_what_would_be_swept(tmp_path):
    found, _ = combine(tmp_path, SWEEP, ["seed=5"])
    assert [s for s, _ in found] == [{"prune.pruner": "score"}, {"prune.pruner": "lwm"}]
    assert {r.data["seed"] for _, r in found} == {5}


def test_set_of_all_that_is_swept_leaves_a_single_run(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(RECIPE + SWEEP)
    recipe = load_recipe(path, ["seed=5", "prune.pruner.use=lwm"])
    assert "sweep" not in recipe.data
    ((settings, _),) = unroll(recipe, [])
    assert settings == {}


def test_set_holds_although_a_sweep_replaces_the_component(tmp_path):
    found, _ = combine(tmp_path, SWEEP, ["prune.pruner.warm=3"])
    assert [r.data["stage"][1]["pruner"] for _, r in found[::2]] == [
        {"use": "score", "warm": 3},
        {"use": "lwm", "warm": 3},
    ]


def test_set_goes_before_cases(tmp_path):
    sweep = "[[sweep.case]]\nseed = 1\nprune.sparsity = 0.5\n[[sweep.case]]\nseed = 2\n"
    found, _ = combine(tmp_path, sweep, ["seed=9"])
    assert [(s, r.data["seed"]) for s, r in found] == [({"prune.sparsity": 0.5}, 9), ({}, 9)]


# Labels


@pytest.mark.parametrize(
    ("combinations", "labels"),
    [
        ([{}], ["run"]),
        ([{"prune.sparsity": 0.9, "seed": 0}], ["sparsity=0.9,seed=0"]),
        ([{"a.epochs": 1, "b.epochs": 2}], ["a.epochs=1,b.epochs=2"]),
        ([{"p.pruner": {"use": "x", "k": 2}}], ["pruner=x+k=2"]),
        ([{"e.with": ["clean", {"use": "pgd", "steps": 3}]}], ["with=clean+pgd+steps=3"]),
        ([{"t.eps": "8/255"}, {"t.eps": "8_255"}], ["eps=8_255", "eps=8_255+"]),
        ([{"d.file": "../ü x\n"}], ["file=..___x_"]),
        ([{"p.optimizer": {"lr": 0.1}}], ["optimizer=lr=0.1"]),
    ],
)
def test_labels(combinations, labels):
    assert label(combinations) == labels


def test_labels_are_folder_names_of_their_own(tmp_path):
    long = [{"a.b": "x" * 300 + end} for end in ("1", "2", "3")]
    labels = label(long)
    assert len(set(labels)) == 3
    for name in labels:
        assert re.fullmatch(r"[A-Za-z0-9_.=,+-]+", name)
        (tmp_path / name).mkdir()


def test_a_sweep_is_counted_before_it_is_unrolled(tmp_path):
    values = list(range(1001))
    sweep = f'[sweep]\nseed = {values}\n"prune.sparsity" = {values}\n"pretrain.epochs" = {values}\n'
    found, problems = combine(tmp_path, sweep)
    assert found == []
    assert problems == [
        "10: [sweep] has 1,003,003,001 combinations, and at most 10,000 are taken; split it into "
        "recipes"
    ]


def test_labels_of_many_like_combinations_differ_and_stay_short():
    labels = label([{"x": "a" * 200} for _ in range(2000)])
    assert len(set(labels)) == 2000
    assert labels[:3] == ["x=" + "a" * 118, "x=" + "a" * 118 + "+", "x=" + "a" * 118 + "++"]
    assert max(map(len, labels)) < 130
