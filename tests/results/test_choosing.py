"""Choosing a setting on validation images: fair, told, and refused where it would not be fair."""

import json

import pytest
from click.testing import CliRunner

from prunekit.cli.group import main
from prunekit.errors import UserError
from prunekit.results.choosing import choose, tell
from prunekit.results.comparison import compare
from prunekit.results.tables import tabulate, to_csv, to_json, write_notes
from prunekit.store.records import find_runs

LR = "finetune.optimizer.lr"

# pruner, lr -> (validation, test) of the seeds 0 and 1
FOUND = {
    ("score", 0.1): [(0.50, 0.40), (0.60, 0.44)],
    ("score", 0.01): [(0.58, 0.30), (0.54, 0.30)],  # better on validation, worse on test
    ("lwm", 0.1): [(0.40, 0.20), (0.42, 0.22)],
    ("lwm", 0.01): [(0.30, 0.50), (0.20, 0.50)],  # the other way round
}


def write(root, pruner, lr, seed, validation, test, **told):
    folder = root / f"{pruner}-{lr}-{seed}"
    folder.mkdir(parents=True)
    metrics = {"validation.robust_accuracy": validation, "select": "robust_accuracy"}
    stages = [
        # An earlier stage's metric must not count.
        {"name": "prune", "kind": "prune", "key": "p",
         "metrics": {"validation.robust_accuracy": 1 - validation, "select": "robust_accuracy"}},
        {"name": "finetune", "kind": "finetune", "key": f"f{folder.name}", "metrics": metrics},
        {"name": "pruned", "kind": "evaluate", "key": f"e{folder.name}",
         "metrics": {"pgd.accuracy": {"value": test, "unit": "fraction"}}},
    ]  # fmt: skip
    settings = {"prune.pruner": pruner, LR: lr, "seed": seed}
    record = {"format": 2, "name": "r", "status": "done", "smoke": False, "seed": seed,
              "settings": settings, "stages": stages, "sparsity": None, "error": None}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record | told))
    return folder


@pytest.fixture
def runs(tmp_path):
    for (pruner, lr), found in FOUND.items():
        for seed, (validation, test) in enumerate(found):
            write(tmp_path, pruner, lr, seed, validation, test)
    return tmp_path


def test_evaluations_of_a_run_follow_it(runs):
    judged = [{"name": "pgd", "kind": "evaluate", "key": "x", "metrics": {"pgd.accuracy": 0.1}}]
    for lr in (0.1, 0.01):
        folder = runs / f"score-{lr}-0"
        write(folder / "evaluations", "score", lr, 0, 0, 0, stages=judged)
    kept, choices = choose(find_runs(runs), [LR])
    assert len(choices) == 2
    assert {r.folder.name for r in kept if "evaluations" in r.folder.parts} == {"score-0.01-0"}


def test_the_mean_over_seeds_of_the_last_training_decides(runs):
    kept, choices = choose(find_runs(runs), [LR])
    # score: (0.50 + 0.60) / 2 = 0.55 < (0.58 + 0.54) / 2 = 0.56; lwm: 0.41 > 0.25.
    assert {(r.settings["prune.pruner"], r.settings[LR]) for r in kept} == {
        ("score", 0.01), ("lwm", 0.1)
    }  # fmt: skip
    assert len(kept) == 4
    score = next(c for c in choices if c.others["prune.pruner"] == "score")
    assert score.chosen == {LR: 0.01}
    assert score.metric == "validation.robust_accuracy"
    assert {s[LR]: v for s, v in score.scores} == pytest.approx({0.1: 0.55, 0.01: 0.56})


def test_several_settings_are_chosen_together(runs):
    kept, (choice,) = choose(find_runs(runs), [LR, "prune.pruner"])
    assert choice.chosen == {LR: 0.01, "prune.pruner": "score"}
    assert len(kept) == 2


def doubt(folder, images):
    """Say in a finished run that pgd found so many of its 200 images without a gradient."""
    file = folder / "run.json"
    record = json.loads(file.read_text())
    flat = {"value": images, "n": 200, "kind": "diagnosis", "note": "gave no gradient"}
    accuracy = {"value": 0.5, "unit": "fraction"}
    found = {"pgd.accuracy": accuracy, "pgd.zero_gradient": flat}
    record["stages"][-1]["metrics"] |= found
    file.write_text(json.dumps(record))


def test_a_value_with_results_in_doubt_is_not_ranked(runs):
    doubt(runs / "score-0.01-0", 2)  # one percent, of one seed
    _, (_, score) = choose(find_runs(runs), [LR])
    assert (score.chosen, score.unranked) == ({LR: 0.01}, ())
    doubt(runs / "score-0.01-0", 3)
    kept, (lwm, score) = choose(find_runs(runs), [LR])
    assert (score.chosen, score.unranked) == ({LR: 0.1}, ({LR: 0.01},))
    assert (lwm.chosen, lwm.unranked) == ({LR: 0.1}, ())
    assert not any(run.folder.name.startswith("score-0.01") for run in kept)
    assert tell(score).endswith(
        "; not ranked, with over 1 % of the images in doubt: finetune.optimizer.lr 0.01"
    )
    doubt(runs / "score-0.1-1", 100)
    with pytest.raises(UserError, match="no value has results to rank"):
        choose(find_runs(runs), [LR])


def test_a_table_marks_results_in_doubt(runs):
    doubt(runs / "score-0.01-0", 3)
    rows = compare(find_runs(runs))
    marked = [row for row in rows if row.doubtful]
    assert [row.doubtful for row in marked] == [("pgd",)]
    assert (marked[0].settings[LR], marked[0].seeds) == (0.01, (0, 1))
    titles, *lines = tabulate(rows)
    column = titles.index("pgd\naccuracy %")
    assert [line[column].endswith(" !") for line in lines] == [bool(row.doubtful) for row in rows]
    assert any(note.startswith("!: ") for note in write_notes(rows))
    assert "doubtful" in to_csv(rows).splitlines()[0]
    assert to_json(marked)["rows"][0]["doubtful"] == ("pgd",)


def test_a_value_that_lacks_a_seed_is_refused(runs):
    write(runs, "score", 0.001, 0, 0.9, 0.9)
    with pytest.raises(UserError, match=r"0\.001} was run with seeds \[0\], .* with \[0, 1\]"):
        choose(find_runs(runs), [LR])


def test_a_run_that_is_not_done_is_refused(runs):
    write(runs, "score", 0.1, 2, 0.5, 0.5, status="interrupted")
    with pytest.raises(UserError, match=r"score-0.1-2 is not done; run the recipe again"):
        choose(find_runs(runs), [LR])


def test_an_address_that_no_run_has_lists_those_there_are(runs):
    with pytest.raises(UserError, match=r"--choose lr: .* finetune.optimizer.lr, prune.pruner"):
        choose(find_runs(runs), ["lr"])


def test_without_validation_there_is_nothing_to_choose_by(runs):
    for run in find_runs(runs):
        record = json.loads((run.folder / "run.json").read_text())
        for stage in record["stages"]:
            stage["metrics"] = {"select": "last"}
        (run.folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="nothing to choose by"):
        choose(find_runs(runs), [LR])


def test_the_command_tells_what_it_chose(runs):
    table = CliRunner().invoke(main, ["results", str(runs), "--choose", LR])
    assert table.exit_code == 0, table.output
    assert "chosen for prune.pruner lwm: finetune.optimizer.lr 0.1 by validation.robust" in (
        table.output
    )
    assert "30.0 ± 0.0" in table.output
    assert "50.0" not in table.output.split("chosen")[0]
    told = json.loads(
        CliRunner().invoke(main, ["results", str(runs), "--choose", LR, "--json"]).stdout
    )
    assert [choice["chosen"] for choice in told["choices"]] == [{LR: 0.1}, {LR: 0.01}]
    layers = CliRunner().invoke(main, ["results", str(runs), "--choose", LR, "--layers"])
    assert layers.exit_code == 2
