"""Nothing is ever half-written."""

import errno
import os
import stat

import pytest

from prunekit.errors import RunError, UserError
from prunekit.store.files import copy, make_folder, read_json, write_json, write_text


def fail_with(number):
    def refuse(*arguments, **named):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_writing_replaces_and_leaves_nothing_beside(here):
    write_text(here / "a.txt", "one")
    write_text(here / "a.txt", "twö")
    assert (here / "a.txt").read_text(encoding="utf-8") == "twö"
    assert [p.name for p in here.iterdir()] == ["a.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((here / "a.txt").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace", "tempfile.mkstemp"])
def test_without_space_the_old_content_is_kept(here, monkeypatch, where):
    write_text(here / "a.txt", "old")
    monkeypatch.setattr(where, fail_with(errno.ENOSPC))
    with pytest.raises(RunError) as caught:
        write_text(here / "a.txt", "new")
    assert caught.value.code == 1
    assert str(caught.value) == (
        "no space left on the disk for a.txt; what was there before is kept: free some space and "
        "run the same command again"
    )
    assert (here / "a.txt").read_text() == "old"
    assert [p.name for p in here.iterdir()] == ["a.txt"]


def test_another_error_of_the_disk_is_named(here, monkeypatch):
    monkeypatch.setattr("os.fsync", fail_with(errno.EIO))
    with pytest.raises(RunError, match=r"^cannot write a\.txt: Input/output error$"):
        write_text(here / "a.txt", "new")
    assert list(here.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(here, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    write_text(here / "a.txt", "old")
    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(here / "a.txt", "new")
    assert [p.read_text() for p in here.iterdir()] == ["old"]


def test_a_copy_is_independent_of_what_replaces_the_source(here):
    (here / "a").write_text("one")
    (here / "b").write_text("before")
    copy(here / "a", here / "b")
    write_text(here / "a", "two")
    assert (here / "b").read_text() == "one"
    assert sorted(p.name for p in here.iterdir()) == ["a", "b"]


def test_json_comes_back_and_has_no_word_for_nan(here):
    write_json(here / "a.json", {"x": [1, 2.5]})
    assert read_json(here / "a.json") == {"x": [1, 2.5]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(here / "a.json", float("nan"))
    assert read_json(here / "a.json") == {"x": [1, 2.5]}


@pytest.mark.parametrize("content", [b"{", b"\xff", b""])
def test_damaged_json_is_a_message(here, content):
    (here / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"^a\.json cannot be read \(.*\); remove it$"):
        read_json(here / "a.json")


def test_a_folder_that_cannot_be(here):
    make_folder(here / "a/b")
    make_folder(here / "a/b")
    (here / "file").touch()
    with pytest.raises(UserError) as caught:
        make_folder(here / "file/x")
    assert str(caught.value) == (
        "cannot write to file/x: Not a directory; choose another folder with --out"
    )
    with pytest.raises(UserError, match="cannot write to file: File exists"):
        make_folder(here / "file")


def test_a_folder_that_takes_no_files(here, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", fail_with(errno.EROFS))
    with pytest.raises(UserError, match="cannot write to a: Read-only file system"):
        make_folder(here / "a")
