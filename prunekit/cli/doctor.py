"""`prunekit doctor`: what is here, what is broken, and the command that mends it."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
from packaging.requirements import Requirement

from prunekit.catalog.registry import Registry, load_registry
from prunekit.cli.group import as_json, count, print_json
from prunekit.errors import relative
from prunekit.store.layout import STORE


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. Where it is broken, `mend` says what to do."""

    topic: str
    name: str
    told: str = ""
    broken: bool = False
    mend: str = ""
    trial: str = ""
    """A module to import, or "module:function" to call, in another process; it may crash."""


@click.command()
@click.argument("runs", type=click.Path(path_type=Path), default="runs")
@as_json
def doctor(runs: Path, as_json: bool) -> None:
    """Look at this installation: versions, devices, plugins; what is broken, what mends it.

    Exit code 1 where something is broken.
    """
    findings = diagnose(load_registry(), runs)
    broken = sum(finding.broken for finding in findings)
    if as_json:
        shown = [{k: v for k, v in vars(f).items() if k != "trial"} for f in findings]
        print_json({"broken": broken, "findings": shown})
    else:
        click.echo(render(findings))
    if broken:
        sys.exit(1)


def diagnose(registry: Registry, runs: Path) -> list[Finding]:
    """Look at everything; nothing that is broken raises, or crashes this process."""
    found = [*_look_at_versions(), *_look_at_plugins(registry), *_look_at_folders(runs)]
    answers = try_out([f.trial for f in found if f.trial])
    known: set[str] = set()
    findings = []
    for finding in found:
        if finding.trial:
            told, broken = answers[finding.trial]
            # A package that is broken breaks what imports it: it is told once.
            broken = broken and told not in known
            known |= {told} if broken else set()
            told = told if broken or not finding.told else finding.told
            mend = finding.mend if broken else ""
            finding = replace(finding, told=told, broken=broken, mend=mend)
        # Of what builds a component only a failure is worth a line.
        if finding.told:
            findings.append(finding)
    return findings


def _look_at_versions() -> Iterator[Finding]:
    yield Finding("versions", "python", platform.python_version())
    yield Finding("versions", "prunekit", _version_of("prunekit"))
    required = {r.name: r for r in _read_requirements("prunekit")}
    # Others stand on torch, so that it is tried first.
    for name, wanted in sorted(required.items(), key=lambda item: item[0] != "torch"):
        version = _version_of(name)
        told, way = version, f"pip install --upgrade {name}"
        if not version:
            told, way = "not installed", f"pip install {name}"
        elif not wanted.specifier.contains(version, prereleases=True):
            told, way = f"{version}, prunekit needs {wanted}", f'pip install "{wanted}"'
        for other in _read_requirements(name) if version else ():
            here = _version_of(other.name)
            if other.name in required and not other.specifier.contains(here, prereleases=True):
                told = f"{version} belongs to {other}, and here is {here}"
                way = f"pip install --upgrade {name} {other.name}"
        broken = told != version
        # These three are what can crash.
        trial = name if name in ("torch", "torchvision", "timm") and not broken else ""
        yield Finding("versions", name, told, broken, way if broken or trial else "", trial)
    way, trial = "update the driver, or use --device cpu", f"{__spec__.name}:describe_devices"
    yield Finding("versions", "devices", mend=way, trial=trial)


def _read_requirements(distribution: str) -> list[Requirement]:
    """What a distribution requires on this machine, without any extra."""
    found = map(Requirement, importlib.metadata.requires(distribution) or ())
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _look_at_plugins(registry: Registry) -> Iterator[Finding]:
    owners = importlib.metadata.packages_distributions()
    always = {r.name for r in _read_requirements("prunekit")}
    for name in dict.fromkeys(n for e in registry.entries for n in e.component.needs):
        if always & set(owners.get(name, ())):
            continue
        needing = [e for e in registry.entries if name in e.component.needs]
        users = ", ".join(f"{e.kind} {e.component.name}" for e in needing)
        way = next(filter(None, (e.component.install for e in needing)), f"pip install {name}")
        trial = next(filter(None, (e.component.loads for e in needing)), name)
        here = name not in needing[0].missing
        told = f"{'here' if here else 'not installed'}; for {users}"
        yield Finding("optional parts", name, told, mend=way, trial=trial if here else "")
    for owner in dict.fromkeys(e.owner for e in registry.entries):
        entries = [e for e in registry.entries if e.owner == owner]
        yield Finding("plugins", owner, count(len(entries), "component"))
        for entry in entries:
            name = f"{owner}: {entry.kind} {entry.component.name}"
            if entry.problem:
                yield Finding("plugins", name, entry.problem, True, f'write "{entry.reference}"')
            elif not entry.missing:
                module = entry.component.build.partition(":")[0]
                yield Finding("plugins", name, mend=_renew(entry.distribution), trial=module)
    for plugin in registry.broken:
        ours = plugin.reason.endswith("update prunekit")
        way = _renew("prunekit" if ours else plugin.distribution)
        yield Finding("plugins", plugin.owner, plugin.reason, True, way)


def _renew(distribution: str) -> str:
    name = distribution.partition(" ")[0]
    way = f"pip install --upgrade {name}"
    return way if name == "prunekit" else f"{way}, or pip uninstall {name}"


def _look_at_folders(runs: Path) -> Iterator[Finding]:
    for name, folder in (("runs", runs), ("store", runs / STORE)):
        existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        where, told, way = f"{name} ({relative(folder)})", "", ""
        try:
            with tempfile.TemporaryFile(dir=existing):
                free = shutil.disk_usage(existing).free
                told = f"can be written; {free / 1e9:,.0f} GB free"
        except OSError as error:
            told = f"cannot be written: {relative(existing)}: {error.strerror or error}"
            way = "give --out and --store another folder, or change its permissions"
        yield Finding("folders", where, told, bool(way), way)


def try_out(trials: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """Trial -> (what is told, whether it is broken), by another process.

    Where that one dies, the trial it was at is broken, and those behind it are not tried.
    """
    trials = list(dict.fromkeys(trials))
    command = [sys.executable, "-P", "-m", "prunekit.cli.doctor", *trials]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    if len(answers) < len(trials):
        code = done.returncode
        how = (
            f"crashes ({signal.Signals(-code).name})" if code < 0 else f"ends with exit code {code}"
        )
        answers.append((f"its import {how}", True))
    skipped = (f"not looked at, as {trials[len(answers) - 1]} is broken", False)
    answers += [skipped] * (len(trials) - len(answers))
    return {trial: tuple(answer) for trial, answer in zip(trials, answers, strict=True)}


def _try(trial: str) -> tuple[str, bool]:
    """In the other process: import, and call what is to be called."""
    module, _, function = trial.partition(":")
    try:
        found = importlib.import_module(module)
        told = getattr(found, function)() if function else ""
        return told if isinstance(told, str) else "", False
    # A package may raise anything at import, SystemExit included.
    except (Exception, SystemExit) as error:
        return " ".join(f"cannot be imported: {type(error).__name__}: {error}".split()), True


def describe_devices() -> str:
    """What torch can compute on; something is computed on each. Raises what a GPU raises."""
    import torch

    threads = f"cpu with {torch.get_num_threads()} of {os.cpu_count()} threads"
    found = [threads, *(["mps"] if torch.backends.mps.is_available() else [])]
    if not torch.cuda.is_available():
        return f"{', '.join(found)}; no cuda (torch is built for CUDA {torch.version.cuda})"
    for number in range(torch.cuda.device_count()):
        torch.ones(2, device=f"cuda:{number}").sum().item()
        found.append(f"cuda:{number} {torch.cuda.get_device_name(number)}")
    return ", ".join(found)


def render(findings: Sequence[Finding]) -> str:
    """The findings for a reader, topic by topic; how many are broken at the end."""
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


if __name__ == "__main__":
    # What libraries print must not come between the answers.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for trial in sys.argv[1:]:
            print(json.dumps(_try(trial)), file=answers, flush=True)
