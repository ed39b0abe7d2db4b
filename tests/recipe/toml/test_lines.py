"""The line of every key."""

import textwrap
import time
from pathlib import Path

import pytest

from prunekit.errors import UserError
from prunekit.recipe.toml.lines import find_lines, read_toml


def test_every_key_path_has_the_line_of_its_statement():
    text = textwrap.dedent("""\
        # a comment
        name = "x"

        [dataset]            # a header
        use = "digits"
        [a."b.c"]
        d.e = 1

        [[stage]]
        kind = "pretrain"
        optimizer = { use = "sgd", schedule = { use = "step" } }
        # between
        [[stage]]
        kind = "evaluate"
        with = [
          "clean",           # first
          # a comment in the list
          { use = "pgd" },
          "last"
        ]
        text = '''
        one = 1
        '''
        after = 2
        """)
    lines = find_lines(text)
    assert {path: lines[path] for path in lines if path and path[-1] != "use"} == {
        ("name",): 2,
        ("dataset",): 4,
        ("a",): 6,
        ("a", "b.c"): 6,
        ("a", "b.c", "d"): 7,
        ("a", "b.c", "d", "e"): 7,
        ("stage",): 9,
        ("stage", 0): 9,
        ("stage", 0, "kind"): 10,
        ("stage", 0, "optimizer"): 11,
        ("stage", 0, "optimizer", "schedule"): 11,
        ("stage", 1): 13,
        ("stage", 1, "kind"): 14,
        ("stage", 1, "with"): 15,
        ("stage", 1, "with", 0): 16,
        ("stage", 1, "with", 1): 18,
        ("stage", 1, "with", 2): 19,
        ("stage", 1, "text"): 21,
        ("stage", 1, "after"): 24,
    }
    assert lines["stage", 0, "optimizer", "schedule", "use"] == 11
    assert lines["stage", 1, "with", 1, "use"] == 18


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 1\na = " + "[" * 5000 + "]" * 5000, "r.toml:2: is nested more than 32 levels"),
        ("a = " + "{a=" * 5000 + "1" + "}" * 5000, "r.toml:1: is nested more than 32 levels"),
        (".".join("a" * 5000) + " = 1", "r.toml:1: is nested more than 32 levels"),
        ("[" + ".".join("a" * 5000) + "]", "r.toml:1: is nested more than 32 levels"),
        ("\nseed = " + "9" * 10_000, "r.toml:2: has a value of 10,000 characters"),
        ("seed = 99999999999999999999", "r.toml:1: seed is a number that does not fit into 64"),
        ("[threat]\neps = 1e400", "r.toml:2: threat.eps is inf, which is not finite"),
        ("[threat]\neps = nan", "r.toml:2: threat.eps is nan, which is not finite"),
        (
            "[threat]\nnorm = inf",
            'r.toml:2: threat.norm is inf, which is not finite; write norm = "linf"',
        ),
        ('x = [\n 1,\n "\\u0000",\n]', "r.toml:3: x.1 holds the character NUL"),
        ("x = 1979-05-27", "r.toml:1: x is a date; write it as text, in quotes"),
        ("a = 1\na = 2", "r.toml:2: is not TOML: Cannot overwrite a value; this key exists"),
        ("a = '\x00'", "r.toml:1: is not TOML"),
        ("a = 1".encode("utf-16"), "r.toml:1: is not UTF-8"),
        ("# " + "x" * 2**20, "r.toml is too large: at most 1 MB are read"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_no_recipe_can_hold_has_its_place(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    content = text if isinstance(text, bytes) else text.encode()
    Path("r.toml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_toml(Path("r.toml"))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "r.toml").write_bytes(b"\xef\xbb\xbfseed = 1\n")
    assert read_toml(tmp_path / "r.toml")[0] == {"seed": 1}


def test_lines_are_found_in_linear_time():
    text = "[sweep]\nseed = [\n" + "".join(f"  {n},\n" for n in range(50_000)) + "]\n"
    started = time.process_time()
    lines = find_lines(text)
    assert lines["sweep", "seed", 49_999] == 50_002
    assert time.process_time() - started < 5
    # Quotes that are never closed, at every place where one could begin.
    for text in ('"\\' * 50_000, '"""\n' * 50_001, "'''a\n" * 50_001, '"""\\' * 50_000):
        find_lines(text)
    assert time.process_time() - started < 10
