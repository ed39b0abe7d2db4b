"""What tells runs apart: whatever differs in their resolved recipes, and the folder at last."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from prunekit.errors import UserError
from prunekit.results.choosing import choose
from prunekit.results.comparison import Row, compare
from prunekit.results.tables import tabulate, to_csv, to_json
from prunekit.store.records import find_runs

SGD = {"use": "sgd", "lr": 0.1, "momentum": 0.9}
RECIPE: dict[str, Any] = {
    "dataset": {"use": "digits", "batch_size": 64},
    "architecture": {"use": "small-cnn"},
    "threat": {"norm": "linf", "eps": 8 / 255},
    "stage": [
        {"kind": "pretrain", "epochs": 2, "optimizer": SGD, "objective": {"use": "trades"}},
        {"kind": "evaluate", "name": "dense", "with": [{"use": "pgd", "steps": 5}]},
        {"kind": "prune", "pruner": {"use": "lwm"}, "sparsity": 0.9},
        {"kind": "finetune", "wrap": [], "optimizer": SGD, "objective": {"use": "trades"}},
        {"kind": "evaluate", "name": "pruned", "with": [{"use": "pgd", "steps": 5}]},
    ],
}


@pytest.fixture
def write(tmp_path: Path, write_run, evaluate):
    """Writes a finished run whose recipe has other values at some key paths."""

    def write(
        folder: str,
        changes: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        keys: tuple[str, str] = ("d", ""),
        name: str = "r",
    ) -> Path:
        recipe = copy.deepcopy(RECIPE)
        for path, value in (changes or {}).items():
            *words, last = (int(w) if w.isdigit() else w for w in path.split("."))
            here: Any = recipe
            for word in words:
                here = here[word]
            here[last] = value
        stages = [
            evaluate(keys[0], 0.8, 0.0, name="dense"),
            {"name": "finetune", "kind": "finetune", "key": folder,
             "metrics": {"select": "accuracy", "validation.accuracy": 0.5}},
            evaluate(keys[1] or folder, 0.5, 0.9, name="pruned"),
        ]  # fmt: skip
        made = write_run(tmp_path / folder, settings or {}, *stages, name=name)
        (made / "recipe.toml").write_text(tomli_w.dumps({"name": name, "seed": 0, **recipe}))
        return made

    return write


def rows_of(folder: Path, stage: str = "pruned") -> list[Row]:
    return [row for row in compare(find_runs(folder)) if row.stage == stage]


@pytest.mark.parametrize(
    ("path", "address", "values"),
    [
        ("stage.3.optimizer", "finetune.optimizer.lr", (0.1, 0.01)),
        ("stage.0.epochs", "pretrain.epochs", (2, 3)),
        ("threat.eps", "threat.eps", (8 / 255, 0.1)),
        ("stage.4.with.0.steps", "pgd.steps", (5, 7)),
        ("dataset.batch_size", "dataset.batch_size", (64, 32)),
        ("stage.2.pruner.use", "prune.pruner", ("lwm", "snip")),
    ],
)
def test_whatever_differs_is_a_column(
    path: str, address: str, values: tuple[Any, Any], tmp_path: Path, write
) -> None:
    other: Any = values[1]
    write("a")
    write("b", {path: {**SGD, "lr": other} if path.endswith("optimizer") else other})
    rows = rows_of(tmp_path)
    assert [row.settings for row in rows] == [{address: value} for value in values]
    title = address.rpartition(".")[2]
    assert title in tabulate(rows)[0][1]
    assert to_json(rows)["rows"][1]["settings"] == {address: other}
    assert address in to_csv(rows).splitlines()[0].split(",")


def test_a_shared_dense_result_has_no_settings_of_later_stages(tmp_path: Path, write) -> None:
    write("a")
    write("b", {"stage.3.optimizer": {**SGD, "lr": 0.01}})
    dense, *pruned = compare(find_runs(tmp_path))
    assert dense.settings == {"finetune.optimizer.lr": None}
    assert dense.runs == (tmp_path / "a", tmp_path / "b")
    assert len(pruned) == 2


def test_what_a_later_choice_shares_keeps_its_labels(tmp_path: Path, write) -> None:
    # The same weights in two files: one stored result, two settings that it depends on.
    for name in ("a", "b"):
        write(name, {"architecture.init": f"/w/{name}.safetensors"}, keys=("d", "p"))
    rows = rows_of(tmp_path)
    assert [row.settings["architecture.init"] for row in rows] == [
        "/w/a.safetensors",
        "/w/b.safetensors",
    ]


def test_a_run_beside_a_sweep_keeps_its_name_and_pruner(tmp_path: Path, write) -> None:
    for pruner in ("score", "random"):
        write(f"s/{pruner}", {"stage.2.pruner.use": pruner}, {"prune.pruner": {"use": pruner}})
    (tmp_path / "s/plan.json").write_text("{}")
    write("one", name="alone", keys=("d", "s/score"))
    told = {tuple(row.settings.values()) for row in rows_of(tmp_path)}
    assert told == {("r", "score"), ("r", "random"), ("alone", "lwm")}
    assert {row.settings["name"] for row in rows_of(tmp_path, "dense")} == {"r", "alone"}


def test_what_follows_from_a_swept_component_is_no_column(tmp_path: Path, write) -> None:
    adam = {"use": "adam", "lr": 0.001, "betas": [0.9, 0.999]}
    for name, optimizer in (("adam", adam), ("sgd", SGD)):
        changes = {"stage.3.optimizer": optimizer, "stage.3.epochs": len(name)}
        write(f"s/{name}", changes, {"finetune.optimizer": optimizer["use"]})
    (tmp_path / "s/plan.json").write_text("{}")
    assert [row.settings for row in rows_of(tmp_path)] == [
        {"finetune.optimizer": "adam"},
        {"finetune.optimizer": "sgd"},
    ]


def test_two_processes_with_other_components_show_all_common_differences(
    tmp_path: Path, write
) -> None:
    write("a")
    write("b", {"stage.3.optimizer": {"use": "adam", "lr": 0.001}})
    columns = list(rows_of(tmp_path)[0].settings)
    # The momentum, which adam has not, says nothing more.
    assert columns == ["finetune.optimizer", "finetune.optimizer.lr"]


def test_wrappers_are_in_one_column_and_their_options_in_others(tmp_path: Path, write) -> None:
    ema, awp = {"use": "ema", "decay": 0.99}, {"use": "awp", "gamma": 0.01}
    write("a")
    for name, wrap in (("b", [ema]), ("c", [{**ema, "decay": 0.9}]), ("d", [awp, ema])):
        write(name, {"stage.3.wrap": wrap})
    decay = "finetune.wrap.ema.decay"
    expected = [
        {"finetune.wrap": [], decay: None},
        {"finetune.wrap": "ema", decay: 0.99},
        {"finetune.wrap": "ema", decay: 0.9},
        {"finetune.wrap": "awp, ema", decay: 0.99},
    ]
    rows = rows_of(tmp_path)
    assert [row.settings for row in rows] == expected
    assert [row["settings"] for row in to_json(rows)["rows"]] == expected
    assert [line[1:3] for line in tabulate(rows)] == [
        ["wrap", "decay"],
        ["none", "-"],
        ["ema", "0.99"],
        ["ema", "0.9"],
        ["awp, ema", "0.99"],
    ]


def test_a_sweep_names_wrappers_with_and_without_options(tmp_path: Path, write) -> None:
    s2ap: dict[str, Any] = {"use": "s2ap", "start": 1}
    ema = {"use": "ema", "decay": 0.99}
    cases = [
        ("score", [s2ap], [s2ap | {"gamma": 0.01}]),
        ("harp", ["ema"], [ema]),
        ("snip", ["ema", s2ap], [ema, s2ap | {"gamma": 0.01}]),
        ("radmm", None, []),
    ]
    for pruner, written, resolved in cases:
        swept = {"prune.pruner": pruner} | ({"prune.wrap": written} if written else {})
        changes = {"stage.2.pruner": {"use": pruner}, "stage.2.wrap": resolved}
        write(f"s/{pruner}", changes, swept)
    (tmp_path / "s/plan.json").write_text("{}")
    # That the others have no start follows from their wrappers.
    names = {row.settings["prune.pruner"]: row.settings for row in rows_of(tmp_path)}
    assert {pruner: settings["prune.wrap"] for pruner, settings in names.items()} == {
        "score": "s2ap",
        "harp": "ema",
        "snip": "ema, s2ap",
        "radmm": [],
    }
    assert {s.get("prune.wrap.s2ap.start") for s in names.values()} <= {1, None}


def test_a_sweep_of_evaluators_names_them(tmp_path: Path, write) -> None:
    pgd: dict[str, Any] = {"use": "pgd", "steps": 5}
    write("a", {"stage.4.with": [{"use": "clean"}]}, {"pruned.with": ["clean"]})
    write("b", {"stage.4.with": [{"use": "clean"}, pgd]}, {"pruned.with": ["clean", pgd]})
    found = [row.settings["evaluate.with"] for row in rows_of(tmp_path)]
    assert found == ["clean", "clean, pgd"]


def test_an_objective_of_all_stages_has_one_column(tmp_path: Path, write) -> None:
    write("a")
    both = ("stage.0.objective.use", "stage.3.objective.use")
    write("b", dict.fromkeys(both, "mart"))
    assert [row.settings for row in rows_of(tmp_path)] == [
        {"objective": "trades"},
        {"objective": "mart"},
    ]
    write("c", {both[0]: "mart"})
    assert set(rows_of(tmp_path)[0].settings) == {"pretrain.objective", "finetune.objective"}


def test_one_name_for_what_a_sweep_may_call_by_several(tmp_path: Path, write) -> None:
    write("a", {"stage.4.with.0.steps": 9}, {"pruned.pgd.steps": 9})
    write("b", {"stage.4.with.0.steps": 8}, {"pruned.with.pgd.steps": 8})
    write("c")
    found = {row.runs[0].name: row.settings for row in rows_of(tmp_path)}
    assert found == {"a": {"pgd.steps": 9}, "b": {"pgd.steps": 8}, "c": {"pgd.steps": 5}}


def test_the_folder_tells_apart_what_no_setting_does(tmp_path: Path, write) -> None:
    for folder in ("a", "b"):
        write(f"{folder}/x")
    assert [row.settings for row in rows_of(tmp_path)] == [
        {"folder": "a/x"},
        {"folder": "b/x"},
    ]


def test_the_same_sweep_twice_is_averaged_within_each_folder(tmp_path: Path, write) -> None:
    for plan in ("a", "b"):
        for seed in (0, 1):
            write(f"{plan}/{seed}", settings={"seed": seed}, keys=(f"d{seed}", ""))
        (tmp_path / plan / "plan.json").write_text("{}")
    found = [(row.settings["folder"], row.seeds) for row in rows_of(tmp_path)]
    assert found == [("a", (0, 1)), ("b", (0, 1))]


@pytest.mark.parametrize("text", ["", "a = ", "stage = 3", "stage = [1]", "x = " + "[" * 5000])
def test_a_recipe_that_says_nothing_leaves_the_settings(
    text: str, tmp_path: Path, write_run, evaluate
) -> None:
    for lr in (0.1, 0.01):
        made = write_run(tmp_path / str(lr), {"finetune.lr": lr}, evaluate(str(lr), 0.5, 0.9))
        (made / "recipe.toml").write_text(text)
    assert {row.settings["finetune.lr"] for row in rows_of(tmp_path, "evaluate")} == {0.1, 0.01}


def test_choosing_sees_what_set_changed(tmp_path: Path, write) -> None:
    for name, lr in (("a", 0.1), ("b", 0.01)):
        write(name, {"stage.3.optimizer": {**SGD, "lr": lr}})
    better = tmp_path / "b/run.json"
    better.write_text(
        better.read_text().replace('"validation.accuracy": 0.5', '"validation.accuracy": 0.6')
    )
    write("c", {"stage.2.pruner.use": "snip"})
    kept, choices = choose(find_runs(tmp_path), ["finetune.optimizer.lr"])
    assert {run.folder.name for run in kept} == {"b", "c"}
    assert [c.chosen for c in choices] == [{"finetune.optimizer.lr": lr} for lr in (0.01, 0.1)]
    assert json.dumps([dict(c.others) for c in choices])
    with pytest.raises(UserError, match=r"there are: finetune\.optimizer\.lr, prune\.pruner"):
        choose(find_runs(tmp_path), ["pgd.stepz"])
