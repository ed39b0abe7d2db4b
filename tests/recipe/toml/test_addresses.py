"""What addresses name, and lists given to `--set`: values, axes of a sweep, narrower sweeps."""

import textwrap

import pytest

from prunekit.catalog.registry import load_registry
from prunekit.errors import UserError
from prunekit.recipe.plan import make_plan
from prunekit.recipe.toml.addresses import resolve_address, takes_list
from prunekit.recipe.toml.document import load_recipe

REGISTRY = load_registry()

RECIPE = """\
dataset = "digits"
architecture = "small-cnn"
objective = "trades"
[threat]
eps = 0.1
[[stage]]
kind = "pretrain"
epochs = 1
wrap = ["ema"]
[[stage]]
kind = "prune"
sparsity = 0.9
epochs = 1
[[stage]]
kind = "evaluate"
with = ["clean", { use = "pgd", steps = 3 }, { use = "pgd", name = "far", eps = 0.3 }]
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(*settings, recipe=RECIPE):
        (tmp_path / "r.toml").write_text(textwrap.dedent(recipe))
        return make_plan(load_recipe(tmp_path / "r.toml", settings), REGISTRY)

    return make


@pytest.fixture
def refuse(plan):
    def line(*settings, **others):
        with pytest.raises(UserError) as caught:
            plan(*settings, **others)
        (found,) = str(caught.value).splitlines()
        return found

    return line


def options(plan, name):
    (found,) = [use for use in plan.runs[0].stages[-1].options.with_ if use.name == name]
    return found.options


@pytest.mark.parametrize("address", ["evaluate.pgd.steps", "evaluate.with.pgd.steps", "pgd.steps"])
def test_an_evaluators_option_has_one_address_everywhere(address, plan):
    """On the command line, in [set], in a sweep."""
    assert options(plan(f"{address}=7"), "pgd").steps == 7
    assert options(plan(recipe=RECIPE + f'[set]\n"{address}" = 7\n'), "pgd").steps == 7
    swept = plan(recipe=RECIPE + f'[sweep]\n"{address}" = [7, 8]\n')
    found = [run.stages[-1].options.with_[1].options.steps for run in swept.runs]
    assert found == [7, 8]
    assert [run.label for run in swept.runs] == ["steps=7", "steps=8"]


def test_names_and_bare_strings(plan):
    assert options(plan("far.steps=2"), "far").steps == 2
    wrapped = plan("pretrain.wrap.ema.decay=0.5").runs[0].stages[0].options.wrap
    assert wrapped[0].options.decay == 0.5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("evaluate.pdg.steps=1", "unknown option 'pdg' of stage 'evaluate'"),
        ("evaluate.with.pdg.steps=1", "'pdg' is not in the list; did you mean 'pgd'?"),
        ("evaluate.pgd.step=1", "unknown option 'step' of evaluator 'pgd'; did you mean 'steps'?"),
        ("prune.lr=0.1", "it belongs to its optimizer: write prune.optimizer.lr"),
        ("pretrain.learning_rate=1", "write pretrain.optimizer.lr"),
        ("pgd.optimizer.lr=1", "unknown option 'optimizer'"),
        ("lr=0.1", "names no stage and no section; write pretrain.optimizer.lr"),
        ("learning-rate=0.1", "write pretrain.optimizer.lr"),
        ("epochs=3", "write pretrain.epochs"),
        ("batch_size=3", "write dataset.batch_size"),
        ("bs=3", "write dataset.batch_size"),
        ("epsilon=3", "write threat.eps"),
        ("sparsity=0.5", "write prune.sparsity"),
        ("images=5", "write evaluate.images"),
        ("density=0.1", "write prune.sparsity, which is 1 - density"),
        ("lr_scheduler=StepLR", "write pretrain.optimizer.schedule or prune.optimizer.schedule"),
        ("steps=9", "write evaluate.pgd.steps"),
        ("evaluate=aa", "is a stage; name one of its options, such as evaluate.with"),
        ("evaluate.with=aa", "must be a list, got 'aa'; write [\"autoattack\"]"),
        ("evaluate.with=clean,aa", 'write ["clean", "autoattack"]'),
        (
            "threat.norm=inf",
            "--set threat.norm=inf: the value is inf, which is not finite; the n",
        ),
        ("pretrain.wrap.swa.decay=1", "'swa' is not in the list; there are: ema"),
        ("clean=1", "names no stage and no section"),
        ("evaluate.pgd=autoattack", "is in a list; name one of its options, or set the whole list"),
    ],
)
def test_addresses_that_name_nothing(setting, message, refuse):
    assert message in refuse(setting)


def test_two_stages_with_an_evaluator_of_that_name(refuse, plan):
    two = RECIPE + '[[stage]]\nkind = "evaluate"\nname = "last"\nwith = ["pgd"]\n'
    two = two.replace('kind = "evaluate"\nwith', 'kind = "evaluate"\nname = "first"\nwith')
    told = refuse("pgd.steps=2", recipe=two)
    assert "'pgd.steps': 2 stages have that; write first.pgd.steps or last.pgd.steps" in told
    assert (
        plan("last.pgd.steps=2", recipe=two).runs[0].stages[-1].options.with_[0].options.steps == 2
    )


def test_one_evaluator_twice_is_ambiguous(refuse):
    twice = RECIPE.replace('name = "far", ', "")
    assert "'pgd' is there several times" in refuse("evaluate.pgd.steps=2", recipe=twice)


def test_a_list_of_values_makes_a_sweep(plan):
    found = plan("prune.sparsity=[0.5, 0.8]", "seed=[0, 1, 2]")
    assert len(found.runs) == 6
    assert found.swept
    assert [run.label for run in found.runs[:2]] == ["sparsity=0.5,seed=0", "sparsity=0.5,seed=1"]
    assert found.runs[4].settings == {"prune.sparsity": 0.8, "seed": 1}
    # What is written to the folder of the runs gives the same again.
    import tomli_w

    again = plan(recipe=tomli_w.dumps(dict(found.document)))
    assert [run.settings for run in again.runs] == [run.settings for run in found.runs]


def test_components_and_their_options_are_axes_too(plan):
    assert len(plan('prune.pruner=["lwm", "score"]').runs) == 2
    assert len(plan("pretrain.optimizer.lr=[0.1, 0.01]").runs) == 2
    assert len(plan("evaluate.pgd.steps=[1, 2]").runs) == 2
    assert len(plan('objective=["trades", "pgd-at"]').runs) == 2
    assert len(plan("threat.eps=['2/255', '8/255']").runs) == 2


@pytest.mark.parametrize(
    "setting",
    [
        'evaluate.with=["clean", "pgd"]',
        'prune.exclude=["fc.*"]',
        'report=["console"]',
        'dataset.augment=["flip"]',
        'pretrain.wrap=["awp"]',
        'pretrain.optimizer.schedule={use="step", milestones=[0.3, 0.6]}',
    ],
)
def test_an_option_that_takes_a_list_gets_it(setting, plan):
    assert not plan(setting).swept


def test_a_list_of_lists_sweeps_an_option_that_takes_a_list(plan):
    found = plan('evaluate.with=[["clean"], ["clean", "pgd"]]')
    assert [len(run.stages[-1].options.with_) for run in found.runs] == [1, 2]
    found = plan(
        'pretrain.optimizer={use="adam"}', "pretrain.optimizer.betas=[[0.9, 0.99], [0.8, 0.9]]"
    )
    assert [run.stages[0].options.optimizer.options.betas for run in found.runs] == [
        (0.9, 0.99),
        (0.8, 0.9),
    ]
    assert not plan('pretrain.optimizer={use="adam"}', "pretrain.optimizer.betas=[0.9, 0.99]").swept


def test_a_sweep_is_narrowed_in_its_place(plan):
    swept = RECIPE + '[sweep]\n"prune.sparsity" = [0.5, 0.7, 0.9]\nseed = [0, 1]\n'
    assert [run.label for run in plan("prune.sparsity=[0.7]", recipe=swept).runs] == [
        "sparsity=0.7,seed=0",
        "sparsity=0.7,seed=1",
    ]
    assert len(plan("seed=[5, 6, 7]", recipe=swept).runs) == 9
    one = plan("seed=3", recipe=swept)
    assert {run.seed for run in one.runs} == {3}


def test_no_values_are_told(refuse):
    assert "seed lists no values to try" in refuse("seed=[]")


@pytest.mark.parametrize(
    ("address", "listed"),
    [
        ("seed", False), ("name", False), ("report", True), ("threat.eps", False),
        ("dataset", False), ("dataset.augment", True), ("dataset.batch_size", False),
        ("prune.exclude", True), ("prune.budget", False), ("evaluate.with", True),
        ("evaluate.pgd.steps", False), ("objective.beta", False),
        ("pretrain.optimizer.schedule", False), ("pretrain.optimizer.schedule.warmup", False),
        ("pretrain.nonsense", True),
    ],
)  # fmt: skip
def test_which_options_take_lists(address, listed, plan, tmp_path):
    plan()
    data = load_recipe(tmp_path / "r.toml").data
    path = resolve_address(data, address)
    assert takes_list(data, path, REGISTRY) == listed


def test_options_of_a_component_that_set_chose_are_swept(plan):
    """The sweep's rates are of the optimizer that `--set` puts in."""
    swept = RECIPE + '[sweep]\n"pretrain.optimizer.lr" = [0.5, 0.25]\n'
    found = plan('pretrain.optimizer={use="adam"}', recipe=swept)
    chosen = [run.stages[0].options.optimizer for run in found.runs]
    assert [(use.name, use.options.lr) for use in chosen] == [("adam", 0.5), ("adam", 0.25)]
