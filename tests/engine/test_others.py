"""The other networks of an objective: the run's dense one, or that of a file."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prunekit.errors import Interrupted
from prunekit.report import Note, StageDone

TAUGHT = """
[[stage]]
kind = "finetune"
epochs = 2
objective = { use = "rslad", steps = 1, validation_steps = 1 }
"""


@pytest.fixture
def look(bench, parts, tmp_path):
    """What the objective of a finetune stage sees as another network, of a file or none."""

    def look(file=None, recipe=None):
        seen = []

        def learn(context):
            if context.stage == "finetune":
                seen.append(context.network(file))

        parts.act["learn"] = learn
        told = 'kind = "finetune"\nobjective = "told"'
        text = (recipe or bench.recipe).replace('kind = "finetune"', told)
        (folder,) = bench.run(recipe=text, out=f"out{len(list(tmp_path.iterdir()))}")
        return folder, seen

    return look


def find_model(bench, kind):
    """The model file of the last stage of that kind."""
    key = [event.key for event in bench.of(StageDone) if event.kind == kind][-1]
    return next((bench.folder / "store").glob(f"**/{key}/model.safetensors"))


def test_it_is_what_the_first_pretrain_stage_ended_with(bench, look):
    more = '[[stage]]\nkind = "pretrain"\nname = "more"\nepochs = 1\n[[stage]]\nkind = "prune"'
    recipe = bench.recipe.replace('[[stage]]\nkind = "prune"', more)
    folder, seen = look(recipe=recipe)
    assert folder.error == ""
    first = next(event.key for event in bench.of(StageDone) if event.stage == "pretrain")
    expected = load_file(next((bench.folder / "store").glob(f"**/{first}/model.safetensors")))
    model = seen[-1]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_it_is_that_of_a_file(bench, look, tmp_path):
    bench.run("architecture=lin-1", "pretrain.epochs=1")
    file = tmp_path / "teacher.safetensors"
    shutil.copy(find_model(bench, "pretrain"), file)
    folder, seen = look(file)
    assert folder.error == ""
    found = seen[-1].state_dict()
    assert all(torch.equal(found[name], value) for name, value in load_file(file).items())


@pytest.mark.parametrize(("kind", "times"), [("pretrain", 0), ("prune", 1)])
def test_a_pruned_file_is_noted(kind, times, bench, look):
    bench.run()
    folder, _ = look(find_model(bench, kind))
    told = [note.text for note in bench.of(Note) if "may teach more" in note.text]
    assert (folder.error, len(told)) == ("", times)
    assert all("/model.safetensors is pruned, " in text for text in told)


def change(file, out, **header):
    """A copy of a model file with another header."""
    with safe_open(file, framework="pt") as content:
        told = json.loads(content.metadata()["prunekit"]) | header
    save_file(load_file(file), out, {"prunekit": json.dumps(told)})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"classes": 4}, "is for images [1, 8, 8] and 4 classes, the data set has [1, 8, 8] and 3"),
        ({"shape": [3, 8, 8]}, "is for images [3, 8, 8] and 3 classes"),
        ({"architecture": {"use": "python", "file": "net.py"}}, "no recipe of yours did so before"),
    ],
)
def test_a_file_that_does_not_do_is_refused(header, message, bench, look, tmp_path):
    (tmp_path / "net.py").write_text("raise SystemExit('it ran')")
    bench.run()
    file = tmp_path / "teacher.safetensors"
    change(find_model(bench, "pretrain"), file, **header)
    folder, _ = look(file)
    assert message in folder.error


def test_without_a_pretrain_stage_there_is_none(bench, look):
    recipe = bench.recipe.replace('[[stage]]\nkind = "pretrain"\nepochs = 2\n', "")
    folder, _ = look(recipe=recipe)
    assert "no pretrain stage that leaves the network dense comes before this one" in folder.error
    assert 'teacher = "dense.safetensors"' in folder.error


def test_keys_follow_the_content_of_a_teacher(bench):
    bench.run()
    model = find_model(bench, "pretrain")
    shutil.copy(model, bench.folder / "a.safetensors")
    shutil.copy(model, bench.folder / "b.safetensors")
    change(model, bench.folder / "c.safetensors", seed=9)
    recipe = bench.recipe.replace('[[stage]]\nkind = "finetune"\nepochs = 2\n', TAUGHT)
    told = [
        bench.keys(f"finetune.objective.teacher={bench.folder}/{name}.safetensors", recipe=recipe)
        for name in "abc"
    ]
    assert told[0] == told[1]
    assert [a == b for a, b in zip(told[0], told[2], strict=True)] == [True, True, False, False]


def test_keys_follow_the_code_of_a_teacher(bench):
    bench.run()
    net, teacher = bench.folder / "net.py", bench.folder / "teacher.safetensors"
    table = {"use": "python", "file": "net.py"}
    change(find_model(bench, "pretrain"), teacher, architecture=table)
    recipe = bench.recipe.replace('[[stage]]\nkind = "finetune"\nepochs = 2\n', TAUGHT)
    told = []
    for text in ("import torch\n", "import torch  # changed\n"):
        net.write_text(text)
        told.append(bench.keys(f"finetune.objective.teacher={teacher}", recipe=recipe))
    assert [a == b for a, b in zip(*told, strict=True)] == [True, True, False, False]


def test_a_distillation_that_was_stopped_ends_with_the_same_bits(bench):
    recipe = bench.recipe.replace('[[stage]]\nkind = "finetune"\nepochs = 2\n', TAUGHT)
    (whole,) = bench.run(recipe=recipe, out="whole", store="whole-store")
    engine = bench.engine("store")

    def report(event):
        if type(event).__name__ == "EpochDone" and event.stage == "finetune" and not event.stored:
            engine.stop.requested = True

    engine.report = report
    plan = bench.plan(recipe=recipe)
    with pytest.raises(Interrupted):
        engine.run(plan, bench.folder / "out")
    (again,) = bench.run(recipe=recipe)
    assert whole.error == again.error == ""
    one, other = load_file(whole.model), load_file(again.model)
    assert all(torch.equal(one[name], value) for name, value in other.items())
