"""An attack or a proof at validation images, beside the objective."""

import numpy as np
import pytest
import torch

from prunekit import load
from prunekit.report import EpochDone, Note, StageDone

PGD = '{ use = "pgd", steps = 2, restarts = 1 }'


def with_validate(bench, text, recipe=None):
    recipe = recipe or bench.recipe
    return recipe.replace('kind = "pretrain"\n', f'kind = "pretrain"\n{text}\n')


def test_the_verdicts_on_some_validation_images_choose_the_epoch(bench):
    """The attack is too weak to move anything: its accuracy is the clean one, by hand."""
    text = f"validate = {PGD}\nvalidation_images = 3"
    bench.run("threat.eps=1e-9", recipe=with_validate(bench, text))
    (done, *_) = bench.of(StageDone)
    assert done.metrics["select"] == "pgd.accuracy"
    metrics = [done.metrics[f"validation.{name}"] for name in ("accuracy", "pgd.accuracy")]
    # 5 of the 20 images are held out, of which 0, 1 and 3 are evenly spaced.
    data = np.load(bench.folder / "images.npz")
    drawn = bench.engine().inputs.load(bench.plan().runs[0]).validation
    x, y = drawn.images[[0, 1, 3]], drawn.labels[[0, 1, 3]]
    assert all(any(np.array_equal(image, one) for one in data["x_train"]) for image in x[:, 0])
    model = load(bench.engine().store.folder(done.key).model).model
    with torch.no_grad():
        right = (model(x.float() / 255).argmax(1) == y).float().mean().item()
    assert metrics == pytest.approx([right, right])
    assert {e.decides for e in bench.of(EpochDone)} == {
        "validation.pgd.accuracy",
        "validation.accuracy",
    }


@pytest.mark.parametrize("use", [PGD, '{ use = "verified", eps = 0.01, name = "proof" }'])
def test_networks_with_learned_scores_are_judged(bench, use):
    text = f'kind = "prune"\nvalidate = {use}'
    bench.run(recipe=bench.scored.replace('kind = "prune"', text))
    (_, done, *_) = bench.of(StageDone)
    name = {"pgd": "pgd.accuracy", "proof": "proof.verified"}[done.metrics["select"].split(".")[0]]
    assert 0 <= done.metrics[f"validation.{name}"] <= 1
    assert done.metrics["select"] == name


def test_judging_moves_nothing_that_trains(bench):
    def rows(text, store):
        bench.events.clear()
        bench.run(recipe=with_validate(bench, text), store=store, out=store)
        keys = ("loss", "validation.accuracy")
        return [[e.metrics[key] for key in keys] for e in bench.of(EpochDone)][:2]

    assert rows(f"validate = {PGD}", "with") == rows("", "without")


def test_it_is_part_of_the_key(bench):
    keys = [
        bench.keys(recipe=with_validate(bench, text))[0]
        for text in ("", f"validate = {PGD}", f"validate = {PGD}\nvalidation_images = 3")
    ]
    assert len({*keys}) == 3


def test_more_images_than_are_held_out_are_told_where_only_the_files_say_how_many(bench):
    bench.run(recipe=with_validate(bench, "validation_images = 6"))
    told = "stage 'pretrain': validation_images = 6, but 5 are held out: all are used"
    assert [n.text for n in bench.of(Note)].count(told) == 1


def test_an_early_end_is_told_now_and_when_it_is_used_again(bench):
    """At a rate of 1e-9 no epoch is better than the first."""
    recipe = with_validate(bench, "patience = 1").replace("epochs = 2", "epochs = 9", 1)
    found = []
    for _ in range(2):
        bench.events.clear()
        bench.run("pretrain.optimizer.lr=1e-9", recipe=recipe, out=f"out-{len(found)}")
        texts = [n.text for n in bench.of(Note) if "ends after epoch" in n.text]
        found.append((texts, [e.epoch for e in bench.of(EpochDone) if e.stage == "pretrain"]))
    assert found[0] == found[1]
    (text,), epochs = found[0]
    assert bench.of(StageDone)[0].metrics["ended"] == text.partition(": ")[2]
    assert epochs == [1, 2]
    assert text == (
        "stage 'pretrain' ends after epoch 2 of 9 with the weights of epoch 2: "
        "validation.accuracy has not risen for 1 epoch"
    )
