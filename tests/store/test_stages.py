"""Stage results by hash: locks, and what is left behind."""

import threading

import pytest

from prunekit.errors import Interrupted, UserError
from prunekit.report import Stop
from prunekit.store.stages import StageResult, Store

CALM = Stop()


def nothing():
    pass


def test_a_stage_is_done_when_its_result_is_there(tmp_path):
    store = Store(tmp_path)
    result = StageResult({"accuracy": 0.1 + 0.2}, [{"epoch": 1, "loss": 1 / 3}], 2.5)
    with store.locked("k", nothing) as folder:
        folder.progress.write_bytes(b"x")
        assert not folder.done
        folder.finish(result, {"kind": "pretrain"})
    assert folder.done
    assert folder.read() == result
    assert not folder.progress.exists()


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    store = Store(tmp_path)
    with store.locked("k", nothing) as folder:
        (folder.path / ".progress.safetensors.a8_0cdef").write_bytes(b"half")
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


def test_stages_of_an_older_format_are_told_once_and_freed(tmp_path):
    old = tmp_path / ("0" * 32)
    old.mkdir()
    (old / "result.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    store, told = Store(tmp_path), []
    store.prepare(told.append)
    assert f"(1 in {tmp_path}) cannot be used again" in told[0]
    assert told[0].endswith(f"prunekit clean --store {tmp_path}")
    store.prepare(told.append)
    assert len(told) == 1
    assert store.remove_unused({"0" * 32}) == [("0" * 32, 2)]
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize("link", [".stages", ".stages/v3", ".stages/v1"])
def test_links_to_somebody_elses_store_are_refused(tmp_path, link):
    mine = Store(tmp_path / "mine")
    with mine.locked("0" * 32, nothing) as folder:
        folder.model.write_bytes(b"12345")
    theirs = Store(tmp_path / ".stages")
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(mine.root if link == ".stages" else mine.stages)
    for act in (lambda: theirs.remove_unused(set()), lambda: theirs.prepare(print)):
        with pytest.raises(UserError, match=f"{link} is a link, which is not followed; remove it"):
            act()
    (tmp_path / "named").symlink_to(mine.root)
    assert Store(tmp_path / "named").remove_unused(set(), keep=True) == [("0" * 32, 5)]


def test_a_lock_that_is_a_link_is_not_opened(tmp_path):
    store = Store(tmp_path / "s")
    (store.stages / "key").mkdir(parents=True)
    (tmp_path / "precious").write_text("text")
    (store.stages / "key/lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="lock is a link"):
        store.remove_unused(set())
    assert (tmp_path / "precious").read_text() == "text"
