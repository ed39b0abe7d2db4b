"""`prunekit doctor`: what is installed, what is broken, and the command that fixes it."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prunekit.catalog.containment import held
from prunekit.catalog.kinds import DEFAULT_BACKEND, BackendComponent
from prunekit.catalog.registry import Registry, load_registry
from prunekit.cli.group import PATH, as_json, count, echo, print_json
from prunekit.errors import UserError, explain_briefly, relative

if TYPE_CHECKING:
    from packaging.requirements import Requirement


@dataclass(frozen=True)
class Finding:
    """One thing that was checked. If it is broken, `mend` says how to fix it."""

    topic: str
    name: str
    told: str = ""
    broken: bool = False
    mend: str = ""
    trial: str = ""
    """A module to import or "module:function" to call in another process, because it may crash."""


@click.command()
@click.option(
    "--calibrate", type=PATH, help="Measure what sparse layers cost here, into this file."
)
@as_json
def doctor(calibrate: Path | None, as_json: bool) -> None:
    """Check this installation: versions, devices, plugins; show how to fix what is broken.

    The exit code is 1 if something is broken.
    """
    if calibrate is not None:
        _calibrate(calibrate, load_registry())
        return
    findings = diagnose(load_registry())
    broken = sum(finding.broken for finding in findings)
    if as_json:
        shown = [{k: v for k, v in vars(f).items() if k != "trial"} for f in findings]
        print_json({"broken": broken, "findings": shown})
    else:
        echo(render(findings))
    if broken:
        click.get_current_context().exit(1)


def _calibrate(file: Path, registry: Registry) -> None:
    """Write what the backend that is installed measures of this machine."""
    from prunekit.store.files import write_text

    entry = registry.find("backend", DEFAULT_BACKEND)
    component = entry.component
    assert isinstance(component, BackendComponent)
    if file.exists():
        raise UserError(f"{relative(file)} exists; write another name")
    module, _, function = component.calibrate.partition(":")
    with held():
        text = getattr(importlib.import_module(module), function)()
    write_text(file, text)
    echo(f"{relative(file)} has what layers cost here; write in a recipe:")
    echo(f'[compute]\nbackend = {{ use = "{component.name}", costs = "{relative(file)}" }}')


def diagnose(registry: Registry) -> list[Finding]:
    """Check everything. Nothing that is broken raises an exception or crashes this process."""
    found = [*_check_versions(), *_check_plugins(registry)]
    answers = try_out([f.trial for f in found if f.trial])
    reported: set[str] = set()
    findings = []
    for finding in found:
        if finding.trial:
            told, broken = answers[finding.trial]
            # What imports a broken package fails with the same error, which is reported once.
            if broken and told not in reported:
                reported.add(told)
                finding = replace(finding, told=told, broken=True)
            else:
                finding = replace(finding, told=finding.told or told, mend="")
        # Importing the code of a component is worth a line only if it fails.
        if finding.told:
            findings.append(finding)
    return findings


def _check_versions() -> Iterator[Finding]:
    yield Finding("versions", "python", platform.python_version())
    yield Finding("versions", "prunekit", _version_of("prunekit"))
    required = {r.name: r for r in _read_requirements("prunekit")}
    # torch is tried first because other packages import it.
    for name, wanted in sorted(required.items(), key=lambda item: item[0] != "torch"):
        version = _version_of(name)
        told, way = version, f"pip install --upgrade {name}"
        if not version:
            told, way = "not installed", f"pip install {name}"
        elif not wanted.specifier.contains(version, prereleases=True):
            told, way = f"{version}, prunekit needs {wanted}", f'pip install "{wanted}"'
        if told != version:
            yield Finding("versions", name, told, True, way)
        elif name in ("torch", "torchvision", "timm"):  # their compiled code can crash
            together = "pip install --upgrade torch torchvision timm"
            yield Finding("versions", name, told, mend=together, trial=name)
        else:
            yield Finding("versions", name, told)
    way, trial = "update the driver, or use --device cpu", f"{__spec__.name}:describe_devices"
    yield Finding("versions", "devices", mend=way, trial=trial)


def _read_requirements(distribution: str) -> list[Requirement]:
    """What a distribution requires on this machine, apart from its extras."""
    from packaging.requirements import Requirement  # slow to import for `prunekit --help`

    found = map(Requirement, importlib.metadata.requires(distribution) or ())
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _check_plugins(registry: Registry) -> Iterator[Finding]:
    owners = importlib.metadata.packages_distributions()
    always = {r.name for r in _read_requirements("prunekit")}
    for name in dict.fromkeys(n for e in registry.entries for n in e.component.needs):
        if always & set(owners.get(name, ())):
            continue
        needing = [e for e in registry.entries if name in e.component.needs]
        users = ", ".join(f"{e.kind} {e.component.name}" for e in needing)
        way = next(filter(None, (e.component.install for e in needing)), f"pip install {name}")
        trial = next(filter(None, (e.component.loads for e in needing)), name)
        if name in needing[0].missing:
            yield Finding("optional parts", name, f"not installed; for {users}", mend=way)
        else:
            yield Finding("optional parts", name, f"installed; for {users}", mend=way, trial=trial)
    version, way = _version_of("matplotlib"), "pip install matplotlib"
    told = f"{version or 'not installed'}; for prunekit curve"
    yield Finding("optional parts", "matplotlib", told, mend="" if version else way)
    for owner in dict.fromkeys(e.owner for e in registry.entries):
        entries = [e for e in registry.entries if e.owner == owner]
        yield Finding("plugins", owner, count(len(entries), "component"))
        for entry in entries:
            name = f"{owner}: {entry.kind} {entry.component.name}"
            if entry.problem:
                yield Finding("plugins", name, entry.problem, True, f'write "{entry.reference}"')
            elif not entry.missing:
                module = entry.component.build.partition(":")[0]
                yield Finding("plugins", name, mend=_upgrade(entry.distribution), trial=module)
    for plugin in registry.broken:
        ours = plugin.reason.endswith("update prunekit")
        way = _upgrade("prunekit" if ours else plugin.distribution)
        yield Finding("plugins", plugin.owner, plugin.reason, True, way)


def _upgrade(distribution: str) -> str:
    name = distribution.partition(" ")[0]
    way = f"pip install --upgrade {name}"
    return way if name == "prunekit" else f"{way}, or pip uninstall {name}"


def try_out(trials: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """Trial -> (what to tell, whether it is broken), found out by another process.

    If that process dies, the trial that it was at is broken, and later ones are not tried.
    """
    trials = list(dict.fromkeys(trials))
    command = [sys.executable, "-P", "-m", "prunekit.cli.doctor", *trials]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    answers = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    if len(answers) < len(trials):
        code, broken = done.returncode, trials[len(answers)]
        how = f"exits with code {code}" if code >= 0 else f"crashes ({signal.Signals(-code).name})"
        answers.append((f"its import {how}", True))
        answers += [(f"not tried because {broken} is broken", False)] * len(trials)
    return dict(zip(trials, answers, strict=False))


def _try(trial: str) -> tuple[str, bool]:
    """In the other process: import the module, and call the function if there is one."""
    module, _, function = trial.partition(":")
    try:
        with held():
            found = importlib.import_module(module)
            told = getattr(found, function)() if function else ""
        return told if isinstance(told, str) else "", False
    except Exception as error:
        return f"cannot be imported: {explain_briefly(error)}", True


def describe_devices() -> str:
    """The devices that torch can use. Raises what torch raises when it computes on a GPU."""
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
    """The findings as text, topic by topic, and at the end how many are broken."""
    lines = []
    for topic in dict.fromkeys(f.topic for f in findings):
        chosen = [f for f in findings if f.topic == topic]
        width = max(len(f.name) for f in chosen)
        lines.append(topic)
        for f in chosen:
            lines.append(f"  {f.name:<{width}}  {'BROKEN: ' if f.broken else ''}{f.told}")
            if f.mend:
                lines.append(f"  {'':<{width}}  {'fix it' if f.broken else 'install it'}: {f.mend}")
        lines.append("")
    broken = sum(f.broken for f in findings)
    return "\n".join([*lines, f"{broken} broken" if broken else "nothing is broken"])


if __name__ == "__main__":
    # What libraries print must not mix with the answers.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for trial in sys.argv[1:]:
            print(json.dumps(_try(trial)), file=answers, flush=True)
