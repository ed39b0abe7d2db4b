"""Evaluators on the same images: their records, and contradictions between them told."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from prunekit_adversarial import PgdOptions

from prunekit.catalog.component import Use, option
from prunekit.catalog.kinds import EvaluatorComponent
from prunekit.catalog.registry import Entry, Registry
from prunekit.contracts import Objective, Result, Threat
from prunekit.engine.evaluating import cross_examine, judge_batches
from prunekit.errors import Interrupted, RunError
from prunekit.recipe.plan import make_plan
from prunekit.recipe.toml.document import load_recipe
from prunekit.report import Note, Progress, StageDone
from prunekit.store.records import read_run

EPS = Threat("linf", 0.1)


INDEX = np.array([0, 10, 20, 30])


def attack(name, correct, threat=EPS, beats=()):
    component = EvaluatorComponent(name=name, summary="", build="a:b", judges="attack", beats=beats)
    return Use(component, None, name=name, threat=threat), f"{name}.correct", correct


def proof(name, verified, threat=EPS):
    component = EvaluatorComponent(name=name, summary="", build="a:b", judges="proof")
    return Use(component, None, name=name, threat=threat), f"{name}.verified", verified


def examine(*judged):
    records = {"index": INDEX} | {key: np.array(values) for _, key, values in judged}
    return list(cross_examine([use for use, _, _ in judged], records))


def test_a_stronger_attack_that_leaves_more_standing_is_told():
    strong = attack("auto", [True, True, True, False], beats=("pgd",))
    (text,) = examine(attack("pgd", [True, True, False, False]), strong)
    assert text.startswith("auto leaves 75.0% of the images correct, pgd at the same radius only")


@pytest.mark.parametrize(
    "weak",
    [
        attack("pgd", [True, True, True, False]),  # the same number
        attack("pgd", [True, False, False, False], Threat("linf", 0.2)),  # another radius
        attack("pgd", [True, False, False, False], Threat("l2", 0.1)),
        attack("other", [True, False, False, False]),  # nothing was said of it
    ],
)
def test_attacks_that_do_not_compare_are_left_alone(weak):
    assert examine(attack("auto", [True, True, True, False], beats=("pgd",)), weak) == []


def test_a_fifth_of_a_percent_is_tolerated():
    weak, strong = np.ones(1000, bool), np.ones(1000, bool)
    weak[:2] = False
    uses = [attack("auto", strong, beats=("pgd",))[0], attack("pgd", weak)[0]]
    records = {"index": np.arange(1000), "auto.correct": strong, "pgd.correct": weak}
    assert list(cross_examine(uses, records)) == []
    weak[2] = False
    assert len(list(cross_examine(uses, records))) == 1


def test_a_proof_that_an_attack_breaks_is_unsound():
    (text,) = examine(
        proof("verified", [True, True, False, False]), attack("pgd", [True, False, False, True])
    )
    assert text.startswith("UNSOUND: pgd breaks 1 images that verified certified")
    assert "test images 10)" in text


def test_a_proof_at_a_smaller_radius_may_be_broken_at_a_larger():
    assert examine(proof("v", [True] * 4, Threat("linf", 0.05)), attack("pgd", [False] * 4)) == []


def test_components_without_a_threat_say_nothing_of_it():
    assert examine(proof("v", [True] * 4, None), attack("a", [False] * 4, None)) == []


def test_an_evaluator_can_be_stopped_within_a_batch_and_finds_what_it_left(bench, parts):
    engine = bench.engine()
    stages, found = [None], []

    def judge(context):
        if stages[-1] != "evaluate":  # the rehearsal
            return
        note = context.scratch / "note"
        found.append(note.exists())
        note.write_text("so far")
        engine.stop.requested = len(found) == 1
        context.pause()

    parts.act["judge"] = judge
    engine.report = lambda event: stages.append(getattr(event, "stage", None))
    recipe = bench.recipe.replace('["clean"]', '["told"]')
    with pytest.raises(Interrupted):
        engine.run(bench.plan(recipe=recipe), bench.folder / "out")
    engine.stop.requested = False
    engine.run(bench.plan(recipe=recipe), bench.folder / "out")
    assert found == [False, True]


def test_records_are_those_of_the_images(bench):
    (folder,) = bench.run(recipe=bench.recipe.replace('["clean"]', '["clean"]\nimages = 7'))
    with np.load(folder.path / "records.npz", allow_pickle=False) as records:
        index = records["evaluate/index"]
        assert index.tolist() == [i * 10 // 7 for i in range(7)]
        assert records["evaluate/label"].tolist() == ((20 + index) % 3).tolist()
        assert len(records["evaluate/clean.correct"]) == 7
        mean = records["evaluate/clean.correct"].mean()
    assert folder.metrics["evaluate"]["clean.accuracy"] == pytest.approx(mean)


def test_more_images_than_there_are_is_told(bench):
    (folder,) = bench.run(recipe=bench.recipe.replace('["clean"]', '["clean"]\nimages = 99999'))
    assert folder.metrics["evaluate"]["clean.accuracy"].n == 10
    notes = [e.text for e in bench.of(Note)]
    assert "images = 99999, but there are 10: all are judged" in notes


def test_unbalanced_classes_get_a_balanced_accuracy(bench):
    """The test images have classes 2 0 1 2 0 1 2 0 1 2; now they have 0 four times as often."""
    with np.load(bench.folder / "images.npz") as kept:
        arrays = dict(kept)
    arrays["y_test"] = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 2])
    arrays["y_train"] = np.array([0] * 12 + [1] * 4 + [2] * 4)
    np.savez(bench.folder / "images.npz", **arrays)
    (folder,) = bench.run()
    found = folder.metrics["evaluate"]
    with np.load(folder.path / "records.npz", allow_pickle=False) as records:
        correct = records["evaluate/clean.correct"]
    balanced = (correct[:8].mean() + correct[8] + correct[9]) / 3
    assert found["clean.balanced_accuracy"] == pytest.approx(balanced)
    assert found["clean.balanced_accuracy"].low <= balanced
    assert "validation.balanced_accuracy" in folder.metrics["pretrain"]


def test_contradicting_verdicts_are_told(bench, parts):
    """An attack that breaks what a proof says is verified: a warning that stays with the result."""
    registry = bench.registry()

    def add(judges):
        return Entry(
            EvaluatorComponent(name=judges, summary=judges, build=f"told_parts:build_{judges}",
                      options=PgdOptions, judges=judges),
            "told", "told-dist 1.2",
        )  # fmt: skip

    for judges, record, verdict in (("attack", "correct", False), ("proof", "verified", True)):
        setattr(parts, f"build_{judges}", give_verdict(record, verdict))
    path = bench.folder / "r.toml"
    path.write_text(bench.recipe.replace('["clean"]', '["attack", "proof"]'))
    plan = make_plan(load_recipe(path), Registry((*registry.entries, add("attack"), add("proof"))))
    (folder,) = bench.engine().run(plan, bench.folder / "out")
    assert folder.status == "done", folder.error
    (warning,) = [e.text for e in bench.of(Note) if e.warning]
    assert warning.startswith("UNSOUND: attack breaks 10 images that proof certified")


@pytest.mark.parametrize("spoilt", [3, 10])
def test_the_core_counts_what_is_no_number_for_any_evaluator(spoilt, bench, parts):
    """One that takes NaN as it comes: told with the number, an error if there is nothing else."""
    registry = bench.registry()

    def build(options, context):
        def forward(module, args, logits):
            first = args[0].flatten(1)[:, 0]
            return logits.masked_fill((first < limit)[:, None], torch.nan)

        context.model.register_forward_hook(forward)

        def evaluate(model, batches):
            right = np.concatenate([(model(x).argmax(1) >= 0).numpy() for x, _ in batches])
            return Result({"accuracy": right.mean()}, {"correct": right})

        return evaluate

    with np.load(bench.folder / "images.npz") as kept:
        arrays = dict(kept)
    arrays["x_test"].reshape(10, -1)[:, 0] = np.arange(10)
    np.savez(bench.folder / "images.npz", **arrays)
    limit = (spoilt - 0.5) / 255
    parts.build_attack = build
    component = EvaluatorComponent(name="theirs", summary="", build="told_parts:build_attack")
    path = bench.folder / "r.toml"
    path.write_text(bench.recipe.replace('["clean"]', '["theirs"]'))
    entry = Entry(component, "told", "told-dist 1.2")
    plan = make_plan(load_recipe(path), Registry((*registry.entries, entry)))
    (folder,) = bench.engine().run(plan, bench.folder / "out")
    if spoilt == 10:
        assert "NaN or infinity for everything that theirs showed it" in folder.error
        return
    (note,) = json.loads((folder.path / "run.json").read_text())["stages"][-1]["notes"]
    assert note == (
        "theirs: the network gives NaN or infinity for 3 of 10 images, or near them; such outputs "
        "count as wrong, but theirs counts 3 of these images as correct "
        "(to leave classes out, write -1e4 as their logits, not -inf)"
    )


def give_verdict(record, verdict):
    def build(options, context):
        def evaluate(model, batches):
            n = sum(len(y) for _, y in batches)
            return Result({"value": 0.5}, {record: np.full(n, verdict)})

        return evaluate

    return build


def test_a_metric_that_is_no_number_names_the_evaluator(bench, parts):
    parts.act["value"] = float("nan")
    (folder,) = bench.run(recipe=bench.recipe.replace('"clean"', '"told"'))
    assert folder.error == (
        "rehearsal, one batch a stage: "
        "evaluator 'told' of plugin told (told-dist 1.2) gave value = nan"
    )


TWO = '["clean", { use = "pgd", steps = 2, restarts = 1 }]'
LISTS = {
    "the same": TWO,
    "in another order": '[{ use = "pgd", steps = 2, restarts = 1 }, "clean"]',
    "renamed": '[{ use = "clean", name = "c" }, { use="pgd", name="p", steps = 2, restarts = 1 }]',
    "one taken away": '["clean"]',
}


@pytest.mark.parametrize("change", LISTS)
def test_what_is_there_is_not_judged_again(change, bench):
    (first,) = bench.run(recipe=bench.recipe.replace('["clean"]', TWO))
    bench.events.clear()
    recipe = bench.recipe.replace('["clean"]', LISTS[change])
    (again,) = bench.run(recipe=recipe, out="again")
    (done,) = [e for e in bench.of(StageDone) if e.kind == "evaluate"]
    assert done.reused
    values = {v for k, v in again.metrics["evaluate"].items() if k.endswith(".accuracy")}
    assert values <= {v for k, v in first.metrics["evaluate"].items() if k.endswith(".accuracy")}


def test_one_more_is_judged_alone_with_the_bits_it_has_alone(bench):
    both = bench.recipe.replace('["clean"]', TWO)
    (whole,) = bench.run(recipe=both, store="other", out="whole")
    bench.run()
    bench.events.clear()
    (added,) = bench.run(recipe=both, out="added")
    assert {e.label for e in bench.of(Progress) if e.stage == "evaluate"} == {"pgd"}
    assert added.metrics["evaluate"] == whole.metrics["evaluate"]
    for folder in (added, whole):
        assert (folder.path / "records.npz").read_bytes() == (
            whole.path / "records.npz"
        ).read_bytes()


@pytest.mark.parametrize(
    "setting", ["seed=1", "evaluate.images=5", "dataset.batch_size=4", "threat.eps=0.2"]
)
def test_what_decides_a_result_makes_another(setting, bench):
    recipe = bench.recipe.replace('["clean"]', '[{ use = "pgd", steps = 2, restarts = 1 }]')
    assert bench.keys(recipe=recipe)[-1] != bench.keys(setting, recipe=recipe)[-1]


def test_the_ones_that_are_done_survive_one_that_fails(bench, parts, fail):
    recipe = bench.recipe.replace('["clean"]', '["clean", "told"]')
    bench.events.clear()
    judged = []

    def judge(context):
        judged.append(1)
        if len(judged) == 2:  # the first was the rehearsal
            raise RunError("on purpose")

    parts.act["judge"] = judge
    (folder,) = bench.run(recipe=recipe)
    assert folder.status == "failed"
    bench.events.clear()
    (folder,) = bench.run(recipe=recipe)
    assert folder.status == "done"
    assert {e.label for e in bench.of(Progress) if e.stage == "evaluate"} == {"told"}


def test_all_parts_are_among_the_keys_that_clean_keeps(bench):
    (folder,) = bench.run(recipe=bench.recipe.replace('["clean"]', TWO))
    keys = read_run(folder.path).keys
    stored = {path.name for path in (bench.folder / "store").glob("v*/*")}
    assert stored == set(keys)
    assert len(keys) == 5


def test_batches_that_are_kept_are_read_and_not_judged(tmp_path):
    batches = [(torch.zeros(2, 1), torch.tensor([0, 1])), (torch.zeros(1, 1), torch.tensor([2]))]
    seen = []

    def judge(x, y):
        seen.append(len(y))
        if len(seen) == 2:
            raise Interrupted
        return {"a": y.numpy() * 10, "b": np.array(["x" * len(y)] * len(y))}

    with pytest.raises(Interrupted):
        judge_batches(judge, batches, tmp_path)
    found = judge_batches(judge, batches, tmp_path)
    assert seen == [2, 1, 1]
    assert found["a"].tolist() == [0, 10, 20]
    assert found["b"].tolist() == ["xx", "xx", "x"]
    assert judge_batches(judge, batches, None)["a"].tolist() == [0, 10, 20]


def test_a_judgement_that_was_stored_says_as_much(bench):
    (first,) = bench.run()
    (again,) = bench.run(out="again")
    for folder in (first, again):
        (found,) = [s for s in read_run(folder.path).stages if s.kind == "evaluate"]
        assert found.metrics["sparsity"].unit == "sparsity"
        assert found.metrics["clean.accuracy"].n == 10
    assert again.metrics["evaluate"] == first.metrics["evaluate"]


def test_a_key_holds_the_threats_of_components_within_an_evaluator(bench):
    @dataclasses.dataclass(frozen=True)
    class Nested:
        inner: Use[Objective] = option("trades", help="an objective inside")

    component = EvaluatorComponent(
        name="nested", summary="Nested", build="told_parts:build_evaluator", options=Nested
    )
    registry = bench.registry()
    registry = Registry((*registry.entries, Entry(component, "told", "told-dist 1.2")))
    path = bench.folder / "r.toml"
    path.write_text(bench.recipe.replace('["clean"]', '["nested"]'))
    keys = []
    for eps in (0.01, 0.3):
        (run,) = make_plan(load_recipe(path, [f"threat.eps={eps}"]), registry).runs
        keys.append(bench.make_keys(run)[-1])
    assert keys[0] != keys[1]


def test_a_stored_judgement_has_the_versions_of_its_own_evaluator_alone(bench):
    attack = '{ use = "autoattack", attacks = ["square"], queries = 2 }'
    bench.run(recipe=bench.recipe.replace('"clean"', f'"clean", {attack}'), out="both")
    (again,) = bench.run(out="again")
    stage = json.loads((again.path / "run.json").read_text())["stages"][-1]
    assert (stage["reused"], stage["versions"]) == (True, {})
