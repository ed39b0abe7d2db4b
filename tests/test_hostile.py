"""Whatever stands in a recipe, a header or a run folder: one line that names the file, or a result.

The quick form is part of the tests; the long one tries 10,000 of each:
HYPOTHESIS_PROFILE=long pytest tests/test_hostile.py -n 0
"""

import copy
import io
import json
import os
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunekit.catalog.registry import load_registry
from prunekit.cli.group import main
from prunekit.engine.eval_plan import EvalRequest, plan_evaluation
from prunekit.errors import UserError
from prunekit.models.stored import load_network
from prunekit.recipe.toml.lines import Unfit, find_lines
from prunekit.results.curves import find_curves
from prunekit.store.networks import read_network

COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
settings.register_profile("quick", max_examples=200, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=10_000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

SECONDS = 20
"""The longest that any of them may take."""

RECIPE = {
    "name": "t",
    "seed": 1,
    "dataset": {"use": "digits", "fraction": 0.1, "batch_size": 64},
    "architecture": {"use": "small-cnn"},
    "threat": {"norm": "linf", "eps": "8/255"},
    "objective": {"use": "trades"},
    "report": ["console"],
    "stage": [
        {"kind": "pretrain", "epochs": 2, "optimizer": {"use": "sgd", "lr": 0.1}},
        {"kind": "prune", "sparsity": 0.9, "epochs": 1, "pruner": "score"},
        {"kind": "evaluate", "name": "e", "images": 40, "with": ["clean", {"use": "pgd"}]},
    ],
    "sweep": {"seed": [0, 1], "case": [{"prune.sparsity": 0.9}, {"prune.sparsity": 0.8}]},
}
HEADER = {
    "format": 1,
    "architecture": {"use": "small-cnn", "batch_norm": False},
    "dataset": "digits",
    "threat": {"norm": "linf", "eps": 0.1},
    "classes": 10,
    "shape": [1, 8, 8],
    "seed": 3,
    "smoke": False,
    "sparsity": 0.9,
    "masked": ["0.weight"],
    "kept_zeros": {"0.weight": [0]},
    "stage": {"kind": "finetune", "options": {"epochs": 3}},
}
METRIC = {"value": 0.5, "n": 4, "low": 0.4, "high": 0.6, "unit": "fraction"}
RUN = {
    "format": 2,
    "name": "x",
    "status": "done",
    "smoke": False,
    "seed": 1,
    "number": 0,
    "settings": {"prune.sparsity": 0.9, "prune.pruner": {"use": "score"}},
    "stages": [
        {"name": "e", "kind": "evaluate", "key": "k", "metrics": {"clean.accuracy": METRIC}},
        {"name": "f", "kind": "evaluate", "key": "l", "metrics": {"sparsity": 0.5}},
    ],
    "keys": ["k", "l"],
    "sparsity": {"layers": {"a": {"kept": 1, "weights": 10}}},
    "error": None,
}
STRANGE = [
    "\x1b[2J\x1b]0;x\x07", "\u202eabc", "\0", "a\nseed = 2", "=1+1", "-1", "[/b]", "{x}", "%s",
    "../../x", "/dev/zero", "/dev/stdin", "~nobody/x", "x" * 5000, "\ud800", "\u2028", "é", "",
]  # fmt: skip

texts = st.one_of(st.sampled_from(STRANGE), st.text(max_size=8))
numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, 1, -1, 2**63, 2**64, 10**400, 1e308, -1e308, 1e-320, True]),
)


def nested(leaves):
    """Values of these, in lists and tables."""
    keys = st.one_of(st.sampled_from(["use", "name", "kind", "value", "case", "with"]), texts)
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=6,
    )


plain = nested(st.one_of(texts, numbers, st.booleans()))
anything = nested(st.one_of(texts, numbers, st.booleans(), st.none()))


def deep(value, levels):
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def list_paths(value, path=()):
    yield path
    items = ()
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield from list_paths(inner, (*path, key))


@st.composite
def mutated(draw, base, values):
    """The base with up to three of its values replaced, removed, added to, or wrapped."""
    made = copy.deepcopy(base)
    for _ in range(draw(st.integers(0, 3))):
        *above, last = draw(st.sampled_from([p for p in list_paths(made) if p]))
        here = made
        for key in above:
            here = here[key]
        what = draw(st.sampled_from(["replace", "replace", "remove", "add", "wrap"]))
        if what == "replace":
            here[last] = draw(values)
        elif what == "remove":
            del here[last]
        elif what == "wrap":
            here[last] = deep(here[last], draw(st.sampled_from([1, 2, 40, 60])))
        elif isinstance(here, dict):
            here[draw(texts)] = draw(values)
        else:
            here.append(draw(values))
        if not made:
            break
    return made


@st.composite
def damaged(draw, contents):
    """The bytes, some of them cut off, exchanged or in another encoding."""
    content = draw(contents)
    what = draw(st.sampled_from(["none"] * 4 + ["cut", "insert", "mark", "wide", "anything"]))
    at = draw(st.integers(0, max(len(content), 1)))
    if what == "cut":
        return content[:at]
    if what == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at + 1 :]
    if what == "mark":
        return b"\xef\xbb\xbf" + content
    if what == "wide":
        return content.decode("utf-8", "surrogatepass").encode("utf-16", "surrogatepass")
    return draw(st.binary(max_size=200)) if what == "anything" else content


def write_json(value):
    return json.dumps(value).encode()


def write_toml(value):
    return tomli_w.dumps(value).encode("utf-8", "surrogatepass")


recipes = damaged(mutated(RECIPE, plain).map(write_toml)) | damaged(
    st.lists(
        st.sampled_from(
            ["a", ".", "=", "[", "]", "[[", "]]", "{", "}", ",", "\n", '"', "'", '"""', "'''",
             "\\", "#", "1", "1e999", "nan", "true", " ", "1979-05-27", "seed", "\r", "\x00"]
        ),
        max_size=40,
    ).map(lambda tokens: "".join(tokens).encode())
)  # fmt: skip
headers = damaged(mutated(HEADER, anything).map(write_json))
records = damaged(mutated(RUN, anything).map(write_json))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    old, made = Path.cwd(), tmp_path_factory.mktemp("hostile")
    registry = load_registry()
    patch = pytest.MonkeyPatch()
    # Loading the plugins takes more time than all the rest.
    for module in ("catalog.registry", "engine.eval_plan", "models.stored"):
        patch.setattr(f"prunekit.{module}.load_registry", lambda: registry)
    os.chdir(made)
    yield made
    os.chdir(old)
    patch.undo()


def call(file, *arguments):
    """Run the command, which either works or names the file in each line of its errors."""
    start = time.monotonic()
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert time.monotonic() - start < SECONDS
    assert done.exit_code in (0, 2), done.output
    for word in ("Traceback", "a bug in prunekit", "defect"):
        assert word not in done.output
    for line in done.stderr.splitlines() if done.exit_code else ():
        assert file in line, done.output
    assert "".join(c for c in done.output if c != "\n").isprintable(), done.output
    return done


@given(recipes)
def test_any_recipe_is_good_or_has_its_mistakes_listed(folder, content):
    (folder / "r.toml").write_bytes(content)
    done = call("r.toml", "check", "r.toml")
    assert done.exit_code == 2 or "r.toml: good (" in done.stdout


@given(mutated(RECIPE, plain))
def test_every_value_has_a_line(data):
    text = tomli_w.dumps(data)
    try:
        lines = find_lines(text)
    except Unfit:
        return
    assert lines.keys() == {path for path in list_paths(data) if path}


@given(headers, st.sampled_from([0, 0, 0, -1, 5, 2**40]))
def test_any_model_file_is_read_or_named(folder, content, extra):
    weights = np.zeros((16, 1, 3, 3), "<f4").tobytes()
    table = {
        "__metadata__": {"prunekit": content.decode("utf-8", "replace")},
        "0.weight": {"dtype": "F32", "shape": [16, 1, 3, 3], "data_offsets": [0, len(weights)]},
    }
    header = json.dumps(table).encode()
    length = struct.pack("<Q", max(0, len(header) + extra))
    file = folder / "m.safetensors"
    file.write_bytes(length + header + weights)
    start = time.monotonic()
    for read in (
        lambda network: plan_evaluation(network, EvalRequest(("clean",))),
        load_network,
    ):
        try:
            read(read_network(file))
        except UserError as error:
            assert "m.safetensors" in str(error)  # noqa: PT017
    assert time.monotonic() - start < SECONDS


@given(records, st.sampled_from(["", "--json", "--csv", "--layers"]))
def test_any_run_folder_is_shown_or_named(folder, content, option):
    shutil.rmtree(folder / "runs", ignore_errors=True)
    (folder / "runs/bad").mkdir(parents=True)
    (folder / "runs/bad/run.json").write_bytes(content)
    call("runs/bad/run.json", "results", "runs", *[option] * bool(option))
    call("runs/bad/run.json", "clean", "runs", "--dry-run")
    # Beside a good one it is left out.
    (folder / "runs/good").mkdir()
    (folder / "runs/good/run.json").write_text(json.dumps({**RUN, "name": "sound"}))
    assert call("run.json", "results", "runs", "--json").exit_code == 0


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
arrays = st.builds(
    lambda shape, kind, value: np.full(shape, value).astype(kind),
    shapes,
    st.sampled_from(["f4", "f8", "i8", "?", "U3", "c8", "M8[s]"]),
    st.sampled_from([0, 1]),
)


@given(st.data())
def test_any_records_are_drawn_or_named(folder, data):
    names = st.sampled_from(["e/c.radius", "e/c.correct", "e/d.radius", "x"])
    buffer = io.BytesIO()
    np.savez(buffer, **data.draw(st.dictionaries(names, arrays, max_size=4)))
    shutil.rmtree(folder / "runs", ignore_errors=True)
    (folder / "runs").mkdir()
    (folder / "runs/run.json").write_text(json.dumps(RUN))
    content = buffer.getvalue()
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content) - 1))
        content = content[:at] + data.draw(st.binary(max_size=4)) + content[at + 1 :]
    (folder / "runs/records.npz").write_bytes(content)
    try:
        find_curves([folder / "runs"])
    except UserError as error:
        assert "runs" in str(error)  # noqa: PT017
