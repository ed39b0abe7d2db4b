"""Stage results by hash: what a key follows, locks, and what is left behind."""

import importlib
import threading
from pathlib import Path

import pytest

from prunekit.errors import Interrupted, UserError
from prunekit.report import Stop
from prunekit.store import keys
from prunekit.store.keys import DECIDING, hash_file, hash_source, hash_stage
from prunekit.store.stages import StageResult, Store

CALM = Stop()


def nothing():
    pass


def test_a_stage_is_done_when_its_result_is_there(tmp_path):
    store = Store(tmp_path)
    result = StageResult({"accuracy": 0.1 + 0.2}, [{"epoch": 1, "loss": 1 / 3}], 2.5)
    with store.locked("k", nothing) as folder:
        folder.progress.write_bytes(b"x")
        assert not store.is_done("k")
        folder.finish(result, {"kind": "pretrain"})
    assert store.is_done("k")
    assert folder.read() == result
    assert not folder.progress.exists()


@pytest.mark.parametrize("content", ["{", "{}", "[]", ""])
def test_a_damaged_result_counts_as_none(tmp_path, content):
    folder = Store(tmp_path).folder("k")
    folder.path.mkdir(parents=True)
    (folder.path / "result.json").write_text(content)
    assert not folder.done
    with pytest.raises(UserError, match=r"cannot be read|holds no result"):
        folder.read()


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    store = Store(tmp_path)
    with store.locked("k", nothing) as folder:
        (folder.path / ".progress.safetensors.abc").write_bytes(b"half")
        folder.progress.write_bytes(b"whole")
    with store.locked("k", nothing):
        assert sorted(p.name for p in folder.path.iterdir()) == ["lock", "progress.safetensors"]


def test_a_second_process_waits_for_the_first(tmp_path):
    store, told, order = Store(tmp_path), threading.Event(), []

    def second():
        with store.locked("k", told.set):
            order.append("second")

    with store.locked("k", nothing):
        thread = threading.Thread(target=second)
        thread.start()
        assert told.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_other_stages_are_not_waited_for(tmp_path):
    store = Store(tmp_path)
    with store.locked("a", nothing), store.locked("b", pytest.fail):
        pass


def test_waiting_can_be_stopped(tmp_path):
    store, stop = Store(tmp_path), Stop()

    def tell():
        stop.requested = True

    with store.locked("k", nothing), pytest.raises(Interrupted), store.locked("k", tell, stop):
        pytest.fail("two are in")
    with store.locked("k", pytest.fail):
        pass


def test_the_lock_is_let_go_after_an_error(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(KeyError), store.locked("k", nothing):
        raise KeyError
    with store.locked("k", pytest.fail):
        pass


@pytest.mark.parametrize("name", ["model.safetensors", "records.npz"])
def test_a_stage_whose_files_are_cut_off_is_not_done(tmp_path, name):
    folder = Store(tmp_path).folder("k")
    folder.path.mkdir(parents=True)
    folder.model.write_bytes(b"12345")
    folder.records.write_bytes(b"123")
    folder.finish(StageResult({"a": 1}), {})
    assert folder.done
    (folder.path / name).write_bytes(b"12")
    assert not folder.done
    (folder.path / name).unlink()
    assert not folder.done


def test_remove_unused_keeps_what_is_used_or_at_work(tmp_path):
    store = Store(tmp_path)
    for key in ("used", "unused", "working"):
        with store.locked(key, nothing) as folder:
            folder.model.write_bytes(b"12345")
    with store.locked("working", nothing):
        assert store.remove_unused({"used"}, keep=True) == [("unused", 5)]
        assert store.folder("unused").model.exists()
        assert store.remove_unused({"used"}) == [("unused", 5)]
    assert sorted(p.name for p in store.stages.iterdir()) == ["used", "working"]
    assert Store(tmp_path / "none").remove_unused(set()) == []


# Keys


def key(upstream="", description=None, plugins=(), environment=None):
    return hash_stage(upstream, description or {"a": 1}, set(plugins), environment or {"torch": 2})


def test_a_key_follows_everything_that_decides():
    first = key()
    assert len(first) == 32
    assert first == key()
    others = [key("up"), key(description={"a": 2}), key(environment={"torch": 3}), key("", None,
              {"prunekit_pruners"})]  # fmt: skip
    assert len({first, *others}) == 5


def write_plugin(folder, layout):
    """A module, a package, or a package without __init__.py; returns the file to edit."""
    if layout == "module":
        file = folder / "made_up_module.py"
    else:
        file = folder / f"made_up_{layout}" / "inner" / "code.py"
        file.parent.mkdir(parents=True)
        if layout == "package":
            (folder / "made_up_package" / "__init__.py").write_text("")
    file.write_text("a = 1\n")
    return file


@pytest.mark.parametrize("layout", ["module", "package", "namespace"])
def test_a_plugin_is_hashed_by_its_source(tmp_path, monkeypatch, layout):
    monkeypatch.syspath_prepend(tmp_path)
    file = write_plugin(tmp_path, layout)
    name = f"made_up_{layout}"

    def look():
        hash_source.cache_clear()
        importlib.invalidate_caches()
        return hash_source(name)

    first = look()
    assert first == look() != "unknown"
    file.write_text("a = 2\n")
    second = look()
    file.rename(file.with_name("renamed.py")) if layout != "module" else file.write_text("a = 3\n")
    assert len({first, second, look()}) == 3


def test_what_decides_is_in_the_key_and_what_shows_is_not(tmp_path, monkeypatch):
    for name in ("pruning/masks.py", "pruning/__init__.py", "cli/results.py", "errors.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a = 1\n")
    spec = type("Spec", (), {"origin": None, "submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(keys.importlib.util, "find_spec", lambda name: spec)

    def look():
        hash_source.cache_clear()
        return hash_source("prunekit")

    first = look()
    for name in ("cli/results.py", "errors.py", "pruning/__init__.py"):
        (tmp_path / name).write_text("a = 2\n")
        assert look() == first
    (tmp_path / "pruning/masks.py").write_text("a = 2\n")
    assert look() != first
    monkeypatch.undo()
    hash_source.cache_clear()


SHOWING = (
    "__init__.py",
    "__main__.py",
    "api.py",
    "catalog/",
    "cli/",
    "engine/contract.py",
    "engine/eval_plan.py",
    "engine/preview.py",
    "engine/rehearsal.py",
    "engine/running.py",
    "engine/single.py",
    "errors.py",
    "models/exporting.py",
    "models/failures.py",
    "models/identity.py",
    "models/importing.py",
    "models/stored.py",
    "recipe/document.py",
    "recipe/plan.py",
    "recipe/resolver.py",
    "recipe/sections.py",
    "recipe/sweep.py",
    "recipe/toml_lines.py",
    "recipe/values.py",
    "report.py",
    "results/",
    "store/files.py",
    "store/keys.py",
    "store/layout.py",
    "store/networks.py",
    "store/records.py",
    "store/runs.py",
    "store/stages.py",
    "testing.py",
)
"""All other files of the core: they parse, store or show."""


def test_every_file_of_the_core_is_in_one_of_the_two_lists():
    core = Path(keys.__file__).parent.parent
    files = {p.relative_to(core).as_posix() for p in core.rglob("*.py")}
    for file in files - {
        f"{folder}/__init__.py" for folder in {f.partition("/")[0] for f in files}
    }:
        where = [file.startswith(DECIDING), file.startswith(SHOWING)]
        assert where.count(True) == 1, (
            f"{file}: name it in DECIDING of store/keys.py or SHOWING here"
        )
    for part in (*DECIDING, *SHOWING):
        assert (core / part).exists(), f"{part} is gone: take it off its list"


def test_stages_of_an_older_format_are_told_once_and_freed(tmp_path):
    old = tmp_path / ("0" * 32)
    old.mkdir()
    (old / "result.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    store, told = Store(tmp_path), []
    store.prepare(told.append)
    assert "1 stored stage in " in told[0]
    assert "prunekit clean" in told[0]
    store.prepare(told.append)
    assert len(told) == 1
    assert store.remove_unused({"0" * 32}) == [("0" * 32, 2)]
    assert (tmp_path / "mine").is_dir()


def test_an_unknown_package_is_unknown():
    assert hash_source("no_such_package_anywhere") == "unknown"


def test_files_are_hashed_by_what_they_hold_now(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"a")
    first = hash_file(file)
    file.write_bytes(b"b")
    assert hash_file(file) != first
