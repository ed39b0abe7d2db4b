"""`prunekit doctor`: what is broken is told with what mends it, and breaks nothing else."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from prunekit.catalog.registry import BrokenPlugin, Registry, load_registry
from prunekit.cli import doctor
from prunekit.cli.doctor import Finding, diagnose, try_out
from prunekit.cli.group import main


def call(folder, *arguments, **environment):
    """In a process of its own, as a user has it: its stdout as JSON, and its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "prunekit", "doctor", *arguments, "--json"],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    content = json.loads(done.stdout)
    assert done.returncode == (1 if content["broken"] else 0)
    return [Finding(**found) for found in content["findings"]]


def find(findings, name):
    return [f for f in findings if f.name.startswith(name)]


def install(site, name, declaration, parts=""):
    """A plugin with its distribution, found by a path."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[prunekit]\n{name} = {name}_plugin\n")
    (site / f"{name}_plugin").mkdir()
    (site / f"{name}_plugin/__init__.py").write_text(declaration)
    (site / f"{name}_plugin/parts.py").write_text(parts)


DECLARATION = """
from prunekit import PrunerComponent, hookimpl

@hookimpl
def prunekit_pruners():
    yield PrunerComponent(
        name="{name}", summary="X", build="{plugin}_plugin.parts:build", needs={needs}
    )
"""


def declare(plugin, name, needs=()):
    return DECLARATION.format(plugin=plugin, name=name, needs=needs)


@pytest.mark.slow
def test_what_is_sound_and_what_is_broken_with_what_mends_it(tmp_path):
    site = tmp_path / "site"
    install(site, "cannotload", "raise RuntimeError('on purpose')")
    install(site, "claims", declare("claims", "lwm"), "def build(options, context): ...")
    install(site, "late", declare("late", "late"), "raise ImportError('too late')\n")
    install(site, "wants", declare("wants", "wish", ("no_such_package",)))
    found = call(tmp_path, PYTHONPATH=str(site))
    broken = {f.name: (f.told, f.mend) for f in found if f.broken}
    assert broken.pop("cannotload (cannotload 1.0)") == (
        "RuntimeError: on purpose",
        "pip install --upgrade cannotload, or pip uninstall cannotload",
    )
    assert broken.pop("claims (claims 1.0): pruner lwm")[1] == 'write "claims:lwm"'
    assert broken.pop("pruners (prunekit 0.1.0): pruner lwm")[1] == 'write "pruners:lwm"'
    assert broken.pop("late (late 1.0): pruner late") == (
        "cannot be imported: ImportError: too late",
        "pip install --upgrade late, or pip uninstall late",
    )
    assert not broken
    (wish,) = find(found, "no_such_package")
    assert (wish.told, wish.mend) == (
        "not installed; for pruner wish", "pip install no_such_package",
    )  # fmt: skip
    for name in ("python", "prunekit", "torch", "torchvision", "timm", "numpy"):
        assert next(f for f in found if f.name == name).told[0].isdigit()
    (devices,) = find(found, "devices")
    assert devices.told.startswith("cpu with ")
    assert find(found, "reporters (prunekit ")[0].told.endswith("components")


def test_an_installation_that_is_sound(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "try_out", lambda trials: dict.fromkeys(trials, ("", False)))
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 0
    assert done.stdout.endswith("\nnothing is broken\n")
    assert "BROKEN" not in done.stdout


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "crashes (SIGSEGV)"),
        ("import os\nos._exit(3)", "exits with code 3"),
    ],
)
def test_a_crash_is_told_and_what_comes_behind_it_is_not_tried(tmp_path, monkeypatch, code, reason):
    (tmp_path / "crashing.py").write_text(code)
    (tmp_path / "loud.py").write_text("print('hello')\ndef name():\n    return 'here'\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(4)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert try_out(["loud:name", "leaving", "crashing", "json", "loud"]) == {
        "loud:name": ("here", False),
        "leaving": ("cannot be imported: SystemExit: 4", True),
        "crashing": (f"its import {reason}", True),
        "json": ("not tried because crashing is broken", False),
        "loud": ("not tried because crashing is broken", False),
    }


def test_a_version_that_is_too_old(monkeypatch):
    real = doctor._version_of
    monkeypatch.setattr(
        doctor, "_version_of", lambda name: "2.4.0+cu121" if name == "torch" else real(name)
    )
    monkeypatch.setattr(doctor, "try_out", lambda trials: dict.fromkeys(trials, ("", False)))
    broken = {f.name: (f.told, f.mend) for f in diagnose(Registry(())) if f.broken}
    assert broken == {
        "torch": ("2.4.0+cu121, prunekit needs torch>=2.6", 'pip install "torch>=2.6"')
    }


def test_a_package_that_is_broken_is_told_once(tmp_path, monkeypatch):
    error = ("cannot be imported: RuntimeError: operator torchvision::nms does not exist", True)
    monkeypatch.setattr(
        doctor,
        "try_out",
        lambda trials: {t: error if "vision" in t else ("", False) for t in trials},
    )
    broken = [f for f in diagnose(load_registry()) if f.broken]
    assert [f.name for f in broken] == ["torchvision"]
    assert "  torchvision" in doctor.render(broken)
    assert "fix it: pip install --upgrade torch torchvision timm" in doctor.render(broken)


@pytest.mark.parametrize(
    ("distribution", "reason", "way"),
    [
        ("acme 1.0", "ModuleNotFoundError: No module named 'json.nothing'",
         "pip install --upgrade acme, or pip uninstall acme"),
        ("acme 1.0", "written for plugin API 3, this prunekit has 2; update prunekit",
         "pip install --upgrade prunekit"),
        ("prunekit 0.1.0", "SyntaxError: x", "pip install --upgrade prunekit"),
    ],
)  # fmt: skip
def test_what_mends_a_plugin_follows_from_what_is_wrong(distribution, reason, way):
    broken = BrokenPlugin("acme", distribution, reason)
    *_, finding = doctor._check_plugins(Registry((), (broken,)))
    assert (finding.told, finding.mend) == (reason, way)
