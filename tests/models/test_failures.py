"""A third party's plugin fails, in every way and at every moment: named, contained, resumable."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from prunekit.catalog.registry import load_registry
from prunekit.cli.group import main
from prunekit.store.keys import hash_source

OWNER = "signs (acme-signs 2.5)"

DECLARATION = """
from dataclasses import dataclass
from prunekit import Facts, hookimpl, option
from prunekit.catalog.kinds import KINDS

PRUNEKIT_API = 3

@dataclass(frozen=True)
class Options:
    size: int = option(1, help="a number")

    def __post_init__(self):
        if self.size == 13:
            raise KeyError("thirteen")

def declare(kind, **more):
    return KINDS[kind](name="signs", summary="Signs", build=f"acme_signs.parts:{kind}",
                       options=Options, **more)

@hookimpl
def prunekit_objectives():
    yield declare("objective")

@hookimpl
def prunekit_pruners():
    yield declare("pruner")

@hookimpl
def prunekit_architectures():
    yield declare("architecture")

@hookimpl
def prunekit_datasets():
    yield declare("dataset")

@hookimpl
def prunekit_evaluators():
    yield declare("evaluator")

@hookimpl
def prunekit_reporters():
    yield declare("reporter")
"""

PARTS = """
import torch
from torch import nn
from prunekit.contracts import Data, Loss, Result, Scores
from prunekit import Arrays

def fail_at(moment):
    print("what a plugin says at", moment)
    fail(moment)

def fail(moment):
    pass

def objective(options, context):
    fail_at("build objective")
    def step(x, y, clock):
        fail_at("training")
        logits = context.model(x)
        return Loss(nn.functional.cross_entropy(logits, y), logits)
    return step

def pruner(options, context):
    fail_at("build pruner")
    def score(context):
        fail_at("pruning")
        return Scores({n: w.clone() for n, w in context.weights.items()})
    return score

def architecture(options, context):
    fail_at("build architecture")
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 2))
        def forward(self, x):
            fail_at("forward")
            return self.inner(x)
    return Net()

def dataset(options, context):
    fail_at("build dataset")
    images = torch.zeros(32, 1, 4, 4, dtype=torch.uint8)
    return Data(Arrays(images, torch.arange(32) % 2), Arrays(images[:8], torch.arange(8) % 2),
                (1, 4, 4), 2)

def evaluator(options, context):
    fail_at("build evaluator")
    def evaluate(model, batches):
        fail_at("evaluation")
        return Result({"n": float(sum(len(y) for x, y in batches))})
    return evaluate

def reporter(options, context):
    fail_at("build reporter")
    return lambda event: fail_at("report")
"""

RECIPE = """
name = "signs"
dataset = "signs"
architecture = "signs"
objective = "signs"
report = ["signs", "jsonl"]
[[stage]]
kind = "pretrain"
epochs = 1
[[stage]]
kind = "prune"
sparsity = 0.5
pruner = "signs"
[[stage]]
kind = "evaluate"
with = ["signs"]
"""


class Package:
    """The third party's package, its distribution beside it, installed by a path."""

    def __init__(self, folder):
        self.declaration = folder / "acme_signs/__init__.py"
        self.parts = folder / "acme_signs/parts.py"
        self.parts.parent.mkdir()
        info = folder / "acme_signs-2.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-signs\nVersion: 2.5\n")
        (info / "entry_points.txt").write_text("[prunekit]\nsigns = acme_signs\n")
        self.write()

    def write(self, declaration=DECLARATION, parts=PARTS):
        self.declaration.write_text(declaration)
        self.parts.write_text(parts)
        hash_source.cache_clear()
        for name in [n for n in sys.modules if n.partition(".")[0] == "acme_signs"]:
            del sys.modules[name]

    def fail(self, moment, error="ValueError('on purpose')"):
        body = f"    if moment == {moment!r}:\n        raise {error}\n"
        self.write(parts=PARTS.replace("def fail(moment):\n    pass\n",
                                       f"def fail(moment):\n{body}"))  # fmt: skip


@pytest.fixture
def package(tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    made = Package(site)
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRUNEKIT_STORE", raising=False)
    (tmp_path / "r.toml").write_text(RECIPE)
    yield made
    made.write()


def call(*arguments, code=0):
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done


def run(*arguments, code=0):
    return call("run", "r.toml", "--device", "cpu", *arguments, code=code)


def read_record():
    return json.loads(Path("runs/signs/run.json").read_text())


MOMENTS = {
    "build dataset": "SystemExit", "build architecture": "ValueError", "forward": "ValueError",
    "build objective": "ValueError", "training": "SystemExit", "build pruner": "ValueError",
    "pruning": "ValueError", "build evaluator": "ValueError", "evaluation": "SystemExit",
}  # fmt: skip


@pytest.mark.parametrize(("moment", "kind"), MOMENTS.items())
def test_a_failing_run_names_the_plugin_and_goes_on_once_it_is_mended(package, moment, kind):
    package.fail(moment, f"{kind}('on purpose')")
    done = run(code=1)
    told = f"plugin {OWNER} failed: {kind}: on purpose (--debug shows where)"
    if moment == "forward":  # tried when the network is built
        told = (
            f"rehearsal, one batch a stage: architecture 'signs' of plugin {OWNER} cannot take "
            f"images of 1 x 4 x 4: {kind}: on purpose"
        )
    assert done.stderr.splitlines()[-1] == f"prunekit: the run failed: {told}"
    record = read_record()
    assert (record["status"], record["error"]) == ("failed", told)
    package.write()
    run()
    assert read_record()["status"] == "done"


def test_what_was_computed_before_a_failure_is_kept(package):
    """The evaluator is of another package than what was trained: mending it changes no key."""
    recipe = RECIPE
    for section, ours in (
        ("dataset", "digits"),
        ("architecture", "lin-2"),
        ("objective", "benign"),
    ):
        recipe = recipe.replace(f'{section} = "signs"', f'{section} = "{ours}"')
    Path("r.toml").write_text(recipe.replace('pruner = "signs"', 'pruner = "lwm"'))
    # Not in the rehearsal, whose one batch has fewer images.
    package.write(parts=PARTS.replace(
        'float(sum(len(y) for x, y in batches))', 'fail_late(sum(len(y) for x, y in batches))'
    ) + "\ndef fail_late(n):\n    return n if n < 200 else 1 / 0\n")  # fmt: skip
    done = run(code=1)
    assert f"plugin {OWNER} failed: ZeroDivisionError" in done.stderr
    package.write()
    run()
    record = read_record()
    assert [s["reused"] for s in record["stages"]] == [True, True, False]


@pytest.mark.parametrize(
    ("moment", "error"),
    [("build reporter", "ValueError('on\\npurpose')"), ("report", "SystemExit('on purpose')")],
)
def test_a_failing_reporter_is_left_out_and_the_run_goes_on(package, moment, error):
    package.fail(moment, error)
    done = run()
    (line,) = [line for line in done.stderr.splitlines() if "goes on without" in line]
    kind = error.partition("(")[0]
    assert line == (
        f"reporter 'signs' of plugin {OWNER} failed: {kind}: on purpose; the run goes on without it"
    )
    assert read_record()["status"] == "done"
    assert "evaluate" in Path("runs/signs/metrics.jsonl").read_text()


def test_a_reporter_that_says_what_to_mend_stops_before_anything_is_done(package):
    package.fail("build reporter", '__import__("prunekit").UserError("log in first")')
    done = run(code=2)
    assert done.stderr.splitlines()[-1] == "prunekit: log in first"


@pytest.mark.parametrize(
    "broken", ["raise RuntimeError('no\\nluck')", "raise SystemExit('no luck')", "def x(:\n    1"]
)
def test_an_implementation_that_cannot_be_imported(package, broken):
    package.write(parts=broken)
    assert "ready" in call("list", "pruners").stdout
    done = run(code=1)
    reporter, *_, last = done.stderr.splitlines()
    assert reporter.startswith(f"reporter 'signs' of plugin {OWNER} cannot be loaded: ")
    assert f"dataset 'signs' of plugin {OWNER} cannot be loaded: " in last
    package.write()
    run()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("def pruner(options, context)", "def pruner(options)"),
        ("def pruner(options, context)", "pruner = 3\ndef other(options, context)"),
    ],
)
def test_something_that_cannot_build(package, old, new):
    package.write(parts=PARTS.replace(old, new))
    assert run(code=1).stderr.splitlines()[-1].endswith(
        f"pruner 'signs' of plugin {OWNER} cannot be built: acme_signs.parts:pruner must be a "
        "function that can be called as build(options, context)"
    )  # fmt: skip


def test_a_function_with_other_arguments_is_traced_to_the_plugins_in_use(package):
    package.write(parts=PARTS.replace("def step(x, y, clock)", "def step(x, y)"))
    error = run(code=1).stderr.splitlines()[-1]
    assert "TypeError: " in error
    assert error.endswith(f"(plugins in use: {OWNER}; --debug shows where)")


def test_options_that_raise_name_the_plugin(package):
    done = run("--set", 'objective={use="signs", size=13}', code=2)
    assert f"objective 'signs' of plugin {OWNER} rejects its options: KeyError: 'thirteen'" in (
        done.stderr
    )


@pytest.mark.parametrize("moment", ["build architecture", "build dataset"])
def test_a_dry_run_and_an_import_name_the_plugin(package, moment, tmp_path):
    package.fail(moment)
    Path("x.pt").touch()
    told = f"prunekit: plugin {OWNER} failed: ValueError: on purpose (--debug shows where)"
    assert run("--dry-run", code=1).stderr.splitlines()[-1] == told
    done = call("import", "dense", "x.pt", "--model", "signs", "--dataset", "signs", code=1)
    assert done.stderr.splitlines()[-1] == told


def test_stored_results_are_told_when_the_plugin_is_broken_by_now(package):
    first = run()
    package.fail("build dataset")
    again = run()
    assert again.stdout == first.stdout
    package.write(declaration="1 / 0")
    assert call("results").stdout == first.stdout


# Declarations


def broken(package, declaration):
    package.write(declaration=declaration)
    registry = load_registry()
    assert registry.names("pruner")
    (found,) = registry.broken
    assert found.owner == OWNER
    return found.reason


def test_a_plugin_for_another_version_of_the_api(package):
    for version, way in ((4, "update prunekit"), (2, "update the plugin")):
        text = DECLARATION.replace("PRUNEKIT_API = 3", f"PRUNEKIT_API = {version}")
        reason = f"written for plugin API {version}, this prunekit has 3; {way}"
        assert broken(package, text) == reason
        # One for a later API may ask for what there is not yet.
        assert broken(package, "import prunekit.nothing\n" + text) == reason
    text = DECLARATION.replace("PRUNEKIT_API = 3", "PRUNEKIT_API = '1'")
    assert broken(package, text) == "PRUNEKIT_API is '1'; write PRUNEKIT_API = 3"
    assert broken(package, "import prunekit.nothing\n" + DECLARATION) == (
        "ModuleNotFoundError: No module named 'prunekit.nothing'; plugins import from "
        "`prunekit` and the modules beside it, as docs/plugins.md says"
    )
    package.write(declaration=DECLARATION.replace("PRUNEKIT_API = 3", ""))
    assert not load_registry().broken


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("needs='torch'", "TypeError: needs of 'signs' is 'torch'; write (\"...\",)"),
        ("sources=(3,)", "TypeError: sources of 'signs' is (3,); write (\"...\",)"),
    ],
)
def test_a_declaration_of_the_wrong_type(package, more, reason):
    text = DECLARATION.replace('declare("pruner")', f'declare("pruner", {more})')
    assert broken(package, text) == reason
