"""Recipes resolved: every mistake at once, and what is right."""

import textwrap
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

import pytest
import tomli_w

from prunekit import errors
from prunekit.catalog.component import option
from prunekit.catalog.kinds import PrunerComponent, RewirerComponent
from prunekit.catalog.registry import Entry, Registry, load_registry
from prunekit.errors import UserError
from prunekit.recipe.plan import make_plan
from prunekit.recipe.toml.document import load_recipe

REGISTRY = load_registry()


TOP = """\
dataset = "digits"
architecture = "small-cnn"
objective = "benign"
"""


PRETRAIN = """\
[[stage]]
kind = "pretrain"
epochs = 1
"""


PRUNE = """\
[[stage]]
kind = "prune"
sparsity = 0.9
pruner = "score"
epochs = 1
"""


EVALUATE = """\
[[stage]]
kind = "evaluate"
with = ["clean"]
"""


SMALL = TOP + PRETRAIN + PRUNE + EVALUATE


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def plan(here):
    def make(text, *settings, registry=REGISTRY, name="r.toml"):
        (here / name).write_text(textwrap.dedent(text))
        return make_plan(load_recipe(here / name, settings), registry)

    return make


@pytest.fixture
def refuse(plan):
    def lines(text, *settings, **others):
        with pytest.raises(UserError) as caught:
            plan(text, *settings, **others)
        assert caught.value.code == 2
        return str(caught.value).splitlines()

    return lines


def test_the_three_mistakes_of_the_design_come_out_together(refuse):
    text = """\
        # a recipe
        dataset = "digits"
        architecture = "small-cnn"

        [objective]
        use = "trades"
        esp = 0.1               # misspelt
        eps = 8.0

        [[stage]]
        kind = "finetune"
        epochs = 3
        """
    assert refuse(text) == [
        "r.toml:7: unknown option 'esp' of objective 'trades'; did you mean 'eps'?",
        'r.toml:8: eps is a radius in [0, 1] pixel units, got 8.0; write "8/255"',
        "r.toml:10: finetune before any prune; put a prune stage before it",
    ]


def test_an_empty_recipe_says_what_to_write(refuse):
    names = REGISTRY.names
    assert refuse("") == [
        'r.toml:1: a recipe needs stages; write [[stage]] and kind = "pretrain"',
        "r.toml:1: there is no [architecture]; write [architecture] and use = "
        f'"{names("architecture")[0]}"',
        f'r.toml:1: there is no [dataset]; write [dataset] and use = "{names("dataset")[0]}"',
    ]


def test_mistakes_cite_the_file_or_the_option_that_makes_them(refuse, here):
    (here / "base.toml").write_text(TOP + PRETRAIN + "clip_norm = 0\n")
    text = 'extends = "base.toml"\nseed = -1\nset."pretrain.select" = 3\n'
    assert refuse(text, "pretrain.optimizer.lr=x", "dataset.bach_size=3") == [
        "--set dataset.bach_size=3: unknown option 'bach_size' of dataset 'digits'; did you mean "
        "'batch_size'?",
        "--set pretrain.optimizer.lr=x: lr of optimizer 'sgd' must be a number, got 'x'",
        "base.toml:7: clip_norm of stage 'pretrain' must be above 0, got 0",
        "r.toml:2: seed must be a whole number, at least 0, got -1",
        "r.toml:3: select of stage 'pretrain' must be a string, got 3",
    ]


MISTAKES = [
    # (recipe, line and message)
    (SMALL.replace('"score"', '"scor"'), "10: unknown pruner 'scor'; did you mean 'score'?"),
    (SMALL.replace("0.9", "1"), "9: sparsity of stage 'prune' must be above 0 and below 1, got 1"),
    (
        SMALL.replace("0.9", "90"),
        "9: sparsity of stage 'prune' must be above 0 and below 1, got 90; write 0.9 for 90 %",
    ),
    (
        TOP + '[[stage]]\nkind = "pretrain"\n',
        "4: stage 'pretrain' needs epochs: passes over the training images; write epochs = 10",
    ),
    (
        TOP + PRUNE.replace("epochs = 1", ""),
        "4: pruner 'score' learns its scores, so stage 'prune' needs epochs; write epochs = 20",
    ),
    (
        TOP + PRUNE.replace("score", "lwm"),
        "8: pruner 'lwm' is one-shot: epochs has no effect; remove it",
    ),
    (SMALL + "image = 3\n",
     "15: unknown option 'image' of stage 'evaluate'; did you mean 'images'?"),
    (SMALL + 'pruner = "lwm"\n', "15: pruner is for stages of kind prune, not evaluate; remove it"),
    (TOP + PRUNE + 'rewire = "rigl"\n',
     "9: rewire is for stages of kind pretrain, finetune, not prune; remove it"),
    ('[set]\n"prune.rewire" = { use = "set", every = 3 }\n' + SMALL,
     "2: rewire is for stages of kind pretrain, finetune, not prune; remove it"),
    (SMALL + "images = 2.5\n", "15: images of stage 'evaluate' must be a whole number, got 2.5"),
    (SMALL.replace('["clean"]', '"clean"'),
     "14: with of stage 'evaluate' must be a list, got 'clean'; write [\"clean\"]"),
    (SMALL.replace('["clean"]', "[]"),
     "14: stage 'evaluate': name at least one evaluator, such as with = [\"clean\"]"),
    (SMALL.replace('["clean"]', '["clean", "clean"]'),
     "14: stage 'evaluate': 'clean' is listed twice; give each a name = \"...\""),
    (SMALL + EVALUATE, "15: there are two stages 'evaluate'; give each a name = \"...\""),
    (TOP + PRUNE + PRUNE.replace("0.9", '0.8\nname = "again"'),
     "11: sparsity counts all weights of the dense network: 0.8 after 0.9 removes nothing; "
"write a larger one"),
    (TOP + PRETRAIN.replace("pretrain", "pretrian"),
     "5: the kind of a stage cannot be 'pretrian'; did you mean 'pretrain'?"),
    (TOP + "[[stage]]\nepochs = 3\n",
     '4: stage without a kind; write kind = "pretrain" (or: pretrain, prune, finetune, evaluate)'),
    (TOP + PRETRAIN + 'name = "a b"\n',
     "7: the name of a stage must consist of at most 100 letters, digits, '-', '_' and '+', "
     "got 'a b'"),
    (TOP + PRETRAIN.replace("[[stage]]", "[stage]"),
     "4: stages are a list; write [[stage]], with two brackets"),
    ('stage = ["pretrain"]\n' + TOP,
     "1: a stage must be a table, got 'pretrain'; write [[stage]] and kind = ..."),
    ("stage = 3\n" + TOP, '1: a recipe needs stages; write [[stage]] and kind = "pretrain"'),
    ("format = 2\n" + SMALL, "1: this prunekit does not read format 2; write 1"),
    ("sed = 2\n" + SMALL, "1: unknown key 'sed'; did you mean 'seed'?"),
    ('extend = "x"\n' + SMALL, "1: unknown key 'extend'; did you mean 'extends'?"),
    ("seed = true\n" + SMALL, "1: seed must be a whole number, at least 0, got True"),
    ('name = ".."\n' + SMALL, "1: name becomes the name of a folder: write a word without '/', "
 "got '..'"),
    ('name = "a/b"\n' + SMALL, "1: name becomes the name of a folder: write a word without '/', "
 "got 'a/b'"),
    ('report = "console"\n' + SMALL, '1: report must be a list, such as ["console", "jsonl"]'),
    ('report = ["consle"]\n' + SMALL, "1: unknown reporter 'consle'; did you mean 'console'?"),
    ('threat = "linf"\n' + SMALL, '1: write [threat] with norm = "linf" and eps = "8/255"'),
    ('threat = { norm = "l1", eps = 0.1 }\n' + SMALL,
     "1: norm of [threat] cannot be 'l1'; there are: l2, linf"),
    ("threat = { eps = 8 }\n" + SMALL.replace('"benign"', '"trades"'),
     '1: eps is a radius in [0, 1] pixel units, got 8; write "8/255"'),
    (SMALL.replace('"digits"', "3"), '1: write [dataset] with use = "..."'),
    (SMALL.replace('"digits"', "{ batch_size = 3 }"),
     f'1: dataset needs a name; write use = "{REGISTRY.names("dataset")[0]}" (prunekit list '
     "datasets)"),
    (SMALL.replace('"digits"', '{ use = "digits", batch_size = 0 }'),
     "1: batch_size of [dataset] must be at least 1, got 0"),
    (SMALL.replace('"digits"', '{ use = "digits", augment = ["flop"] }'),
     "1: augment[0] of [dataset] cannot be 'flop'; did you mean 'flip'?"),
    (TOP.replace('objective = "benign"\n', "") + PRETRAIN,
     "3: stage 'pretrain' has no objective; write [objective] and use = \"trades\" for all stages, "
     'or objective = "..." in this one'),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[m[:50] for _, m in MISTAKES])
def test_a_mistake_is_told_alone_with_its_line(refuse, text, message):
    assert refuse(text) == [f"r.toml:{message}"]


STAGES = PRETRAIN.replace("[[stage]]", "[stage]") + EVALUATE.replace("[[stage]]", "[stage]")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        # One mistake is told once, where it is made.
        (
            TOP + STAGES,
            ["r.toml:4: is not TOML: Cannot declare ('stage',) twice; stages are a list; wr"],
        ),
        (SMALL.replace("[[stage]]", "[[stages]]"), ["r.toml:4: unknown key 'stages'; did you"]),
        (SMALL.replace("dataset =", "data ="), ["r.toml:1: unknown key 'data'; did you mean 'da"]),
        (SMALL.replace("architecture", "model"), ["r.toml:2: unknown key 'model'; did you mean"]),
        # Names of folders, and of parts of files.
        (
            f'name = "{"n" * 101}"\n' + SMALL,
            ["r.toml:1: name becomes the name of a folder: write "],
        ),
        (
            f"name = '{chr(0x4E00) * 99}'\n" + SMALL,
            ["r.toml:1: name becomes the name of a folder: "],
        ),
        (SMALL + f'name = "{"n" * 101}"\n', ["r.toml:15: the name of a stage must consist of at "]),
    ],
)
def test_what_is_wrong_is_one_line_where_it_begins(refuse, text, lines):
    told = refuse(text)
    assert [line[: len(start)] for line, start in zip(told, lines, strict=True)] == lines


def test_names_of_a_hundred_characters_are_taken(plan, refuse):
    assert plan(f'name = "{"n" * 100}"\n' + SMALL).name == "n" * 100
    assert "at most 100 characters" in refuse(SMALL, name=f"{'f' * 150}.toml")[0]


def test_a_thousand_mistakes_are_counted(refuse):
    told = refuse("".join(f"key{n} = 1\n" for n in range(1000)) + SMALL)
    assert len(told) == 21
    assert told[-1] == "and 980 more"


@pytest.mark.parametrize(
    "text",
    ["{}" + SMALL, "{}", SMALL.replace('dataset = "digits"', "") + '[dataset]\nuse = "digits"\n{}'],
)
def test_advice_is_found_only_for_what_is_shown(refuse, text, monkeypatch):
    """Comparing words is what takes long."""
    compared = set()
    monkeypatch.setattr(
        errors.difflib, "get_close_matches", lambda word, *_, **__: compared.add(word) or []
    )
    told = refuse(text.format("".join(f"key{n} = 1\n" for n in range(99))))
    assert told[-1].endswith(" more")
    assert 20 <= len(compared) <= 21


@pytest.mark.parametrize(
    "setting",
    [
        f"pretrain.epochs={'x' * 5000}",
        f"pretrain.epochs='{'x ' * 2500}'",
        f"pretrain.epochs={{ a = [{'1, ' * 2000}1] }}",
        f"prune.pruner={'y' * 5000}",
        f"name='{'n' * 5000}'",
        f"{'z' * 5000}=1",
    ],
    ids=lambda setting: setting[:24],
)
def test_long_values_are_cut(refuse, setting):
    (told,) = refuse(SMALL, setting)
    assert len(told) < 1000
    assert " ... " in told


def test_a_missing_file_is_told_with_the_place_it_was_looked_for(refuse, here):
    text = SMALL.replace('"digits"', '{ use = "npz", file = "my.npz" }')
    text = text.replace('"small-cnn"', '{ use = "small-cnn", init = "w.safetensors" }')
    end = "relative paths start at the folder of the recipe"
    assert refuse(text) == [
        f"r.toml:1: file of dataset 'npz': there is no {here}/my.npz; {end}",
        f"r.toml:2: init of [architecture]: there is no {here}/w.safetensors; {end}",
    ]


def test_a_missing_threat_is_asked_for_wherever_it_is_needed(refuse):
    way = 'write [threat] with norm = "linf" and eps = "8/255"'
    assert refuse(SMALL.replace("benign", "trades").replace('"clean"', '"clean", "pgd"')) == [
        f"r.toml:3: objective 'trades' needs a threat model; {way}",
        f"r.toml:14: evaluator 'pgd' needs a threat model; {way}",
    ]


def test_a_norm_that_a_component_does_not_take(refuse):
    way = 'does not take norm "l2"; write norm = "linf" and an eps for it, or use another component'
    threat = '[threat]\nnorm = "l2"\neps = 0.5\n'
    assert refuse(SMALL.replace("benign", "free-adv") + threat) == [
        f"r.toml:3: objective 'free-adv' {way}"
    ]


def test_without_validation_the_best_epoch_cannot_be_chosen(refuse, plan):
    text = SMALL.replace('"digits"', '{ use = "digits", validation = 0 }')
    way = (
        "has no images to choose its best epoch with, because validation is 0; write select = "
        '"last"'
    )
    assert refuse(text) == [
        f"r.toml:4: stage 'pretrain' {way} in it",
        f"r.toml:7: stage 'prune' {way} in it",
    ]
    assert plan(text, "pretrain.select=last", "prune.select=last").runs
    # A one-shot pruner has no epochs to choose from.
    assert plan(text, "pretrain.select=last", "prune.pruner=lwm").runs


@pytest.mark.parametrize("objective", ["ibp", "crown-ibp", "mixtrain"])
def test_training_by_bounds_refuses_extra_images(objective, refuse, plan):
    text = SMALL.replace('"digits"', '{ use = "digits", extra = "digits" }')
    objective = f"[threat]\neps = 0.1\n[objective]\nuse = {objective!r}\n"
    told = text.replace('objective = "benign"\n', objective)
    (line,) = refuse(told)
    assert line.startswith("r.toml:1: extra is not for objective ")
    assert line.endswith("write allow_extra = true in the objective")
    assert plan(told, "objective.allow_extra=true").runs
    assert plan(text).runs


def test_how_much_is_extra_is_said_once(refuse, plan):
    text = SMALL.replace('"digits"', '{ use = "digits", extra = "digits", extra_fraction = 0.7 }')
    assert plan(text).runs
    (line,) = refuse(text, "dataset.extra_ratio=2")
    assert "extra_ratio and extra_fraction both say how much is extra; remove one" in line


@pytest.mark.parametrize("key", ["extra_fraction", "extra_ratio"])
def test_how_much_is_extra_needs_extra_images(key, refuse):
    (line,) = refuse(SMALL.replace('"digits"', f'{{ use = "digits", {key} = 0.7 }}'))
    assert line.endswith(f"{key} needs extra, the data set whose images are added")


def test_a_data_set_as_its_own_extra_one_is_noted(plan):
    told = plan(SMALL.replace('"digits"', '{ use = "digits", extra = "digits" }')).notes
    assert any("extra is the data set itself" in note for note in told)
    assert not any("extra is" in note for note in plan(SMALL).notes)


def test_a_metric_that_the_objective_does_not_validate(refuse, plan):
    assert refuse(TOP + PRETRAIN + 'select = "acuracy"\n' + EVALUATE) == [
        "r.toml:7: stage 'pretrain': objective 'benign' has no validation metric 'acuracy'; "
        "did you mean 'accuracy'?"
    ]
    assert refuse(SMALL, "prune.select=robust_accuracy") == [
        "--set prune.select=robust_accuracy: stage 'prune': objective 'benign' has no validation "
        "metric 'robust_accuracy'; did you mean 'accuracy'?"
    ]
    # Where the classes are unbalanced, which the data says.
    assert plan(SMALL, "pretrain.select=balanced_accuracy", "prune.select=last").runs


def test_a_misspelt_prune_does_not_make_a_mistake_of_finetune(refuse):
    text = TOP + PRUNE.replace('"prune"', '"prun"') + '[[stage]]\nkind = "finetune"\nepochs = 1\n'
    assert refuse(text) == ["r.toml:5: the kind of a stage cannot be 'prun'; did you mean 'prune'?"]


def test_a_mistake_in_a_sweep_is_told_once_with_the_line_of_the_value(refuse):
    sweep = '[sweep]\nseed = [0, 1]\n"prune.sparsity" = [\n  0.9,\n  95,\n]\n"prune.epoch" = [1]\n'
    assert refuse(SMALL + sweep) == [
        "r.toml:19: sparsity of stage 'prune' must be above 0 and below 1, got 95; write 0.95 for "
        "95 %",
        "r.toml:21: unknown option 'epoch' of stage 'prune'; did you mean 'epochs'?",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "sweep", "told"),
    [
        ('"score"', '"scoer"', '"prune.pruner" = ["lwm", "random"]', "unknown pruner 'scoer'"),
        ('"score"', '"scoer"', 'case = [{ prune.pruner = "lwm" }]', "unknown pruner 'scoer'"),
        ('"benign"', '"bening"', 'objective = ["benign"]', "unknown objective 'bening'"),
        ('"benign"', '"bening"', '"objective.use" = ["benign"]', "unknown objective 'bening'"),
        (
            'objective = "benign"',
            'objective = { use = "smoothing", sigm = 1 }',
            'objective = ["benign"]',
            "unknown option 'sigm' of objective 'smoothing'",
        ),
        (
            '"small-cnn"',
            '"small-cn"',
            'architecture = ["lin-2"]',
            "unknown architecture 'small-cn'",
        ),
        ('["clean"]', '["claen"]', '"evaluate.with" = [["clean"]]', "unknown evaluator 'claen'"),
    ],
)
def test_a_sweep_hides_no_wrong_component(refuse, old, new, sweep, told):
    problems = refuse(f"{SMALL.replace(old, new)}[sweep]\n{sweep}\n")
    assert [told in problem for problem in problems] == [True]


def test_what_a_sweep_decides_is_no_mistake_without_it(plan):
    """No threat, no sparsity, and one that does not suit the structure of another case."""
    swept = SMALL.replace('"benign"', '{ use = "pgd-at" }').replace("sparsity = 0.9\n", "")
    made = plan(swept + '[sweep]\nobjective = ["benign"]\n"prune.sparsity" = [0.5, 0.9]\n')
    assert len(made.runs) == 2


def test_stages_are_resolved_with_names_positions_and_sparsity(plan):
    second = PRUNE.replace("0.9", '0.95\nname = "again"')
    (run,) = plan(TOP + PRETRAIN + PRUNE + EVALUATE + second).runs
    assert [(s.kind, s.name, s.position, s.sparsity) for s in run.stages] == [
        ("pretrain", "pretrain", 0, 0.0),
        ("prune", "prune", 1, 0.9),
        ("evaluate", "evaluate", 2, 0.9),
        ("prune", "again", 3, 0.95),
    ]
    assert {s.options.objective.component.name for s in run.stages if s.kind != "evaluate"} == {
        "benign"
    }


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ('wrap = ["s2ap"]', "start = 5 of 's2ap'"),
        ('wrap = [{ use = "s2ap", start = 3 }]', ""),
        ('wrap = [{ use = "awp", start = 4 }]', "start = 4 of 'awp'"),
        ('objective = { use = "fgsm-rs", eps = 0.1, ramp = 9 }', "ramp = 9 of 'fgsm-rs'"),
        ('objective = { use = "fgsm-rs", eps = 0.1, ramp = 3.5 }', ""),
        ('optimizer = { use = "sgd", schedule = { use = "cosine", warmup = 4 } }',
         "warmup = 4 of 'cosine'"),
    ],
)  # fmt: skip
def test_what_a_stage_is_too_short_for_is_told(plan, changed, told):
    text = TOP + PRETRAIN + PRUNE.replace("epochs = 1", f"epochs = 4\n{changed}")
    expected = (
        f"stage 'prune' has 4 epochs, so that {told} is never over; write less, or more epochs",
    )
    assert plan(text).notes == (expected if told else ())


def test_an_objective_of_a_stage_goes_before_that_of_the_recipe(plan):
    text = "threat = { eps = 0.1 }\n" + TOP + PRETRAIN + 'objective = "trades"\n' + PRUNE
    (run,) = plan(text).runs
    assert [s.options.objective.component.name for s in run.stages] == ["trades", "benign"]


def test_the_name_is_that_of_the_file_unless_the_recipe_says_another(plan):
    assert plan(SMALL, name="my (first) run.toml").name == "my (first) run"
    assert plan('name = "other"\n' + SMALL).name == "other"
    assert plan(SMALL, "name=third").name == "third"


def test_overrides_of_the_threat_are_flagged(plan):
    text = "threat = { eps = 0.1 }\n" + SMALL.replace(
        '["clean"]', '["pgd", { use = "pgd", name = "wide", eps = 0.2 }]'
    )
    assert plan(text).notes == (
        "stage 'evaluate': 'wide' has norm linf, eps 0.2; the recipe's threat is linf, 0.1",
    )


@pytest.mark.parametrize("pruner", ["harp", "twinrep"])
def test_a_pruner_that_decides_when_it_removes_takes_no_schedule(plan, refuse, pruner):
    text = TOP + PRETRAIN + PRUNE.replace("score", pruner)
    assert "sparsity_schedule" not in plan(text).runs[0].stages[1].describe()
    (found,) = refuse(text + 'sparsity_schedule = "cubic"\n')
    told = "decides itself what it removes by when: sparsity_schedule has no effect; remove it"
    assert f"pruner {pruner!r} {told}" in found


def test_what_a_one_shot_pruner_does_not_need_is_noted_where_something_else_put_it_there(
    plan, here
):
    note = ("stage 'prune': pruner 'lwm' is one-shot and does not use epochs",)
    assert plan(SMALL + '[sweep]\n"prune.pruner" = ["score", "lwm"]\n').notes == note
    assert plan(SMALL, "prune.pruner=lwm").notes == note
    (here / "base.toml").write_text(SMALL)
    plain = plan('extends = "base.toml"\nset."prune.pruner" = "lwm"\n')
    assert plain.notes == note
    assert plain.runs[0].stages[1].options.epochs is None


def test_two_plugins_of_one_name_are_told_apart(plan, refuse, here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    (here / "rival_under_test.py").write_text(
        "from prunekit import PrunerComponent, hookimpl\n"
        "@hookimpl\ndef prunekit_pruners():\n"
        "    yield PrunerComponent(name='lwm', summary='Rival', build='rival_under_test:build')\n"
    )
    points = [*entry_points(group="prunekit"), EntryPoint("rival", "rival_under_test", "prunekit")]
    registry = load_registry(points)
    text = TOP + PRUNE.replace("epochs = 1\n", "")
    (line,) = refuse(text.replace("score", "lwm"), registry=registry)
    assert line.startswith("r.toml:7: pruner 'lwm' is claimed by the plugins pruners (prunekit ")
    assert line.endswith('and rival (unknown); write "pruners:lwm" or "rival:lwm"')
    first = plan(text.replace("score", "rival:lwm"), registry=registry)
    assert first.runs[0].stages[0].options.pruner.component.summary == "Rival"
    again = plan(tomli_w.dumps(first.describe(first.runs[0])), registry=registry)
    assert again.runs[0].stages == first.runs[0].stages


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("prune.pruner=lwm",),
        ("name=other", "seed=3", 'report=["console"]'),
        ("pretrain.optimizer={use='adam', betas=[0.5, 0.9], schedule={use='step', factor=0.5}}",),
        ("dataset.augment=['flip']", "dataset.fraction=0.5", "prune.exclude=['fc*']"),
        ("threat.eps=2/255", "objective=trades", "objective.beta=3", "evaluate.with=['pgd']"),
        ("evaluate.with=[{use='pgd', name='a', eps=0.1}, {use='pgd', name='b', eps=0.2}]",),
    ],
)
def test_the_resolved_recipe_is_a_recipe_of_the_same_run(plan, settings):
    first = plan(SMALL, *settings)
    (run,) = first.runs
    written = tomli_w.dumps(first.describe(run))
    again = plan(written, name="written.toml")
    assert again.notes == () or "threat" in again.notes[0]
    (same,) = again.runs
    assert same.describe() == run.describe()
    assert same.stages == run.stages
    assert (again.name, again.reporters) == (first.name, first.reporters)


def test_files_of_a_resolved_recipe_are_found_from_anywhere(plan, here):
    (here / "data").mkdir()
    (here / "data/my.npz").touch()
    (here / "w.safetensors").touch()
    text = SMALL.replace('"digits"', '{ use = "npz", file = "data/my.npz" }')
    text = text.replace('"small-cnn"', '{ use = "small-cnn", init = "w.safetensors" }')
    first = plan(text)
    (here / "out").mkdir()
    again = plan(tomli_w.dumps(first.describe(first.runs[0])), name="out/recipe.toml")
    assert again.runs[0].describe() == first.runs[0].describe()
    assert again.runs[0].init == here / "w.safetensors"

    swept = plan(text + '[sweep]\n"dataset.file" = ["data/my.npz"]\n')
    again = plan(tomli_w.dumps(dict(swept.document)), name="out/recipe.toml")
    assert again.swept
    assert [r.describe() for r in again.runs] == [r.describe() for r in swept.runs]


def test_a_base_in_another_folder_finds_its_own_files(plan, here):
    (here / "base").mkdir()
    (here / "base/my.npz").touch()
    text = SMALL.replace('"digits"', '{ use = "npz", file = "my.npz" }')
    (here / "base/b.toml").write_text(text)
    (run,) = plan('extends = "base/b.toml"\n').runs
    assert run.dataset.options.file == here / "base/my.npz"


REWIRED = """\
[[stage]]
kind = "pretrain"
epochs = 2
sparsity = 0.8
rewire = "told"
"""


@pytest.fixture
def with_rewirer():
    told = RewirerComponent(name="told", summary="Told", build="m:b")
    own = RewirerComponent(name="own", summary="Its own counts", build="m:b", allocates=True)
    entries = [Entry(component, "told", "told 1.0") for component in (told, own)]
    return Registry((*REGISTRY.entries, *entries))


def test_a_stage_that_rewires_counts_as_a_prune(plan, with_rewirer):
    text = TOP + REWIRED + '[[stage]]\nkind = "finetune"\nepochs = 1\n' + EVALUATE
    (run,) = plan(text, registry=with_rewirer).runs
    assert [stage.sparsity for stage in run.stages] == [0.8] * 3
    assert [stage.prunes for stage in run.stages] == [True, False, False]
    described = run.stages[0].describe()
    assert (described["sparsity"], described["budget"]) == (0.8, {"use": "layer"})
    assert "sparsity" not in run.stages[1].describe()


def test_what_rewiring_stages_need_and_what_others_do_not_take(refuse, with_rewirer):
    found = refuse(TOP + REWIRED.replace("sparsity = 0.8\n", ""), registry=with_rewirer)
    assert "needs sparsity" in found[0]
    (found,) = refuse(TOP + PRETRAIN + "sparsity = 0.5\n")
    assert "sparsity is for stages that prune; remove it, or name a rewirer" in found
    (found,) = refuse(TOP + REWIRED + PRUNE.replace("0.9", "0.8"), registry=with_rewirer)
    assert "0.8 after 0.8 removes nothing" in found
    own = REWIRED.replace('"told"', '"own"')
    (found,) = refuse(TOP + own + 'budget = "erk"\n', registry=with_rewirer)
    assert "rewirer 'own' says itself what each layer keeps: budget has no effect" in found
    (found,) = refuse(
        TOP + REWIRED + 'structure = "2:4"\nsparsity_schedule = "cubic"\n', registry=with_rewirer
    )
    assert "removes 0.5, not 0.8" in found or "fixes the sparsity" in found


def test_a_ratio_and_counts_of_its_own_are_refused(refuse, with_rewirer):
    own = REWIRED.replace('"told"', '"own"').replace("sparsity = 0.8\n", "")
    (found,) = refuse(TOP + own + 'structure = "2:4"\n', registry=with_rewirer)
    assert "rewirer 'own' says itself what each layer keeps, and so does 2:4" in found


def test_a_plan_of_a_rewiring_stage_comes_back_from_its_description(plan, with_rewirer, here):
    first = plan(TOP + REWIRED, registry=with_rewirer)
    text = tomli_w.dumps(first.describe(first.runs[0]))
    again = plan(text, registry=with_rewirer, name="again.toml")
    assert again.runs[0].describe() == first.runs[0].describe()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('structure = "channel"\n', "is for single weights; write structure ="),
        (
            'rewire.budget = "global"\n',
            "global compares scores and gives no counts; write budget =",
        ),
        (
            'rewire.budget = "lamp"\n',
            "lamp compares scores and gives no counts; write budget =",
        ),
    ],
)
def test_flyingbird_plus_says_what_it_does_not_take(refuse, line, told):
    text = REWIRED.replace('rewire = "told"', 'rewire.use = "flyingbird-plus"')
    (found,) = refuse(TOP + text + line)
    assert told in found


def test_gradual_needs_a_sparsity_that_grows(refuse, plan):
    text = TOP + REWIRED.replace('"told"', '"gradual"')
    (found,) = refuse(text)
    assert found == (
        "r.toml:8: rewirer 'gradual' needs a sparsity that grows during the stage; "
        'write sparsity_schedule = "cubic"'
    )
    assert plan(text + 'sparsity_schedule = "linear"\n').runs
    (found,) = refuse(text.replace("sparsity = 0.8", 'structure = "2:4"'))
    assert found.endswith('grows during the stage, and 2:4 fixes it; write structure = "element"')


def test_a_budget_that_takes_no_signed_scores(refuse, plan):
    text = TOP + PRETRAIN + PRUNE.replace('"score"\nepochs = 1', '"movement"\nbudget = "lamp"')
    assert refuse(text) == [
        "r.toml:11: scores of pruner 'movement' may be below 0, and budget 'lamp' takes none that "
        "are; remove it, or write another"
    ]
    assert plan(text.replace("lamp", "global")).runs
    assert plan(text.replace("movement", "lwm")).runs


@pytest.mark.parametrize("name", ["rslad", "saad"])
def test_a_teacher_is_a_file_or_a_dense_network_of_the_run(name, refuse, plan, here):
    threat = "[threat]\neps = 0.1\n"
    own = PRETRAIN + f'name = "taught"\nobjective = "{name}"\n'
    told = f"objective '{name}' of stage 'taught' has no teacher: no pretrain stage before it "
    told += 'leaves a dense network; put one there, or name a model file: teacher = "dense.safet'
    (found,) = refuse(TOP + own + threat)
    assert found == f'r.toml:4: {told}ensors"'
    sparse = REWIRED.replace('"told"', '"set"')
    (found,) = refuse(TOP + sparse + own + threat)
    assert told in found
    assert plan(TOP + PRETRAIN + own + threat).runs
    (here / "t.safetensors").touch()
    named = own.replace(f'"{name}"', f'{{ use = "{name}", teacher = "t.safetensors" }}')
    assert plan(TOP + named + threat).runs


def test_the_budget_within_a_rewirer_is_among_what_a_stage_uses(plan):
    """So its source is in the stage's key."""
    (run,) = plan(TOP + REWIRED.replace('"told"', '"flyingbird-plus"')).runs
    assert ("budget", "igq") in {(use.kind, use.name) for use in run.stages[0].uses()}


def test_wrappers_that_cannot_serve_are_refused(refuse, plan):
    both = PRETRAIN + 'wrap = ["ema", {use = "ema", decay = 0.9}]\n'
    found = refuse(TOP + both)
    assert "only one average can be judged and stored" in found[0]
    threat = "[threat]\neps = 0.1\n"
    several = PRETRAIN + 'objective = "free-adv"\nwrap = ["awp"]\n'
    (found,) = refuse(TOP + several + threat)
    assert "'awp' goes through a step's loss several times, and objective 'free-adv' takes" in found
    (found,) = refuse(TOP + PRETRAIN + 'wrap = ["s2ap"]\n')
    assert "'s2ap' is for stages that learn scores; write it in a prune stage" in found
    for pruner in ("radmm", "twinrep"):
        trained = PRUNE.replace("score", pruner) + 'wrap = ["s2ap"]\n'
        (found,) = refuse(TOP + PRETRAIN + trained)
        assert f"'s2ap' needs learned scores, {pruner!r} has none; remove it" in found
    (found,) = refuse(TOP + PRETRAIN + 'wrap = ["awp", { use = "awp", gamma = 0.1 }]\n')
    assert found.endswith("stage 'pretrain': 'awp' is listed twice; keep one")
    plan(TOP + several.replace('"awp"', '"ema"') + threat)
    plan(TOP + several.replace('"free-adv"', '"trades"') + threat)


def test_a_prune_stage_trains_where_its_pruner_trains_weights(plan):
    for pruner, trains in (("score", False), ("lwm", False), ("radmm", True)):
        prune = PRUNE.replace("score", pruner)
        prune = prune.replace("epochs = 1\n", "") if pruner == "lwm" else prune
        (run,) = plan(TOP + PRETRAIN + prune + EVALUATE).runs
        assert [stage.trains for stage in run.stages] == [True, trains, False]


def test_what_validates_beside_the_objective(refuse, plan):
    threat = "[threat]\neps = 0.1\n"
    validate = 'validate = "pgd"\n'
    (run,) = plan(TOP + PRETRAIN + validate + threat).runs
    assert run.stages[0].select == "pgd.accuracy"
    named = 'validate = { use = "pgd", name = "weak", steps = 5 }\n'
    (run,) = plan(TOP + PRETRAIN + named + 'select = "accuracy"\n' + threat).runs
    assert run.stages[0].select == "accuracy"
    (found,) = refuse(TOP + PRETRAIN + named + 'select = "weak"\n' + threat)
    assert "has no validation metric 'weak'; there are: accuracy, last, weak.accuracy" in found
    (found,) = refuse(TOP + PRETRAIN + 'validate = "clean"\n')
    assert "'clean' is no attack and no proof; write use = \"pgd\"" in found
    held = TOP.replace('"digits"', '{ use = "digits", validation = 0 }')
    (found,) = refuse(held + PRETRAIN + validate + 'select = "last"\n' + threat)
    assert found.endswith('write select = "last" in it, and remove validate')
    (found,) = refuse(TOP + PRETRAIN + 'patience = 3\nselect = "last"\n')
    assert "keeps its last epoch; write select = ..., or no patience" in found
    for key in ("patience = 1", "validation_images = 9"):
        one_shot = PRUNE.replace('"score"', '"lwm"').replace("epochs = 1", key)
        (found,) = refuse(TOP + one_shot)
        assert f"{key.split()[0]} has no effect" in found


def test_more_validation_images_than_are_held_out_are_told(plan):
    half = '{ use = "digits", fraction = 0.5, validation = 0.1 }'
    text = TOP.replace('"digits"', half) + PRETRAIN
    # Of 1437 images 718 are used, and 72 of them held out.
    assert plan(text + "validation_images = 72\n").notes == ()
    told = "stage 'pretrain': validation_images = 73, but 72 are held out: all are used"
    assert plan(text + "validation_images = 73\n").notes == (told,)


def test_steps_longer_than_eps_are_told(plan):
    text = TOP.replace('"benign"', '{ use = "pgd-at", step_size = "8/255" }')
    text += 'threat = { eps = "2/255" }\n' + PRETRAIN
    evaluate = (
        '[[stage]]\nkind = "evaluate"\nwith = [{ use = "pgd", step_size = 0.05, eps = 0.06 }]\n'
    )
    notes = plan(text + evaluate).notes
    assert [note for note in notes if "swapped" in note] == [
        "stage 'pretrain': 'pgd-at' takes steps of 0.0313725, longer than its eps of 0.00784314; "
        "were the two swapped?"
    ]
    # A single step that is longer than eps is how the method is meant.
    single = text.replace('{ use = "pgd-at", step_size = "8/255" }', '"fgsm-rs"')
    assert not plan(single).notes
    assert not plan(single.replace('"fgsm-rs"', '{ use = "fgsm-rs", step = 2.0 }')).notes
    assert plan(single.replace('"fgsm-rs"', '{ use = "fgsm-rs", step = 3.0 }')).notes == (
        "stage 'pretrain': 'fgsm-rs' takes a step of 3 times eps, and 2 cross the whole ball; "
        "write 2 or less",
    )


def test_compute_is_one_for_all_runs(plan, refuse):
    text = SMALL + '[compute]\ndevice = "cpu"\nthreads = 2\n'
    found = plan(text)
    assert (found.compute.device, found.compute.threads) == ("cpu", 2)
    written = {"device": "cpu", "threads": 2, "sparse": "auto"}
    assert found.describe(found.runs[0])["compute"] == written
    assert plan(text, "compute.threads=1").compute.threads == 1
    assert plan(SMALL).describe(plan(SMALL).runs[0]).keys() == found.describe(
        found.runs[0]
    ).keys() - {"compute"}
    (line,) = refuse(SMALL + "[compute]\nthreads = 0\n")
    assert "threads of [compute] must be at least 1, got 0" in line
    found = refuse(SMALL + '[sweep]\n"compute.threads" = [1, 2]\n')
    assert "all runs of a sweep share [compute]" in found[0]


def test_what_the_combinations_of_a_sweep_share_is_checked_once(plan):
    asked = []

    @dataclass(frozen=True)
    class Options:
        level: int = option(1, help="a number", low=0)

        def __post_init__(self):
            asked.append(self.level)

    counted = PrunerComponent(name="counted", summary="s", build="m:b", options=Options)
    registry = Registry((*REGISTRY.entries, Entry(counted, "p", "d 1")))
    recipe = SMALL.replace('pruner = "score"\nepochs = 1\n', 'pruner = "counted"\n')
    sweep = '[sweep]\nseed = [0, 1, 2]\n"prune.sparsity" = [0.5, 0.6]\n'
    found = plan(f'{recipe}{sweep}"prune.pruner.level" = [3, 4]', registry=registry)
    assert len(found.runs) == 12
    assert sorted(asked) == [1, 3, 4]  # 1 is the recipe's own
    first, *_, last = found.runs
    assert first.architecture is last.architecture
    assert [r.stages[1].options.pruner.options.level for r in (first, last)] == [3, 4]


def test_a_mistake_that_two_cases_share_is_told_at_both_places(refuse):
    cases = '[[sweep.case]]\n"prune.sparsity" = 2\n[[sweep.case]]\n"prune.sparsity" = 2\nseed = 1\n'
    told = [line.partition(":")[2].partition(":")[0] for line in refuse(SMALL + cases)]
    start = SMALL.count("\n")
    assert told == [str(start + 2), str(start + 4)]


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        ('structure = "filter"', "cannot be 'filter'; write \"channel\""),
        ('structure = "unstructured"', 'write "element"'),
        ('structure = "2/4"', 'write "2:4"'),
        ("density = 0.1", "write sparsity, which is 1 - density"),
        ("keep = 0.1", "write sparsity, which is 1 - keep"),
        ("prune_ratio = 0.9", "did you mean 'sparsity'?"),
        ("ratio = 0.9", "did you mean 'sparsity'?"),
        ("momentum = 0.9", "it belongs to its optimizer: write optimizer.momentum"),
        ('lr_scheduler = "x"', "it belongs to its optimizer: write optimizer.schedule"),
        ('optimizer = { schedule = "CosineAnnealingLR" }', "did you mean 'cosine'?"),
        ('optimizer = { schedule = "StepLR" }', "did you mean 'step'?"),
        ('optimizer = "Adam"', "unknown optimizer 'Adam'; did you mean 'adam'?"),
    ],
)
def test_what_others_write_is_pointed_to_what_to_write(written, advice, refuse):
    (told,) = refuse(SMALL.replace("sparsity = 0.9", f"sparsity = 0.9\n{written}"))
    assert told.endswith(advice)


def test_keys_at_the_top_that_belong_elsewhere(refuse):
    top = 'lr_scheduler = "cosine"\nkeep_ratio = 0.1\nmomentum = 0.9\n'
    assert [line.partition("; ")[2] for line in refuse(top + SMALL)] == [
        "it belongs below [[stage]]: optimizer = { schedule = ... }",
        "it belongs below [[stage]]: sparsity = ..., which is 1 - keep_ratio",
        "it belongs below [[stage]]: optimizer = { momentum = ... }",
    ]


def test_with_an_unknown_name_that_is_clear_all_else_is_told_too(refuse):
    optimizer = 'optimizer = { use = "SGD", learning_rat = 1, schedule = "StepLR" }'
    epoch = SMALL.replace("epochs = 1", "epoch = 1", 1)
    told = refuse(epoch.replace("sparsity = 0.9", f"sparsity = 0.9\n{optimizer}"))
    assert [line.partition(": ")[2].partition(";")[0] for line in told] == [
        "stage 'pretrain' needs epochs: passes over the training images",
        "unknown option 'epoch' of stage 'pretrain'",
        "unknown optimizer 'SGD'",
        "unknown option 'learning_rat' of optimizer 'sgd'",
        "unknown schedule 'StepLR'",
    ]
