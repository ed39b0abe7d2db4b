"""What a key follows."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

from prunekit.store import keys
from prunekit.store.keys import (
    DECIDING,
    hash_source,
    hash_stage,
    used_version,
    version_of,
)


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
    "checks/",
    "__init__.py",
    "__main__.py",
    "api.py",
    "catalog/",
    "cli/",
    "engine/keys.py",
    "engine/eval_plan.py",
    "engine/handed_over.py",
    "engine/jobs.py",
    "engine/preview.py",
    "engine/rehearsal.py",
    "engine/running.py",
    "engine/schedule.py",
    "engine/submitting.py",
    "engine/worker.py",
    "errors.py",
    "models/contract.py",
    "models/exporting.py",
    "models/failures.py",
    "models/importing.py",
    "models/stored.py",
    "recipe/agreement.py",
    "recipe/describing.py",
    "recipe/computing.py",
    "recipe/plan.py",
    "recipe/reduction.py",
    "recipe/resolver.py",
    "recipe/trust.py",
    "recipe/values.py",
    "reading.py",
    "report.py",
    "results/",
    "store/files.py",
    "store/keys.py",
    "store/layout.py",
    "store/metrics.py",
    "store/networks.py",
    "store/out_folder.py",
    "store/records.py",
    "store/runs.py",
    "store/stage_folder.py",
    "store/stages.py",
    "store/tensors/headers.py",
    "testing.py",
    "recipe/toml/",
)
"""All other files of the core: they parse, store or show."""


def test_every_file_of_the_core_is_in_one_of_the_two_lists():
    core = Path(keys.__file__).parent.parent
    files = {p.relative_to(core).as_posix() for p in core.rglob("*.py")}
    for file in (f for f in files if not f.endswith("/__init__.py")):
        where = [file.startswith(DECIDING), file.startswith(SHOWING)]
        told = f"{file}: name it in DECIDING of store/keys.py or SHOWING here"
        assert where.count(True) == 1, told
    for part in (*DECIDING, *SHOWING):
        assert (core / part).exists(), f"{part} is gone: take it off its list"


def test_an_unknown_package_is_unknown():
    assert hash_source("no_such_package_anywhere") == "unknown"


def test_a_package_before_the_installed_one_has_not_its_version(tmp_path, monkeypatch):
    assert version_of("pluggy") == importlib.metadata.version("pluggy")
    (tmp_path / "pluggy").mkdir()
    (tmp_path / "pluggy" / "__init__.py").write_text("__version__ = '99'")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pluggy")
    version_of.cache_clear()
    assert version_of("pluggy") == "unknown"
    assert used_version("pluggy") == "unknown"  # nothing has been imported
    import pluggy

    assert used_version("pluggy") == "99" == pluggy.__version__
    version_of.cache_clear()
    assert version_of("no_such_package") == "unknown"
