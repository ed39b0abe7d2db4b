"""Records of runs found and read."""

from __future__ import annotations

from pathlib import Path

import filelock
import pytest

from prunekit.errors import UserError
from prunekit.store.records import find_runs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "was not written by prunekit"),
        ('{"format": 1}', "has format 1, and this prunekit reads 2; run the recipe again, or"),
        ('{"format": 3}', "has format 3, and this prunekit reads 2; use the version that wrote it"),
        ('{"format": 2, "name": "a"}', "lacks 'status'"),
        (
            '{"format": 2, "name": "a", "status": "done", "smoke": false, "seed": 0,'
            ' "settings": {}, "stages": 3}',
            "is damaged",
        ),
    ],
)
def test_a_broken_record_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        find_runs(tmp_path)
    assert "run.json " in str(caught.value)


def test_runs_are_found_everywhere_but_in_hidden_folders(tmp_path: Path, write_run) -> None:
    write_run(tmp_path / "runs", {"a": 1})
    write_run(tmp_path / "runs" / "deep" / "er", {"a": 2})
    write_run(tmp_path / "runs" / ".moved" / "old", {"a": 3})
    found = find_runs(tmp_path / "runs")
    assert [run.folder for run in found] == [tmp_path / "runs", tmp_path / "runs" / "deep" / "er"]
    with pytest.raises(UserError, match="there is no folder"):
        find_runs(tmp_path / "none")


def test_a_run_whose_process_was_killed_is_stopped(tmp_path: Path, write_run) -> None:
    def status(name: str) -> str:
        (run,) = find_runs(tmp_path / "runs" / name)
        return run.status

    write_run(tmp_path / "runs/a", {}, status="running")
    assert status("a") == "running or stopped"
    with filelock.FileLock(tmp_path / "runs/a/.lock"):
        assert status("a") == "running"
    (tmp_path / "runs/a/.lock").touch()
    assert status("a") == "stopped"
    write_run(tmp_path / "runs/b", {}, status="failed")
    assert status("b") == "failed"
