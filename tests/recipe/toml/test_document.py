"""Where a recipe says something, what it extends, and what `--set` and [set] change."""

import textwrap
from pathlib import Path

import pytest

from prunekit.errors import Place, RecipeError, UserError
from prunekit.recipe.toml.document import load_recipe


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, text):
    path = Path(name)
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(textwrap.dedent(text).lstrip("\n"))
    return path


def refuse(path, settings=()):
    with pytest.raises(UserError) as caught:
        load_recipe(path, settings)
    assert caught.value.code == 2
    return str(caught.value).splitlines()


def test_what_is_not_written_is_located_in_what_it_would_be_part_of(here):
    recipe = load_recipe(write("r.toml", 'name = "x"\n\n[dataset]\nuse = "digits"\n'))
    assert recipe.locate(("dataset", "batch_size")) == Place("r.toml", 3)
    assert recipe.locate(("threat", "eps")) == Place("r.toml", 1)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_line_ends_and_a_byte_order_mark_do_not_matter(here, newline, start):
    (here / "r.toml").write_bytes(f'{start}# ü{newline}{newline}name = "x"{newline}'.encode())
    recipe = load_recipe(here / "r.toml")
    assert recipe.data == {"name": "x"}
    assert recipe.locate(("name",)) == Place("r.toml", 3)


def test_files_that_are_no_recipe(here):
    assert refuse(here / "nothing.toml") == ["there is no recipe nothing.toml"]
    (here / "folder").mkdir()
    assert refuse(here / "folder") == ["folder is a folder, not a recipe"]
    write("folder/recipe.toml", "")
    assert refuse(here / "folder") == ["folder is a folder, not a recipe; write folder/recipe.toml"]
    for name, told in (
        ("m.safetensors", "a model file, not a recipe; to judge it, write prunekit eval"),
        ("net.py", "Python code, not a recipe; name it in one"),
        ("run.json", "a record, not a recipe; that of a run is the recipe.toml beside it"),
        ("old.pth", "a checkpoint, not a recipe; write prunekit import"),
    ):
        write(name, "")
        assert f"{name} is {told}" in refuse(here / name)[0]
    (here / "latin.toml").write_bytes('name = "x"\n# caf\xe9\n'.encode("latin-1"))
    assert refuse(here / "latin.toml") == ["latin.toml:2: is not UTF-8; save the file as UTF-8"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("use = digits\n", '2: is not TOML: Invalid value; strings need quotes: use = "trades"'),
        ("b\n", "2: is not TOML: Expected '=' after a key in a key/value pair"),
        (
            "b = [1,\n\n",
            "2: is not TOML: the file ends in the middle of a value; close the "
            "bracket or the quote",
        ),
        (
            "b = 1\nb = 2\n",
            "3: is not TOML: Cannot overwrite a value; this key exists already; remove one of "
            "the two",
        ),
        (
            "[a]\n[a]\n",
            "3: is not TOML: Cannot declare ('a',) twice; this table exists already; remove one "
            "of the two",
        ),
    ],
)
def test_broken_toml_is_told_with_its_line(text, message):
    assert refuse(write("r.toml", f"x = 1\n{text}")) == [f"r.toml:{message}"]


def test_extends_merges_tables_and_remembers_who_said_what():
    write(
        "base/b.toml",
        """
        seed = 1
        objective = "trades"
        [dataset]
        use = "digits"
        batch_size = 64
        [[stage]]
        kind = "pretrain"
        epochs = 1
        """,
    )
    path = write(
        "r.toml",
        """
        extends = "base/b.toml"
        [dataset]
        batch_size = 32
        [objective]
        beta = 3
        """,
    )
    recipe = load_recipe(path)
    assert recipe.data == {
        "seed": 1,
        "objective": {"use": "trades", "beta": 3},
        "dataset": {"use": "digits", "batch_size": 32},
        "stage": [{"kind": "pretrain", "epochs": 1}],
    }
    assert recipe.locate(("dataset", "use")) == Place("base/b.toml", 4)
    assert recipe.locate(("dataset", "batch_size")) == Place("r.toml", 3)
    assert recipe.locate(("objective", "beta")) == Place("r.toml", 5)
    assert recipe.locate(("stage", 0, "epochs")) == Place("base/b.toml", 8)


def test_another_component_drops_the_options_of_the_old_one_but_keeps_the_batch_size():
    write(
        "b.toml",
        """
        [dataset]
        use = "npz"
        file = "my.npz"
        batch_size = 64
        [objective]
        use = "trades"
        beta = 3
        """,
    )
    path = write(
        "r.toml",
        """
        extends = "b.toml"
        dataset = "digits"
        [objective]
        use = "benign"
        """,
    )
    recipe = load_recipe(path)
    assert recipe.data["dataset"] == {"use": "digits", "batch_size": 64}
    assert recipe.data["objective"] == {"use": "benign"}
    assert recipe.locate(("dataset", "batch_size")) == Place("b.toml", 4)
    assert recipe.locate(("dataset", "use")) == Place("r.toml", 2)


def test_stages_and_lists_are_replaced_as_a_whole():
    write("b.toml", '[[stage]]\nkind = "pretrain"\n[[stage]]\nkind = "prune"\n')
    path = write("r.toml", 'extends = "b.toml"\n[[stage]]\nkind = "evaluate"\n')
    recipe = load_recipe(path)
    assert recipe.data["stage"] == [{"kind": "evaluate"}]
    assert recipe.locate(("stage", 0, "kind")) == Place("r.toml", 3)
    assert recipe.locate(("stage", 1, "kind")) == Place("r.toml", 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('extends = "no.toml"', "r.toml:2: there is no recipe no.toml"),
        ("extends = 3", 'r.toml:2: write extends = "FILE.toml"'),
        ('extends = "."', "r.toml:2: . is a folder, not a recipe"),
        ('extends = "/dev/zero"', "r.toml:2: /dev/zero is a device, not a recipe"),
        ('extends = "r.toml"', "r.toml: extends itself: r.toml -> r.toml"),
    ],
)
def test_a_base_that_cannot_be(line, message):
    assert refuse(write("r.toml", f"# c\n{line}\n")) == [message]


def test_a_mistake_in_the_base_cites_the_base():
    write("base.toml", "a = 1\nb = x\n")
    (line,) = refuse(write("r.toml", 'extends = "base.toml"\n'))
    assert line.startswith("base.toml:2: is not TOML")


STAGES = """
    [objective]
    use = "trades"
    beta = 6.0
    [[stage]]
    kind = "pretrain"
    optimizer = "sgd"
    [[stage]]
    kind = "evaluate"
    name = "dense"
    with = ["clean"]
    [[stage]]
    kind = "evaluate"
    name = "pruned"
    """


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("name=x", ("name",), "x"),
        ("pretrain.epochs=7", ("stage", 0, "epochs"), 7),
        ("pretrain.optimizer.lr=0.5", ("stage", 0, "optimizer"), {"use": "sgd", "lr": 0.5}),
        ("dense.with=['pgd']", ("stage", 1, "with"), ["pgd"]),
        ("objective.eps=8/255", ("objective", "eps"), "8/255"),
        ("objective=benign", ("objective",), "benign"),
        ("objective.use=benign", ("objective",), "benign"),
        ("threat.eps=0.1", ("threat",), {"eps": 0.1}),
        (" pretrain.epochs = 7 ", ("stage", 0, "epochs"), 7),
        ('report=["console"]', ("report",), ["console"]),
    ],
)
def test_set_changes_what_its_address_names(setting, path, value):
    recipe = load_recipe(write("r.toml", STAGES), [setting])
    found = recipe.data
    for key in path:
        found = found[key]
    assert found == value
    leaf = (*path, *list(value)[-1:]) if isinstance(value, dict) else path
    assert recipe.locate(leaf) == Place(f"--set {setting}")


NOTHING = "names no stage and no section"


THERE = (
    "there are: architecture, compute, dataset, dense, objective, pretrain, pruned, seed, threat"
)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("pretrain.epochs", "write ADDRESS=VALUE, such as prune.sparsity=0.95"),
        ("pretrian.epochs=1", f"'pretrian.epochs' {NOTHING}; did you mean 'pretrain'?"),
        (
            "evaluate.images=1",
            "'evaluate.images': 2 stages have that; write dense.images or pruned.images",
        ),
        ("x=1", f"'x' {NOTHING}; {THERE}"),
        ("pretrain=1", "'pretrain' is a stage; name one of its options, such as pretrain.epochs"),
        ("dense.with.0.steps=1", "'dense.with.0.steps': '0' is not in the list; there are: clean"),
        ("objective.beta.x=1", "'objective.beta.x': 'beta' is not a table"),
    ],
)
def test_a_setting_that_names_nothing(setting, message):
    assert refuse(write("r.toml", STAGES), [setting]) == [f"--set {setting}: {message}"]


def test_all_settings_that_name_nothing_are_told_at_once():
    lines = refuse(write("r.toml", STAGES), ["a.b=1", "pretrain.epochs=1", "c.d=1"])
    assert [line.split(":")[0] for line in lines] == ["--set a.b=1", "--set c.d=1"]


def test_two_stages_of_one_name_cannot_be_addressed():
    text = '[[stage]]\nkind = "prune"\n[[stage]]\nkind = "prune"\n'
    assert refuse(write("r.toml", text), ["prune.sparsity=0.5"]) == [
        "--set prune.sparsity=0.5: 'prune.sparsity': 2 stages are called 'prune'; give them names"
    ]


@pytest.mark.parametrize("keys", ['"pretrain.epochs" = 9', "pretrain.epochs = 9"])
def test_a_set_table_applies_to_what_is_extended(keys):
    write("b.toml", STAGES)
    recipe = load_recipe(write("r.toml", f'extends = "b.toml"\n[set]\n# c\n{keys}\n'))
    assert recipe.data["stage"][0]["epochs"] == 9
    assert "set" not in recipe.data
    assert recipe.locate(("stage", 0, "epochs")) == Place("r.toml", 4)


def test_a_set_table_that_is_wrong():
    assert refuse(write("r.toml", "\nset = 3\n")) == [
        'r.toml:1: write [set] with addresses, such as "prune.sparsity" = 0.95'
    ]
    write("b.toml", STAGES)
    (line,) = refuse(write("r.toml", 'extends = "b.toml"\n[set]\nprone.x = 1\n"y.z" = 1\n'))[:1]
    assert line.startswith("r.toml:3: 'prone.x' names no stage")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[" * 5000 + "]" * 5000, "nested more than 32 levels deep"),
        ("9" * 5000, "has a value of 5,000 characters"),
        ("inf", "the value is inf, which is not finite"),
        ("[1, nan]", "the value.1 is nan"),
        ("1979-05-27", "the value is a date"),
    ],
    ids=lambda value: value[:12],
)
def test_a_setting_is_as_limited_as_a_recipe(tmp_path, value, message):
    (tmp_path / "r.toml").write_text("seed = 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.toml", [f"seed={value}"])
    assert str(caught.value).startswith("--set")
    assert message in str(caught.value)


def test_recipes_that_extend_each_other_without_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in range(100):
        (tmp_path / f"{n}.toml").write_text(f'extends = "{n + 1}.toml"\n')
    with pytest.raises(RecipeError, match=r"^32\.toml: is extended through 32 recipes already$"):
        load_recipe(tmp_path / "0.toml")
    (tmp_path / "round.toml").symlink_to("round.toml")
    with pytest.raises(UserError, match=r"there is no recipe round\.toml"):
        load_recipe(tmp_path / "round.toml")
    (tmp_path / "long.toml").write_text(f'extends = "{"x" * 300}.toml"\n')
    with pytest.raises(RecipeError, match=r"^long\.toml:1: there is no recipe "):
        load_recipe(tmp_path / "long.toml")
