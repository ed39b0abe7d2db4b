"""`prunekit doctor`: what is here, what is broken, and the command that mends it. No torch."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from prunekit.catalog.component import default_of
from prunekit.catalog.registry import Registry
from prunekit.cli.group import as_json, print_json
from prunekit.cli.requirements import find_distributions, find_module, is_within, read_requirements
from prunekit.errors import relative
from prunekit.store.layout import STORE
from prunekit.store.stages import Store


@click.command()
@click.argument("runs", type=click.Path(path_type=Path), default="runs")
@click.option("--store", type=click.Path(path_type=Path), envvar="PRUNEKIT_STORE",
              help="Folder of stage results; .stages in RUNS by default.")  # fmt: skip
@as_json
def doctor(runs: Path, store: Path | None, as_json: bool) -> None:
    """Look at this installation: versions, devices, data, plugins; what is broken, what mends it.

    Exit code 1 where something is broken.
    """
    from prunekit.catalog.registry import load_registry
    from prunekit.cli.doctor import diagnose, render

    findings = diagnose(load_registry(), runs, store)
    broken = sum(finding.broken for finding in findings)
    if as_json:
        print_json({"broken": broken, "findings": [vars(finding) for finding in findings]})
    else:
        click.echo(render(findings))
    if broken:
        sys.exit(1)


PATIENCE = 300
"""Seconds that one process may take to answer."""


Task = tuple[str, str]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, in `told`. Where it is broken, `mend` says what to do."""

    topic: str
    name: str
    told: str
    broken: bool = False
    mend: str = ""


def diagnose(registry: Registry, runs: Path, store: Path | None) -> list[Finding]:
    """Look at everything. Nothing that is broken can raise, or crash this process."""
    packages = [name for name, _ in read_requirements("prunekit")]
    modules = {name: find_module(name) for name in packages}
    ready = [e for e in registry.entries if not e.missing]
    needs = dict.fromkeys(n for e in registry.entries for n in e.component.needs)
    optional = [n for n in needs if n.partition(".")[0] not in modules.values()]
    here = [n for n in optional if not any(n in e.missing for e in registry.entries)]
    data = [e.reference for e in ready if e.kind == "dataset" and not _asks(e.component.options)]
    tasks: list[Task] = [
        ("import", "torch"),  # the first, as everything else stands on it
        *(("import", m) for m in modules.values() if m and m != "torch"),
        ("devices", ""),
        *(_choose_import(name, registry) for name in here),
        *dict.fromkeys(("component", e.component.build) for e in ready),
        *(("data", name) for name in data),
    ]
    answers = dict(zip(tasks, ask(tasks), strict=True))
    # A package that is broken breaks what imports it: it is told once.
    known = {a["error"] for (what, _), a in answers.items() if what in ("import", "load")
             and "error" in a}  # fmt: skip
    return [
        *_look_at_packages(modules, answers),
        *_look_at_devices(answers["devices", ""]),
        *_look_at_optional(optional, registry, answers),
        *_look_at_data(data, answers),
        *_look_at_runs(runs, store or runs / STORE),
        *_look_at_plugins(registry, answers, known),
    ]


def ask(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """The answers of `prunekit.cli.probe`; after a crash another process does what is left.

    Where the first task fails, the others are not tried: {"skipped": True}.
    """
    answers: list[dict[str, Any]] = []
    while len(answers) < len(tasks):
        rest = json.dumps(tasks[len(answers) :])
        command = [sys.executable, "-P", "-m", "prunekit.cli.probe", rest]
        try:
            done = subprocess.run(command, capture_output=True, timeout=PATIENCE)
            text, reason = done.stdout, _explain_end(done.returncode, done.stderr.decode())
        except subprocess.TimeoutExpired as late:
            text, reason = late.stdout or b"", f"no answer within {PATIENCE} seconds"
        whole = text[: text.rfind(b"\n") + 1]
        answers += [json.loads(line) for line in whole.decode().splitlines()]
        if len(answers) < len(tasks):
            answers.append({"error": reason})
        if "error" in answers[0]:
            return [answers[0], *[{"skipped": True}] * (len(tasks) - 1)]
    return answers


def _explain_end(code: int, errors: str) -> str:
    if code < 0:
        return f"crashes ({signal.Signals(-code).name})"
    last = errors.strip().splitlines()[-1:] or [""]
    return f"ends its process with exit code {code} {last[0]}".strip()


def _asks(options: type) -> bool:
    """Whether a recipe has to give an option."""
    return any(default_of(f) is dataclasses.MISSING for f in dataclasses.fields(options))


def _look_at_packages(
    modules: Mapping[str, str], answers: Mapping[Task, Mapping[str, Any]]
) -> Iterator[Finding]:
    topic = "versions"
    yield Finding(topic, "python", platform.python_version())
    yield Finding(topic, "prunekit", importlib.metadata.version("prunekit"))
    required = dict(read_requirements("prunekit"))
    for name, module in modules.items():
        if not module:
            yield Finding(topic, name, "not installed", True, f"pip install {name}")
            continue
        version = importlib.metadata.version(name)
        pinned = [
            (other, wanted)
            for other, wanted in read_requirements(name)
            if other in modules and modules[other] and "==" in wanted
            and not is_within(importlib.metadata.version(other), wanted)
        ]  # fmt: skip
        answer = answers["import", module]
        if not is_within(version, required[name]):
            told = f"{version}, prunekit needs {required[name]}"
            yield Finding(topic, name, told, True, f'pip install "{name}{required[name]}"')
        elif pinned:
            other, wanted = pinned[0]
            told = f"{version} belongs to {other} {wanted.lstrip('=')}, and here is " + (
                importlib.metadata.version(other)
            )
            yield Finding(topic, name, told, True, f"pip install --upgrade {name} {other}")
        elif "error" in answer:
            told = f"{version}, cannot be imported: {answer['error']}"
            way = f"pip install --force-reinstall --no-deps {name}=={version.partition('+')[0]}"
            yield Finding(topic, name, told, True, way)
        else:
            yield Finding(topic, name, version)


def _choose_import(name: str, registry: Registry) -> Task:
    """How an optional part is imported: as a component that needs it says, or plainly."""
    ways = [e.component.loads for e in registry.entries if name in e.component.needs]
    way = next(filter(None, ways), None)
    return ("load", way) if way else ("import", name)


def _look_at_optional(
    names: Sequence[str], registry: Registry, answers: Mapping[Task, Mapping[str, Any]]
) -> Iterator[Finding]:
    topic = "optional parts"
    for name in names:
        needing = [e for e in registry.entries if name in e.component.needs]
        users = [f"{e.kind} {e.component.name}" for e in needing]
        command = next((e.component.install for e in needing if e.component.install), "")
        what = ", ".join(users[:3]) + (f" and {len(users) - 3} more" if len(users) > 3 else "")
        answer = answers.get(_choose_import(name, registry))
        if answer is None:
            told = f"not installed; for {what}"
            yield Finding(topic, name, told, mend=command or f"pip install {name}")
        elif "error" in answer:
            told = f"cannot be imported: {answer['error']}; for {what}"
            again = f"{command} --force-reinstall" if command else ""
            mend = again or f"pip install --force-reinstall {name}"
            yield Finding(topic, name, told, True, mend)
        else:
            owner = find_distributions().get(name.partition(".")[0], [name])[0]
            try:
                version = importlib.metadata.version(owner)
            except importlib.metadata.PackageNotFoundError:
                version = answer.get("version") or "installed"
            yield Finding(topic, name, f"{version}, for {what}")


# Devices, data, runs
def _look_at_devices(answer: Mapping[str, Any]) -> Iterator[Finding]:
    topic = "devices"
    if "threads" not in answer:
        yield Finding(topic, "all", answer.get("error", "not looked at, as torch is broken"),
                      "error" in answer, "pip install --force-reinstall torch")  # fmt: skip
        return
    yield Finding(topic, "cpu", f"{answer['threads']} threads, {answer['processors']} processors")
    built = f"torch is built for CUDA {answer['cuda_version']}"
    if not answer["cuda_version"]:
        built = "torch is built without CUDA"
    yield Finding(topic, "cuda", ", ".join(answer["cuda"]) or f"none ({built})")
    yield Finding(topic, "mps", "here" if answer["mps"] else "none")
    for reason in answer["broken"]:
        way = f"update the driver, or install a torch that suits it ({built}), or use --device cpu"
        yield Finding(topic, "cuda", " ".join(reason.split()), True, way)


def _look_at_data(
    names: Sequence[str], answers: Mapping[Task, Mapping[str, Any]]
) -> Iterator[Finding]:
    topic = f"data sets in {os.environ.get('PRUNEKIT_DATA') or '.data'}"
    for name in names:
        answer = answers["data", name]
        if "train" in answer:
            shape = "x".join(map(str, answer["shape"]))
            told = f"{answer['train']:,} training and {answer['test']:,} test images, {shape}"
            yield Finding(topic, name, told)
        elif "error" in answer:
            told, _, way = answer["error"].partition("; ")
            yield Finding(topic, name, told, True, way)
        else:
            told = "not looked at, as torch is broken" if "skipped" in answer else "not here"
            yield Finding(topic, name, told)


def _look_at_runs(runs: Path, root: Path) -> Iterator[Finding]:
    for name, folder in (("runs", runs), ("store", root)):
        existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        told, reason = "not there yet; it can be made", ""
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            reason = error.strerror or str(error)
        if folder.is_dir():
            told = "here, and can be written"
        if name == "store" and folder.is_dir():
            told = _describe_store(folder)
        if reason:
            told = f"cannot be written: {relative(existing)}: {reason}"
        free = shutil.disk_usage(existing if existing.is_dir() else existing.parent).free
        way = "give --out and --store a folder that can be written, or change its permissions"
        told += f"; {free / 1e9:,.0f} GB free"
        where = f"{name} ({relative(folder)})"
        yield Finding("folders", where, told, bool(reason), way if reason else "")


def _describe_store(root: Path) -> str:
    # What may not be looked into is passed over.
    _, stages, _ = next(os.walk(Store(root).stages), ("", [], []))
    done = sum(Store(root).is_done(name) for name in stages)
    size = 0
    for folder, _, files in os.walk(root):
        for name in files:
            with suppress(OSError):
                size += os.lstat(os.path.join(folder, name)).st_size
    half = f", {len(stages) - done} begun" if len(stages) > done else ""
    return f"{done} stages done{half}, {size / 1e6:,.1f} MB"


def _look_at_plugins(
    registry: Registry, answers: Mapping[Task, Mapping[str, Any]], known: set[str]
) -> Iterator[Finding]:
    topic = "plugins"
    for owner in dict.fromkeys(e.owner for e in registry.entries):
        entries = [e for e in registry.entries if e.owner == owner]
        broken = [e for e in entries if e.problem]
        told = f"{len(entries)} components"
        reasons: dict[str, str] = {}
        for entry in entries:
            error = answers.get(("component", entry.component.build), {}).get("error")
            if error and error not in known:
                reasons.setdefault(error, f"{entry.kind} {entry.component.name}")
        yield Finding(topic, owner, told)
        for error, first in reasons.items():
            told = f"{first} cannot be imported: {error}"
            yield Finding(topic, owner, told, True, _mend(entries[0].distribution, error))
        for entry in broken:
            told = f"{entry.kind} {entry.component.name}: {entry.problem}"
            yield Finding(topic, owner, told, True, f"pip uninstall {entry.distribution.split()[0]}"
                          if not entry.ours else f'write "{entry.reference}"')  # fmt: skip
    for plugin in registry.broken:
        yield Finding(
            topic, plugin.owner, plugin.reason, True, _mend(plugin.distribution, plugin.reason)
        )


def _mend(distribution: str, reason: str) -> str:
    """What mends a plugin that fails for this reason."""
    name = distribution.partition(" ")[0]
    missing = re.search(r"No module named '(\w+)[.\w]*'$", reason)
    if missing and importlib.util.find_spec(missing[1]) is None:
        return f"pip install {missing[1]}"
    if name == "prunekit" or reason.endswith("update prunekit"):
        return "pip install --upgrade prunekit"
    if name == "unknown":
        return "remove its entry point"
    return f"pip install --upgrade {name}, or pip uninstall {name}"


def render(findings: Sequence[Finding]) -> str:
    """The findings for a reader, topic by topic; what is broken again at the end."""
    lines = []
    for topic in dict.fromkeys(f.topic for f in findings):
        chosen = [f for f in findings if f.topic == topic]
        width = max(len(f.name) for f in chosen)
        lines.append(topic)
        for f in chosen:
            lines.append(f"  {f.name:<{width}}  {'BROKEN: ' if f.broken else ''}{f.told}")
            if f.mend:
                lines.append(f"  {'':<{width}}  {'mend it' if f.broken else 'get it'}: {f.mend}")
        lines.append("")
    broken = sum(f.broken for f in findings)
    return "\n".join([*lines, f"{broken} broken" if broken else "nothing is broken"])
