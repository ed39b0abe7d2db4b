"""The pages in docs: generated parts are current, examples run, and what they name is there."""

import ast
import inspect
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from prunekit.catalog.component import option
from prunekit.catalog.kinds import KINDS, ObjectiveComponent, PrunerComponent
from prunekit.catalog.registry import load_registry
from prunekit.cli.group import main
from prunekit.recipe.describing import field_types, key_of
from prunekit.recipe.plan import TOP_KEYS, make_plan
from prunekit.recipe.toml.document import load_recipe
from prunekit.recipe.toml.sections import (
    STAGE_OPTIONS,
    ArchitectureOptions,
    DataOptions,
    ThreatOptions,
)
from prunekit.testing import check_component, check_declaration

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)

FLAGS = set(re.findall(r"--[\w-]+", """
--configs --result-dir --exp-name --exp-mode --arch --num-classes --layer-type --init_type --k
--snip-init --scaled-score-init --scale_rand_init --freeze-bn --source-net --is-semisup --dataset
--semisup-data --semisup-fraction --noise-std --scores_init_type --batch-size --test-batch-size
--normalize --data-dir --data-fraction --image-dim --mean --std --trainer --epochs --optimizer --wd
--lr --lr-schedule --momentum --warmup-epochs --warmup-lr --save-dense --n-repeats --epsilon
--num-steps --step-size --clip-min --clip-max --distance --const-init --beta --evaluate --val_method
--start-epoch --resume --gpu --no-cuda --seed --print-freq --schedule_length --mixtraink
"""))  # fmt: skip
"""Of the research code's own parser."""


def blocks(page, language):
    """The code blocks of a page in that language, without their indentation."""
    for indent, found, code in BLOCK.findall(page.read_text()):
        if found == language:
            yield re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)


def read(name):
    return (ROOT / "docs" / name).read_text()


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import readme_tables

    return readme_tables


def test_generated_parts_are_current(tables):
    for path in tables.GENERATED:
        assert tables.renew(path) == path.read_text(), "uv run python docs/readme_tables.py"


def test_there_is_a_place_for_every_part_that_is_generated(tables):
    for path, parts in tables.GENERATED.items():
        assert set(re.findall(r"<!-- /([\w -]+) -->", path.read_text())) >= set(parts)


def test_every_key_of_a_recipe_is_in_the_page():
    text = read("recipes.md")
    for key in (*TOP_KEYS, "extends", "set"):
        assert f"`{key}`" in text or f"`[{key}]`" in text or f"`[[{key}]]`" in text, key


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)
    assert {p.name for p in PAGES} <= set(re.findall(r"docs/([\w-]+\.md)", ROOT.joinpath(
        "README.md").read_text()))  # fmt: skip


def test_files_that_the_pages_name_are_there():
    for page in PAGES:
        for name in re.findall(r"recipes/[\w/-]+\.toml", page.read_text()):
            assert (ROOT / name).is_file(), name


# Commands


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.stem)
def test_commands_are_as_they_are(page):
    lines = [line for code in blocks(page, "sh") for line in code.splitlines()]
    lines += re.findall(r"`(prunekit [^`\n]+)`", page.read_text())
    lines = [line.partition("prunekit ")[2] for line in lines
             if re.match(r"(uv run |.*&& uv run )?prunekit ", line)]  # fmt: skip
    for line in lines:
        check_command(shlex.split(line, comments=True))


def check_command(words):
    command = main
    while isinstance(command, click.Group):
        words = [word for word in words if word not in ("--debug", "COMMAND")]
        if not words:
            return
        inner = command.get_command(click.Context(command), words[0])
        assert inner is not None, words
        command, words = inner, words[1:]
    known = {name for parameter in command.params for name in parameter.opts}
    for word in words:
        assert not word.startswith("--") or word.partition("=")[0] in known | {"--help"}, words


# Recipes


def is_complete(code):
    data = tomllib.loads(code)
    return {"dataset", "architecture", "stage"} <= data.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_recipes_pass_check_and_fragments_are_toml(page, tmp_path):
    for number, code in enumerate(blocks(page, "toml")):
        if not is_complete(code):
            continue
        path = tmp_path / f"{number}.toml"
        path.write_text(code)
        assert make_plan(load_recipe(path), load_registry()).runs


def test_the_recipe_with_every_table_has_them_all():
    first = next(blocks(ROOT / "docs/recipes.md", "toml"))
    assert {"dataset", "architecture", "threat", "objective", "stage", "sweep"} <= tomllib.loads(
        first
    ).keys()


# The page for users of the research code


def rows(page):
    """(first cell, second cell) of every table of a page."""
    for line in read(page).splitlines():
        cells = re.findall(r"(?<=\|) (.*?) (?=\|)", line)
        if len(cells) == 2:
            yield cells


def test_every_flag_of_the_research_code_has_its_line():
    told = {flag for first, _ in rows("from-hydra.md") for flag in re.findall(r"--[\w-]+", first)}
    assert told >= FLAGS
    assert told - FLAGS == {"--schedule_start", "--starting_epsilon"}


def fragments(page):
    """The pieces of TOML in the second cells: `key = value`."""
    for _, cell in rows(page):
        for code in re.findall(r"`([^`]+)`", cell):
            if re.match(r"\w+ = ", code):
                yield code


def test_what_replaces_a_flag_is_a_recipe_line():
    entries = load_registry().entries
    known = {key_of(name) for e in entries for name in field_types(e.component.options)}
    for options in (*STAGE_OPTIONS.values(), DataOptions, ArchitectureOptions, ThreatOptions):
        known |= {key_of(name) for name in field_types(options)}
    known |= {*TOP_KEYS, "use", "kind", "extends", "name"}
    found = list(fragments("from-hydra.md"))
    assert len(found) > 40
    for code in found:
        for key in keys_in(tomllib.loads(code)):
            assert key in known, code


def keys_in(table):
    for key, value in table.items():
        yield key
        if isinstance(value, dict):
            yield from keys_in(value)


def test_components_that_the_page_names_are_there():
    names = {e.component.name for e in load_registry().entries}
    text = read("from-hydra.md")
    for name in re.findall(r'use = "([\w-]+)"', text):
        assert name in names, name
    # Also those that stand by themselves, where a network or an objective is meant.
    for name in ("timm", "torchvision", "python", "verified", "autoattack", "free-adv"):
        assert f"`{name}`" in text
        assert name in names


# The page for authors


def test_the_examples_of_every_hook_are_those_of_its_docstring():
    text = read("plugins.md")
    for kind in KINDS:
        hook = f"prunekit_{kind}s"
        assert text.count(f"def {hook}():") == 1


def test_other_code_runs():
    """Blocks without a file's name."""
    namespace = {"__name__": __name__}
    for code in blocks(ROOT / "docs/plugins.md", "python"):
        if not code.startswith("# "):
            exec(compile(code, "docs/plugins.md", "exec"), namespace)
    component = ObjectiveComponent(
        name="x", summary="X", build=f"{__name__}:build", options=namespace["MyOptions"]
    )
    check_declaration(component)
    globals()["build_averaged"] = namespace["build_averaged"]
    named = {"name": "x", "summary": "X", "build": f"{__name__}:build_averaged"}
    check_component(PrunerComponent(**named, learns=True))


def build(options, context):
    raise NotImplementedError


def test_the_page_tells_every_argument_of_option():
    text = read("plugins.md")
    for name in inspect.signature(option).parameters:
        assert name in ("default", "help") or f"`{name}" in text or f"{name}=" in text, name


def test_every_python_block_parses():
    for page in PAGES:
        for code in blocks(page, "python"):
            ast.parse(code)
