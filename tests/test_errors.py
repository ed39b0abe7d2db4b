"""How mistakes are told."""

from prunekit.errors import Place, Problem, RecipeError


def test_problems_are_sorted_by_file_and_line():
    problems = [Problem(Place("r.toml", n), f"m{n}") for n in (10, 9, 2, 10)]
    lines = str(RecipeError(problems)).splitlines()
    assert lines == [
        "r.toml:2: m2",
        "r.toml:9: m9",
        "r.toml:10: m10",
    ]
