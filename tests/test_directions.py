"""The core's folders import only those that docs/architecture.md lets them, in chains that end."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE = ROOT / "prunekit"
LOW = {"contexts", "contracts", "errors", "evaluation", "judging", "reading", "report", "steps"}
TABLE = re.findall(r"^\| `(\w+)` \|(.*)\|$", (ROOT / "docs/architecture.md").read_text(), re.M)
ALLOWED = {folder: set(re.findall(r"`(\w+)`", may)) | LOW for folder, may in TABLE}
ALLOWED |= dict.fromkeys(LOW, LOW) | {"api": set(ALLOWED) | LOW, "testing": set(ALLOWED) | LOW}
ALLOWED["__init__"] = set(ALLOWED) - {"cli"}


def unit(file: Path) -> str:
    """The folder that a file counts as, or the file where it stands at the root."""
    return file.relative_to(CORE).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Units of the core that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "prunekit":
            found |= {
                a.name if (CORE / f"{a.name}.py").exists() else "__init__" for a in node.names
            }
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            found |= {n.split(".")[1] for n in names if n and n.startswith("prunekit.")}
    return found - {unit(file)}


def test_imports_go_the_way_of_the_table():
    assert {f.name for f in CORE.iterdir() if (f / "__init__.py").exists()} <= ALLOWED.keys()
    for file in CORE.rglob("*.py"):
        if unit(file) != "__main__":
            # The version is all that the core takes from its top.
            wrong = imports(file) - ALLOWED[unit(file)] - {"__init__"}
            assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_what_is_written_does_not_know_what_it_resolves_to():
    for file in (CORE / "recipe/toml").glob("*.py"):
        above = re.findall(r"prunekit\.recipe(?!\.toml).*", file.read_text())
        assert not above, f"{file.relative_to(ROOT)} imports {above}"


def test_no_chain_of_folders_is_longer_than_ten():
    below: dict[str, set[str]] = {}
    for file in CORE.rglob("*.py"):
        below.setdefault(unit(file), set()).update(imports(file) - {"__init__"})

    @cache
    def depth(name: str) -> int:
        return 1 + max((depth(other) for other in below[name]), default=0)

    assert max(map(depth, below)) <= 10


def test_a_folder_starts_with_one_sentence_and_imports_nothing():
    for file in CORE.glob("*/**/__init__.py"):
        (sentence,) = ast.parse(file.read_text()).body
        assert isinstance(sentence, ast.Expr), file


def test_only_the_command_line_prints():
    for file in CORE.rglob("*.py"):
        if unit(file) not in ("cli", "__main__"):
            tree = ast.parse(file.read_text())
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            assert not {"print", "click"} & names, file
