"""What a stage hands its components, and what it leaves alone."""

import pytest
import torch

from prunekit.report import Note, StageDone, StageStarted
from prunekit.training.masking import LearnedScores


@pytest.mark.parametrize(
    "between", ["", '[[stage]]\nkind = "evaluate"\nname = "x"\nwith = ["clean"]\n']
)
def test_pruners_get_the_network_as_a_fresh_one_is(bench, parts, between):
    """Whatever stage was before: in train mode, every weight with gradients."""
    looks = []
    parts.act["look"] = lambda context: looks.append(
        {
            "training": all(m.training for m in context.model.modules()),
            "gradients": all(p.requires_grad for p in context.model.parameters()),
        }
    )
    before = '[[stage]]\nkind = "prune"'
    recipe = bench.recipe.replace(before, between + before)
    (folder,) = bench.run(recipe=recipe.replace('"lwm"', '"told"'))
    assert folder.error == ""
    assert len(looks) == 2  # the rehearsal's too
    for model in looks:
        assert model == {"training": True, "gradients": True}


def test_a_pruner_sees_batches_and_numbers_that_the_seed_decides(bench, parts):
    looks = []

    def look(context):
        x, y = next(context.batches())
        loss = context.objective(x, y, None).value
        numbers = torch.rand(2, generator=context.generator).tolist()
        looks.append((y.tolist(), loss.item(), numbers, context.sparsity, context.stage))

    parts.act["look"] = look
    recipe = bench.recipe.replace('"lwm"', '"told"')
    for seed, store in ((0, "a"), (0, "b"), (1, "c")):
        bench.run(f"seed={seed}", recipe=recipe, out=store, store=store)
    first, again, other = looks[1::2]  # rehearsals between them
    assert first == again
    assert first[3:] == (0.5, "prune")
    assert all(a != b for a, b in zip(first[:3], other[:3], strict=True))


def test_every_call_of_batches_is_another_epoch(bench, parts):
    """All images each time, in orders that the seed decides."""
    looks = []

    def look(context):
        looks.append([torch.cat([x for x, _ in context.batches()]) for _ in range(2)])

    parts.act["look"] = look
    recipe = bench.recipe.replace('"lwm"', '"told"')
    for store in ("a", "b"):
        bench.run(recipe=recipe, out=store, store=store)
    (one, two), again = looks[1::2]  # rehearsals between them
    assert not torch.equal(one, two)
    assert sorted(x.double().sum().item() for x in one) == sorted(
        x.double().sum().item() for x in two
    )
    assert torch.equal(torch.stack([one, two]), torch.stack(again))


def test_training_never_touches_the_test_images_nor_judging_others(bench, parts):
    recipe = (
        bench.scored.replace('use = "npz"', 'use = "told"').replace('file = "images.npz"', "")
        .replace('with = ["clean"]', 'with = ["clean", "pgd"]')
    )  # fmt: skip
    touched = {}
    stage = [None]

    def report(event):
        if isinstance(event, StageStarted):
            stage[0] = event.kind
        if isinstance(event, StageDone):
            stage[0] = None

    for name in ("train", "test"):
        parts.act[name] = lambda name=name: touched.setdefault(stage[0], set()).add(name)
    (folder,) = bench.run(recipe=recipe, report=report)
    assert folder.error == ""
    assert {kind: parts for kind, parts in touched.items() if kind} == {
        "pretrain": {"train"}, "prune": {"train"}, "finetune": {"train"}, "evaluate": {"test"},
    }  # fmt: skip


def test_a_term_that_is_no_number_does_not_lose_the_stage(bench, parts):
    (folder,) = bench.run(recipe=bench.recipe.replace('"benign"', '"told"'))
    assert folder.status == "done"
    assert "odd" not in folder.metrics["pretrain"]
    assert "loss" in folder.metrics["pretrain"]


def test_state_that_comes_late_or_stays_is_told_before_anything_is_lost(bench, monkeypatch):
    """A checkpoint of it could not be loaded, nor the network that it leaves behind."""
    recipe = bench.recipe.replace('"lwm"', '"score"\nobjective = "benign"\nepochs = 1')

    def late(self):
        self.model.register_buffer("late", torch.zeros(1))
        return self.scores()

    with monkeypatch.context() as patch:
        patch.setattr(LearnedScores, "moving", late)
        (folder,) = bench.run(recipe=recipe)
    assert "rehearsal" in folder.error
    assert "stage 'prune': late came or went while training" in folder.error

    def stay(self, original=LearnedScores.detach):
        original(self)
        self.model.register_buffer("left", torch.zeros(1))

    monkeypatch.setattr(LearnedScores, "detach", stay)
    (folder,) = bench.run(recipe=recipe)
    assert "pruner 'score' leaves another network behind: left came or went" in folder.error


@pytest.mark.parametrize(("sparsity", "told"), [("0.500001", True), ("0.6", False)])
def test_a_prune_stage_that_removes_nothing_is_told(bench, sparsity, told):
    more = f'[[stage]]\nkind = "prune"\nname = "more"\npruner = "lwm"\nsparsity = {sparsity}\n'
    first, rest = bench.recipe.split('[[stage]]\nkind = "finetune"')
    bench.run(recipe=f'{first}{more}[[stage]]\nkind = "finetune"{rest}')
    notes = [n.text for n in bench.of(Note) if "removes nothing" in n.text]
    assert [n.startswith("stage 'more' removes nothing") for n in notes] == [True] * told
