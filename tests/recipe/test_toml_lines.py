"""The line of every key."""

import textwrap

from prunekit.recipe.toml_lines import find_lines


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
