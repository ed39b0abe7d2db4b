"""`prunekit list` and `show`."""

import textwrap

import pytest

from prunekit.catalog.kinds import KINDS
from prunekit.catalog.registry import load_registry

pytestmark = pytest.mark.usefixtures("here")

REGISTRY = load_registry()


def test_list_shows_every_component_in_a_line_of_its_own(call):
    out, err = call("list")
    lines = out.splitlines()
    assert lines[0].split() == ["kind", "name", "what", "it", "is", "from", "status"]
    assert len(lines) == 1 + len(REGISTRY.entries)
    assert err == ""
    (row,) = [line for line in lines if line.split()[1] == "trades"]
    assert row.split()[0] == "objective"
    assert row.rstrip().endswith("ready")


@pytest.mark.parametrize("kind", [*(f"{k}s" for k in KINDS), "pruner"])
def test_list_of_one_kind(kind, read):
    found = read("list", kind)["components"]
    assert {c["kind"] for c in found} <= {kind.removesuffix("s")}
    assert {c["name"] for c in found} == set(REGISTRY.names(kind.removesuffix("s")))
    for one in found:
        assert set(one) == {"kind", "name", "summary", "plugin", "distribution", "status"}


def test_list_of_an_unknown_kind(call):
    _, err = call("list", "prunner", code=2)
    assert err == "prunekit: unknown kind 'prunner'; did you mean 'pruners'?\n"


def test_show_tells_options_with_types_limits_and_defaults(call, read):
    out, err = call("show", "pgd")
    assert err == ""
    assert "  eps (radius, optional)\n      radius of the attack" in out
    assert '  norm ("linf" | "l2", optional)' in out
    assert "  restarts (whole number, at least 1 and at most 1000, default 10)" in out
    (told,) = read("show", "pgd")["components"]
    steps = next(o for o in told["options"] if o["name"] == "steps")
    assert steps == {
        "name": "steps",
        "type": "whole number",
        "default": 50,
        "required": False,
        "limits": "at least 1",
        "unit": "",
        "help": "steps of each restart",
    }


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        ("awp", "forward and backward passes in a training step: 2"),
        ("trades", "forward passes of an image in a training step: 13"),
        ("autoattack", "forward passes of an image: "),
        (
            "fashapley",
            "once: `steps` forward and backward passes of the loss on each of `batches` "
            "batches; 100 forward passes by default, ",
        ),
        ("lwm", "no passes"),
        ("sgd", ""),
    ],
)
def test_show_tells_the_cost(name, cost, call, read):
    assert read("show", name)["components"][0]["cost"].startswith(cost)
    assert (f"  cost    {cost}" in call("show", name)[0]) == bool(cost)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("trads", "did you mean 'trades'?"),
        ("xyzzy", "see: prunekit list"),
        ("pruner:lwm", "did you mean 'lwm'?"),
    ],
)
def test_show_of_nothing(name, advice, call):
    _, err = call("show", name, code=2)
    assert err == f"prunekit: there is no component '{name}'; {advice}\n"


SECTIONS = {
    "dataset": '[dataset]\nuse = "digits"',
    "architecture": '[architecture]\nuse = "small-cnn"',
    "threat": "[threat]\neps = 0.1",
    "objective": '[objective]\nuse = "benign"',
}


FIRST = '[[stage]]\nkind = "pretrain"\nepochs = 1\n'


@pytest.mark.parametrize("entry", REGISTRY.entries, ids=lambda e: f"{e.kind}-{e.component.name}")
def test_the_fragment_that_show_prints_is_right_in_a_recipe(entry, here, call, read):
    if entry.missing:
        pytest.skip(entry.status)
    (told,) = [c for c in read("show", entry.reference)["components"] if c["kind"] == entry.kind]
    fragment = told["recipe"]
    assert textwrap.indent(fragment, "  ") in call("show", entry.reference)[0]
    if entry.component.name == "image-folder":
        for part in ("train", "val"):
            (here / "my-file" / part).mkdir(parents=True)
    else:
        (here / "my-file").touch()
    sections = "\n".join(s for kind, s in SECTIONS.items() if kind != entry.kind)
    parts = [sections, fragment if entry.kind in SECTIONS else "", FIRST]
    if entry.kind == "reporter":
        parts.insert(0, fragment)
    elif entry.kind == "backend":
        parts.insert(1, fragment)
    elif entry.kind not in SECTIONS:
        parts = [sections, fragment]
    (here / "r.toml").write_text("\n".join(parts))
    if (entry.kind, entry.component.name) == ("dataset", "given"):
        assert "images of a Python program" in call("check", "r.toml", code=2)[1]
        return
    assert read("check", "r.toml")["recipes"] == [{"recipe": "r.toml", "problems": [], "runs": 1}]
