"""What is damaged on disk is told, moved aside and computed again, to the same bytes."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from prunekit.errors import Interrupted, UserError
from prunekit.report import EpochDone, Note, StageDone
from prunekit.store.files import read_npz, set_aside, write_text
from prunekit.store.records import find_changed, tell_changed
from prunekit.store.stages import StageResult, Store


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def zero(path):
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        told = json.loads(file.read(size))["__metadata__"]
    save_file({name: value * 0 for name, value in load_file(path).items()}, path, told)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_by_folder(path):
    path.unlink()
    (path / "inner").mkdir(parents=True)


STORED = {
    "a flipped bit": lambda stage, other: flip(stage / "model.safetensors"),
    "a header's bit": lambda stage, other: flip(stage / "model.safetensors", 40),
    "zeroed weights": lambda stage, other: zero(stage / "model.safetensors"),
    "another model": lambda stage, other: shutil.copy(other / "model.safetensors", stage),
    "another stage": lambda stage, other: shutil.copytree(other, stage, dirs_exist_ok=True),
    "no model": lambda stage, other: (stage / "model.safetensors").unlink(),
    "an empty model": lambda stage, other: (stage / "model.safetensors").write_bytes(b""),
    "a folder for a model": lambda stage, other: replace_by_folder(stage / "model.safetensors"),
    "an edited number": lambda stage, other: edit(stage / "result.json", seconds=0.5),
    "wrong types": lambda stage, other: edit(stage / "result.json", metrics=[], notes=3),
    "no result": lambda stage, other: (stage / "result.json").write_bytes(b"\xff{"),
    "an empty result": lambda stage, other: (stage / "result.json").write_bytes(b""),
    "a list": lambda stage, other: (stage / "result.json").write_text("[]"),
    "a folder for a result": lambda stage, other: replace_by_folder(stage / "result.json"),
}


@pytest.mark.parametrize("damage", STORED.values(), ids=STORED)
def test_a_damaged_stage_is_computed_again(bench, damage):
    bench.run(out="whole")
    whole = (bench.folder / "whole/model.safetensors").read_bytes()
    (run,) = bench.plan().runs
    first, second, *_ = (bench.folder / "store/v3" / key for key in bench.make_keys(run))
    damage(second, first)
    bench.events.clear()
    (folder,) = bench.run()
    assert (folder.path / "model.safetensors").read_bytes() == whole
    assert [event.reused for event in bench.of(StageDone)] == [True, False, True, True]
    (told,) = (event.text for event in bench.of(Note) if event.warning)
    aside = second.with_name(f"{second.name}.damaged1")
    assert f"the stored stage {second} is damaged (" in told
    assert told.endswith(f"it is computed again, and what was there is now in {aside}")
    assert "\n" not in told
    assert any(aside.iterdir())


def test_clean_deletes_what_was_moved_aside(bench):
    bench.run()
    store = Store(bench.folder / "store")
    (run,) = bench.plan().runs
    keys = bench.make_keys(run)
    flip(store.folder(keys[0]).model)
    bench.run(out="again")
    stray = set_aside(write(store.stages / "stray"))
    used = {part.name for part in store.stages.iterdir()} - {f"{keys[0]}.damaged1", stray.name}
    assert {name for name, _ in store.remove_unused(used)} == {f"{keys[0]}.damaged1", stray.name}
    assert {part.name for part in store.stages.iterdir()} == used


def write(path):
    path.write_bytes(b"garbage")
    return path


@pytest.mark.parametrize("value", [0.9, "0.9"])
def test_an_edited_accuracy_is_not_believed(bench, value):
    bench.run()
    for result in (bench.folder / "store/v3").glob("*/result.json"):
        content = json.loads(result.read_text())
        if "accuracy" in content["metrics"] and "network" in content["metrics"]:
            content["metrics"]["accuracy"]["value"] = value
            result.write_text(json.dumps(content))
    bench.events.clear()
    (folder,) = bench.run(out="again")
    assert [event.reused for event in bench.of(StageDone)] == [True, True, True, False]
    assert folder.metrics["evaluate"]["clean.accuracy"] != value


UNFINISHED = {
    "a flipped bit": lambda file: flip(file),
    "garbage": write,
    "an empty file": lambda file: file.write_bytes(b""),
    "a folder": replace_by_folder,
    "other tensors": lambda file: save_file(load_file(file), file),
    "a link": lambda file: file.rename(file.with_name("x")) and file.symlink_to("x"),
}


@pytest.mark.parametrize("damage", UNFINISHED.values(), ids=UNFINISHED)
def test_a_damaged_checkpoint_starts_the_stage_anew(bench, damage):
    (whole,) = bench.run(out="whole", store="other")
    engine = bench.engine()

    def report(event):
        if isinstance(event, EpochDone):
            engine.stop.requested = True

    engine.report = report
    with pytest.raises(Interrupted):
        engine.run(bench.plan(), bench.folder / "out")
    (progress,) = (bench.folder / "store/v3").glob("*/progress.safetensors")
    damage(progress)
    (folder,) = bench.run()
    assert folder.status == "done"
    assert any("is damaged" in event.text for event in bench.of(Note))
    model = "model.safetensors"
    assert (folder.path / model).read_bytes() == (whole.path / model).read_bytes()


SCRATCH = {
    "garbage": lambda scratch: write(scratch / "batch-0.npz"),
    "an empty file": lambda scratch: (scratch / "batch-0.npz").touch(),
    "broken JSON": lambda scratch: (scratch / "kept.json").write_text("[1, "),
    "a file": lambda scratch: (scratch.rmdir(), scratch.touch()),
}


@pytest.mark.parametrize("damage", SCRATCH.values(), ids=SCRATCH)
def test_damaged_parts_of_an_evaluation_are_judged_again(bench, damage):
    recipe = bench.recipe.replace('with = ["clean"]', 'with = [{ use = "pgd", steps = 2 }]')
    bench.run(recipe=recipe, out="whole", store="other")
    (part,) = (p.parent for p in (bench.folder / "other/v3").glob("*/records.npz"))
    scratch = bench.folder / "store/v3" / part.name / "scratch"
    scratch.mkdir(parents=True)
    damage(scratch)
    bench.run(recipe=recipe)
    assert any("is damaged" in event.text for event in bench.of(Note))
    got, expected = (read_npz(bench.folder / out / "records.npz") for out in ("out", "whole"))
    assert all(np.array_equal(got[name], value) for name, value in expected.items())
    assert got.keys() == expected.keys()


@pytest.mark.parametrize("kind", ["file", "lock"])
def test_what_is_no_stage_folder_is_moved_aside(bench, kind):
    (run,) = bench.plan().runs
    folder = bench.folder / "store/v3" / bench.make_keys(run)[0]
    folder.parent.mkdir(parents=True)
    if kind == "file":
        folder.touch()
    else:
        (folder / "lock").mkdir(parents=True)
    assert bench.run()[0].status == "done"


# Runs


def test_a_run_knows_its_files(bench):
    (folder,) = bench.run()
    told = json.loads((folder.path / "run.json").read_text())
    assert sorted(told["files"]) == ["model.safetensors", "recipe.toml", "records.npz"]
    train, *_, judge = told["stages"]
    stored = json.loads((bench.folder / "store/v3" / train["key"] / "result.json").read_text())
    assert train["files"] == stored["files"]
    assert list(judge["files"]) == ["clean/records.npz"]
    assert find_changed(folder.path) == []


@pytest.mark.parametrize("name", ["model.safetensors", "records.npz", "recipe.toml"])
def test_a_file_of_a_run_that_has_changed_is_named(bench, name):
    (folder,) = bench.run()
    flip(folder.path / name)
    assert tell_changed(folder.path) == [f"{folder.path / name} is not what the run wrote"]


def test_an_edited_record_is_named(bench):
    (folder,) = bench.run()
    edit(folder.path / "run.json", seed=3)
    assert find_changed(folder.path) == ["run.json"]
    edit(folder.path / "run.json", status="running")
    assert find_changed(folder.path) == []


def test_nothing_is_known_of_runs_without_hashes(write_run, tmp_path):
    assert find_changed(write_run(tmp_path / "old", {})) == []


# Links and leftovers


@pytest.mark.parametrize("name", ["model.safetensors", "run.json", "recipe.toml", "records.npz"])
def test_files_elsewhere_are_not_written_through_links(bench, name):
    elsewhere = write(bench.folder / "elsewhere")
    (bench.folder / "out").mkdir()
    (bench.folder / "out" / name).symlink_to(elsewhere)
    bench.run()
    assert elsewhere.read_bytes() == b"garbage"
    assert not (bench.folder / "out" / name).is_symlink()


@pytest.mark.parametrize("place", ["store", "run"])
def test_folders_elsewhere_are_not_written_through_links(bench, place):
    elsewhere = bench.folder / "elsewhere"
    elsewhere.mkdir()
    if place == "store":
        (run,) = bench.plan().runs
        link = bench.folder / "store/v3" / bench.make_keys(run)[0]
    else:
        link = bench.folder / "out/sparsity=0.5"
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    if place == "store":
        (folder,) = bench.run()
        assert "is a link, which is not written through" in folder.error
    else:
        with pytest.raises(UserError, match="is a link, which is not written through"):
            bench.run("prune.sparsity=[0.5, 0.6]")
    assert not any(elsewhere.iterdir())


def test_what_a_killed_process_was_writing_is_removed(bench):
    out = bench.folder / "out"
    out.mkdir()
    (out / ".run.json.abcd_123").touch()
    (out / ".hidden").touch()
    bench.run()
    assert not (out / ".run.json.abcd_123").exists()
    assert (out / ".hidden").exists()


@pytest.fixture
def nobody(tmp_path):
    """A context in which nothing here can be written; root may write anywhere."""
    root = hasattr(os, "getuid") and os.getuid() == 0

    @contextmanager
    def nobody():
        for path in (tmp_path, *list(tmp_path.parents)[:2]):
            path.chmod(0o755)
        inner = list(tmp_path.rglob("*"))
        for path in inner:
            path.chmod(0o555 if path.is_dir() else 0o444)
        if root:
            os.setresuid(65534, 65534, 0)
        try:
            yield
        finally:
            if root:
                os.setresuid(0, 0, 0)
            for path in inner:
                path.chmod(0o755)

    return nobody


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_a_finished_store_that_cannot_be_written_to_is_used(tmp_path, nobody):
    store, done = Store(tmp_path / "store"), "a" * 32
    with store.locked(done, pytest.fail) as folder:
        folder.model.write_bytes(b"x")
        folder.finish(StageResult({"sparsity": 0.5}, seconds=1.0), {})
    with nobody():
        store.prepare(pytest.fail)
        with store.locked(done, pytest.fail) as folder:
            assert folder.repair(pytest.fail).metrics == {"sparsity": 0.5}
        with (
            pytest.raises(UserError, match="Permission denied; choose another folder with --store"),
            store.locked("0" * 32, pytest.fail),
        ):
            pass


def test_a_file_is_replaced_and_never_written_through(tmp_path):
    elsewhere = write(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(elsewhere)
    write_text(tmp_path / "link", "new")
    assert elsewhere.read_bytes() == b"garbage"
    assert Path(tmp_path / "link").read_text() == "new"
