"""`prunekit doctor`: what is broken is told with what mends it, and breaks nothing else."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from prunekit.catalog.registry import BrokenPlugin, Registry, load_registry
from prunekit.cli import doctor, requirements
from prunekit.cli.doctor import Finding, _look_at_plugins, ask, diagnose, render
from prunekit.cli.group import main
from prunekit.cli.requirements import find_module, is_within, read_requirements


def call(folder, *arguments, **environment):
    """In a process of its own, as a user has it: its stdout as JSON, and its exit code."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PRUNEKIT")}
    done = subprocess.run(
        [sys.executable, "-m", "prunekit", "doctor", *arguments, "--json"],
        cwd=folder, env={**clean, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    content = json.loads(done.stdout)
    assert done.returncode == (1 if content["broken"] else 0)
    return [Finding(**found) for found in content["findings"]]


def find(findings, topic, name):
    return [f for f in findings if f.topic.startswith(topic) and f.name.startswith(name)]


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
from prunekit import Component, hookimpl

@hookimpl
def prunekit_pruners():
    yield Component(name="{name}", summary="X", build="{plugin}_plugin.parts:build", needs={needs})
"""


def declare(plugin, name, needs=()):
    return DECLARATION.format(plugin=plugin, name=name, needs=needs)


ANSWERS = {"devices": {"threads": 1, "processors": 2, "cuda": [], "cuda_version": "12.6",
                       "mps": False, "broken": ["driver too old"]}}  # fmt: skip


def test_what_is_sound_and_what_is_broken_with_what_mends_it(tmp_path):
    site, data = tmp_path / "site", tmp_path / "data"
    data.mkdir()
    (data / "mnist.npz").write_bytes(b"no arrays")
    images = np.full((4, 28, 28), 255, np.uint8)
    np.savez(data / "fashion-mnist.npz", x_train=images, y_train=np.arange(4),
             x_test=images, y_test=np.arange(4))  # fmt: skip
    (tmp_path / "runs").write_text("a file")
    stage = tmp_path / "store/v2" / ("0" * 32)
    stage.mkdir(parents=True)
    (stage / "model.safetensors").write_bytes(bytes(1_500_000))
    install(site, "cannotload", "raise RuntimeError('on purpose')")
    install(site, "claims", declare("claims", "lwm"), "def build(options, context): ...")
    install(site, "late", declare("late", "late"), "raise ImportError('too late')\n")
    install(site, "wants", declare("wants", "wish", ("no_such_package",)))
    found = call(tmp_path, PYTHONPATH=str(site), PRUNEKIT_DATA=str(data), PRUNEKIT_STORE="store")
    broken = {(f.topic, f.name, f.told): f.mend for f in found if f.broken}

    def told(topic, name):
        (finding,) = [f for f in found if f.topic.startswith(topic) and f.name.startswith(name)
                      and f.broken]  # fmt: skip
        return finding.told, finding.mend

    assert told("plugins", "cannotload (cannotload 1.0)") == (
        "RuntimeError: on purpose",
        "pip install --upgrade cannotload, or pip uninstall cannotload",
    )
    assert told("plugins", "claims (claims 1.0)")[1] == "pip uninstall claims"
    assert told("plugins", "pruners (prunekit ")[1] == 'write "pruners:lwm"'
    assert told("plugins", "late")[0] == "pruner late cannot be imported: ImportError: too late"
    (wish,) = find(found, "optional", "no_such_package")
    assert (wish.told, wish.mend) == (
        "not installed; for pruner wish", "pip install no_such_package",
    )  # fmt: skip
    assert "mnist.npz" in told("data", "mnist")[0]
    assert find(found, "data", "fashion-mnist")[0].told.startswith("4 training")
    assert told("folders", "runs (runs)") == (
        find(found, "folders", "runs")[0].told,
        "give --out and --store a folder that can be written, or change its permissions",
    )
    assert "runs: Not a directory" in told("folders", "runs")[0]
    assert find(found, "folders", "store (store)")[0].told.startswith(
        "0 stages done, 1 begun, 1.5 M"
    )
    assert len(broken) == 6
    for name in ("python", "prunekit", "torch", "torchvision", "timm", "numpy"):
        assert next(f for f in found if f.name == name).told[0].isdigit()
    assert "processors" in find(found, "devices", "cpu")[0].told
    assert find(found, "data", "digits")[0].told == "1,437 training and 360 test images, 1x8x8"
    assert find(found, "data", "cifar10")[0].told == "not here"
    assert find(found, "plugins", "reporters (prunekit ")[0].told.endswith("components")


def test_a_crash_is_reported_and_what_comes_after_is_tried(tmp_path, monkeypatch):
    (tmp_path / "crashing.py").write_text("import os\nos.abort()\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(4)")
    (tmp_path / "loud.py").write_text("print('hello')\n__version__ = '1.5'\nx = 3\n")
    (tmp_path / "odd.py").write_text("def load():\n    import loud\n    return loud\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tasks = [("import", "json"), ("import", "crashing"), ("import", "leaving"), ("import", "loud"),
             ("component", "loud:x"), ("load", "odd:load")]  # fmt: skip
    assert ask(tasks) == [
        {"version": "2.0.9"}, {"error": "crashes (SIGABRT)"}, {"error": "SystemExit: 4"},
        {"version": "1.5"}, {"error": "TypeError: loud:x is no function"}, {"version": "1.5"},
    ]  # fmt: skip


def test_an_installation_that_is_sound(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sound = {**ANSWERS, "data": {"missing": True}}
    sound["devices"] = {**sound["devices"], "broken": [], "cuda": ["H100"]}
    monkeypatch.setattr(doctor, "ask", lambda tasks: [dict(sound.get(t[0], {})) for t in tasks])
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 0
    assert done.stdout.endswith("\nnothing is broken\n")
    assert "BROKEN" not in done.stdout
    assert "  cuda  H100" in done.stdout
    assert "store (runs/.stages)  not there yet; it can be made; " in done.stdout


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "crashes (SIGSEGV)"),
        ("raise OSError('libcudart.so: cannot open')", "OSError: libcudart.so: cannot open"),
        ("import os\nos._exit(3)", "ends its process with exit code 3"),
    ],
)
def test_torch_that_cannot_be_imported_is_the_one_thing_that_is_told(tmp_path, code, reason):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(code)
    found = call(tmp_path, PYTHONPATH=str(tmp_path))
    (broken,) = [f for f in found if f.broken]
    assert broken.name == "torch"
    assert broken.told.endswith(f", cannot be imported: {reason}")
    assert broken.mend.startswith("pip install --force-reinstall --no-deps torch==")
    assert find(found, "data", "digits")[0].told == "not looked at, as torch is broken"


def test_versions_that_do_not_fit_each_other(tmp_path, monkeypatch):
    versions = {"torch": "2.4.0+cu121", "torchvision": "0.25.0"}
    real = requirements.importlib.metadata.version
    needs = {"torchvision": [("torch", "==2.10.0"), ("numpy", "")]}
    monkeypatch.setattr(doctor.importlib.metadata, "version",
                        lambda name: versions.get(name) or real(name))  # fmt: skip
    monkeypatch.setattr(doctor, "read_requirements",
                        lambda name: needs.get(name) or read_requirements(name))  # fmt: skip
    error = "RuntimeError: operator torchvision::nms does not exist"
    monkeypatch.setattr(doctor, "ask", lambda tasks: [
        {"error": error} if task == ("import", "torchvision") else dict(ANSWERS.get(task[0], {}))
        for task in tasks
    ])  # fmt: skip
    found = diagnose(Registry(()), tmp_path, None)
    broken = {f.name: (f.told, f.mend) for f in found if f.broken}
    assert broken["torch"] == ("2.4.0+cu121, prunekit needs >=2.6", 'pip install "torch>=2.6"')
    assert broken["torchvision"] == (
        "0.25.0 belongs to torch 2.10.0, and here is 2.4.0+cu121",
        "pip install --upgrade torchvision torch",
    )
    assert broken["cuda"][0] == "driver too old"
    assert "3 broken" in render(found)
    assert "mend it: pip install --upgrade torchvision torch" in render(found)


def test_a_package_that_is_broken_is_told_once(tmp_path, monkeypatch):
    error = "RuntimeError: operator torchvision::nms does not exist"
    monkeypatch.setattr(doctor, "ask", lambda tasks: [
        {"error": error}
        if task == ("import", "torchvision") or task[1].startswith("prunekit_vision")
        else dict(ANSWERS.get(task[0], {}))
        for task in tasks
    ])  # fmt: skip
    broken = [f.name for f in diagnose(load_registry(), tmp_path, None) if f.broken]
    assert broken == ["torchvision", "cuda"]


@pytest.mark.parametrize(
    ("distribution", "reason", "way"),
    [
        ("acme 1.0", "ModuleNotFoundError: No module named 'nothing_here.at_all'",
         "pip install nothing_here"),
        ("acme 1.0", "ModuleNotFoundError: No module named 'json.nothing'",
         "pip install --upgrade acme, or pip uninstall acme"),
        ("acme 1.0", "written for plugin API 2, this prunekit has 1; update prunekit",
         "pip install --upgrade prunekit"),
        ("prunekit 0.1.0", "SyntaxError: x", "pip install --upgrade prunekit"),
        ("unknown", "SyntaxError: x", "remove its entry point"),
    ],
)  # fmt: skip
def test_what_mends_a_plugin_follows_from_what_is_wrong(distribution, reason, way):
    broken = BrokenPlugin("acme", distribution, reason)
    (finding,) = _look_at_plugins(Registry((), (broken,)), {}, set())
    assert (finding.told, finding.mend) == (reason, way)


def test_a_process_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE", 0.01)
    assert ask([("import", "torch"), ("import", "numpy")]) == [
        {"error": "no answer within 0.01 seconds"}, {"skipped": True},
    ]  # fmt: skip


def test_requirements_are_read_from_the_metadata():
    required = dict(read_requirements("prunekit"))
    assert required["torch"].startswith(">=")
    assert "pyautoattack" not in required
    assert (find_module("pillow"), find_module("tomli-w"), find_module("nothing")) == (
        "PIL", "tomli_w", "",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("version", "wanted", "good"),
    [
        ("2.13.0", ">=2.6", True), ("2.5.1", ">=2.6", False), ("2.6", ">=2.6.0", True),
        ("2.13.0+cpu", "==2.13.0", True), ("2.13.1", "==2.13.0", False), ("0.3", "", True),
        ("0.2.9", ">=0.2,<0.3", True), ("0.3", ">=0.2,<0.3", False), ("2.7.0a1", ">=2.6", True),
        ("2.13.1", "==2.13.*", True),
    ],
)  # fmt: skip
def test_versions_are_compared_number_by_number(version, wanted, good):
    assert is_within(version, wanted) == good
