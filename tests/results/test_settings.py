"""What a run was made with, as its folder says it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from prunekit.results.settings import read_settings

RECIPE = {
    "dataset": {"use": "digits", "batch_size": 8},
    "stage": [
        {"kind": "evaluate", "name": "first", "with": [{"use": "clean"}], "images": 5},
        {"kind": "pretrain", "name": "p", "epochs": 2, "objective": {"use": "trades", "beta": 6}},
        {"kind": "evaluate", "with": [{"use": "x:pgd", "name": "strong", "steps": 9}]},
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(RECIPE))
    return tmp_path


def test_a_result_depends_on_what_is_before_it(folder: Path) -> None:
    settings = read_settings(folder, {"seed": 3, "dataset.use": "digits"})
    first = {"dataset": "digits", "dataset.batch_size": 8}
    assert settings.of("first") == {**first, "clean": "clean", "evaluate.images": 5}
    assert settings.of("evaluate") == {
        **first,
        "p.epochs": 2,
        "p.objective": "trades",
        "p.objective.beta": 6,
        "strong": "x:pgd",
        "strong.steps": 9,
    }


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("pretrain.epochs", "p.epochs"),
        ("p.objective.use", "p.objective"),
        ("evaluate.with.strong.steps", "strong.steps"),
        ("strong.steps", "strong.steps"),
        ("first.images", "evaluate.images"),
        ("dataset", "dataset"),
        ("of.nothing", "of.nothing"),
    ],
)
def test_every_way_to_write_an_address_is_one(written: str, address: str, folder: Path) -> None:
    settings = read_settings(folder, {written: 1})
    assert settings.swept == {address: 1}
    assert settings.names == {written: address}


def test_a_file_that_is_no_recipe_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").symlink_to("/dev/zero")
    assert read_settings(tmp_path, {"a.b": 1}).of("") == {"a.b": 1}
