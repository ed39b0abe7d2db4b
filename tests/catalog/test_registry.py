"""Plugins that load, and plugins that do not: nobody else is harmed."""

import sys
from importlib.metadata import EntryPoint

import pytest

from prunekit.catalog.kinds import KINDS, PrunerComponent
from prunekit.catalog.registry import load_registry
from prunekit.errors import UserError
from prunekit.testing import find_components

GOOD = """
from prunekit import PrunerComponent, hookimpl

@hookimpl
def prunekit_pruners():
    yield PrunerComponent(name="mine", summary="Mine", build="{module}:build")
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Write a plugin's module; gives its entry point."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def write(name, code):
        module = f"plugin_under_test_{name}"
        (tmp_path / f"{module}.py").write_text(code.replace("{module}", module))
        made.append(module)
        return EntryPoint(name, module, "prunekit")

    yield write
    for module in made:
        sys.modules.pop(module, None)


def names(registry, kind="pruner"):
    return [e.component.name for e in registry.entries if e.kind == kind]


def test_all_that_is_built_in_is_there_and_comes_from_prunekit():
    registry = load_registry()
    assert registry.broken == ()
    assert {e.kind for e in registry.entries} == set(KINDS)
    assert {e.distribution.split()[0] for e in registry.entries} == {"prunekit"}
    assert registry.names("schedule") == ["constant", "cosine", "cyclic", "step"]


def test_a_plugin_is_found_by_its_entry_point(plugin):
    registry = load_registry([plugin("a", GOOD)])
    entry = registry.find("pruner", "mine")
    assert (entry.plugin, entry.owner, entry.status) == ("a", "a (unknown)", "ready")
    assert entry.reference == "mine"
    assert registry.find("pruner", "a:mine") == entry


IMPORTS = "from prunekit import PrunerComponent, hookimpl\n"

TWICE = """
@hookimpl
def prunekit_pruners():
    yield PrunerComponent(name="one", summary="One", build="m:b")


@hookimpl(specname="prunekit_pruners")
def more():
    yield PrunerComponent(name="two", summary="Two", build="m:b")
"""


def test_a_second_implementation_of_a_hook_counts(plugin):
    point = plugin("a", IMPORTS + TWICE)
    assert sorted(names(load_registry([point]))) == ["one", "two"]
    assert sorted(component.name for component in find_components(point.value)) == ["one", "two"]


BROKEN = {
    "raise RuntimeError('no\\nluck')": "RuntimeError: no luck",
    "import nothing_of_that_name": (
        "ModuleNotFoundError: No module named 'nothing_of_that_name'"
    ),
    "x = 1": "LookupError: declares no component; is @hookimpl missing, or a return?",
    IMPORTS + "@hookimpl\ndef prunekit_pruners():\n    pass": (
        "LookupError: declares no component; is @hookimpl missing, or a return?"
    ),
    IMPORTS + "@hookimpl\ndef prunekit_pruner():\n    return []": (
        "NameError: there is no hook 'prunekit_pruner'; did you mean 'prunekit_pruners'?"
    ),
    IMPORTS + "@hookimpl\ndef prunekit_pruners():\n    return ['score']": (
        "TypeError: prunekit_pruners yields PrunerComponents, not str"
    ),
    IMPORTS + "@hookimpl\ndef prunekit_objectives():\n    "
    "yield PrunerComponent(name='x', summary='', build='m:b')": (
        "TypeError: prunekit_objectives yields ObjectiveComponents, but 'x' is declared as "
        "PrunerComponent"
    ),
    IMPORTS + "@hookimpl\ndef prunekit_pruners():\n    return 3": (
        "TypeError: 'int' object is not iterable"
    ),
    IMPORTS + "@hookimpl\ndef prunekit_pruners():\n    return [1 / 0]": (
        "ZeroDivisionError: division by zero"
    ),
    IMPORTS + "@hookimpl\ndef prunekit_pruners():\n    "
    "return [PrunerComponent(name='x', summary='', build='m:b', options=int)]": (
        "TypeError: options of 'x' is not a dataclass: <class 'int'>"
    ),
    "from prunekit import RewirerComponent, hookimpl\n@hookimpl\ndef prunekit_rewirers():\n    "
    "return [RewirerComponent(name='x', summary='', build='m:b', gradients=True)]": (
        "TypeError: gradients of 'x' is True; write gradients=lambda options: True"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("code", "reason"), BROKEN.items(), ids=range(len(BROKEN)))
def test_a_broken_plugin_is_listed_with_its_reason_and_the_others_load(plugin, code, reason):
    registry = load_registry([plugin("bad", code), plugin("good", GOOD)])
    (broken,) = registry.broken
    assert (broken.plugin, broken.reason) == ("bad", reason)
    assert names(registry) == ["mine"]


def test_a_hook_with_arguments_is_told_in_one_line(plugin):
    code = IMPORTS + "@hookimpl\ndef prunekit_pruners(config):\n    return []"
    (broken,) = load_registry([plugin("bad", code)]).broken
    assert "config" in broken.reason
    assert "\n" not in broken.reason


def test_two_plugins_that_claim_one_name(plugin):
    registry = load_registry([plugin("a", GOOD), plugin("b", GOOD)])
    assert [e.status for e in registry.entries if e.kind == "pruner"] == [
        'broken: name also claimed by b (unknown); write "a:mine"',
        'broken: name also claimed by a (unknown); write "b:mine"',
    ]
    with pytest.raises(UserError) as caught:
        registry.find("pruner", "mine")
    assert str(caught.value) == (
        "pruner 'mine' is claimed by the plugins a (unknown) and b (unknown); "
        'write "a:mine" or "b:mine"'
    )
    entry = registry.find("pruner", "b:mine")
    assert (entry.plugin, entry.reference) == ("b", "b:mine")


def test_a_claimed_name_of_a_built_in_does_not_replace_it(plugin):
    from importlib.metadata import entry_points

    points = [*entry_points(group="prunekit"), plugin("a", GOOD.replace("mine", "lwm"))]
    with pytest.raises(UserError, match='write "pruners:lwm" or "a:lwm"'):
        load_registry(points).find("pruner", "lwm")


def test_two_plugins_of_one_name_go_by_their_modules(plugin):
    def declare(name, component):
        point = plugin(name, GOOD.replace("mine", component))
        return EntryPoint("same", point.value, "prunekit")

    points = [declare("a", "mine"), declare("b", "mine"), declare("c", "other")]
    registry = load_registry([*points, points[0]])
    assert [e.owner for e in registry.entries if e.kind == "pruner"] == [
        f"plugin_under_test_{name} (unknown)" for name in "abc"
    ]
    with pytest.raises(UserError, match='write "plugin_under_test_a:mine" or "plugin_under_test_b'):
        registry.find("pruner", "mine")
    assert registry.find("pruner", "plugin_under_test_b:mine").component.package == (
        "plugin_under_test_b"
    )
    assert registry.find("pruner", "other").reference == "other"


def test_a_plugin_that_takes_the_name_of_one_of_ours_leaves_it_its_name(plugin):
    from importlib.metadata import entry_points

    point = plugin("a", GOOD.replace("mine", "lwm"))
    theirs = EntryPoint("pruners", point.value, "prunekit")
    registry = load_registry([*entry_points(group="prunekit"), theirs])
    assert registry.find("pruner", "pruners:lwm").component.package == "prunekit_pruners"
    assert registry.find("pruner", "plugin_under_test_a:lwm").plugin == "plugin_under_test_a"


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("pruner", "scor", "unknown pruner 'scor'; did you mean 'score'?"),
        ("pruner", "nobody:score", "unknown pruner 'nobody:score'; did you mean 'score'?"),
        ("schedule", "xyz", "unknown schedule 'xyz'; there are: constant, cosine, cyclic, step"),
        (
            "schedule",
            "sgd",
            "unknown schedule 'sgd'; 'sgd' is of kind optimizer; "
            "there are: constant, cosine, cyclic, step",
        ),
    ],
)
def test_an_unknown_component(kind, name, message):
    with pytest.raises(UserError) as caught:
        load_registry().find(kind, name)
    assert str(caught.value) == message


def test_an_unknown_component_may_be_that_of_a_broken_plugin(plugin):
    registry = load_registry([plugin("bad", "1 / 0"), plugin("good", GOOD)])
    with pytest.raises(UserError, match=r"\(plugins that failed to load: bad \(unknown\)\)$"):
        registry.find("pruner", "theirs")


def test_a_component_whose_packages_are_missing_says_how_to_get_them(plugin):
    code = GOOD.replace('build="', 'needs=("no_such_package", "json", "no.such"), build="')
    registry = load_registry([plugin("a", code)])
    (entry,) = [e for e in registry.entries if e.kind == "pruner"]
    assert entry.status == "needs no_such_package, no.such"
    with pytest.raises(UserError, match=r"run: pip install no_such_package no\.such$"):
        registry.find("pruner", "mine")


def test_a_component_may_know_a_better_command(plugin):
    needs = 'needs=("no_such_package",), install="pip install --no-deps x==1", build="'
    registry = load_registry([plugin("a", GOOD.replace('build="', needs))])
    with pytest.raises(UserError, match=r"run: pip install --no-deps x==1$"):
        registry.find("pruner", "mine")


def test_a_component_knows_its_package():
    assert PrunerComponent(name="x", summary="X", build="a.b.c:d").package == "a"
