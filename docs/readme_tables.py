"""Write the generated parts of README.md and docs: `uv run python docs/readme_tables.py`.

Tables come from the registry and the dataclasses, examples from the templates of `prunekit new`; a
test fails where a file is not current.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from prunekit import contexts
from prunekit.catalog.component import Component, NoOptions
from prunekit.catalog.kinds import KINDS
from prunekit.catalog.registry import load_registry
from prunekit.cli.components import describe_options
from prunekit.cli.new import read_template
from prunekit.recipe.toml import sections
from prunekit.recipe.values import write_value

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def write_components() -> str:
    """The registry as a table, one line a kind and name."""
    entries = load_registry().entries
    lines = ["| kind | name | what it is |", "|---|---|---|"]
    lines += [f"| {e.kind} | `{e.component.name}` | {e.component.summary} |" for e in entries]
    return "\n".join(lines)


def write_options(options: type) -> str:
    """An options dataclass as a table, one line a key."""
    hidden = sections.SELECTION_KEYS if issubclass(options, sections.PretrainOptions) else ()
    lines = ["| key | what it takes | default | what it is |", "|---|---|---|---|"]
    for option in describe_options(options):
        if option["name"] in hidden:  # they are those of a prune stage
            continue
        taken = ", ".join(filter(None, (option["type"], option["limits"], option["unit"])))
        default = "required" if option["required"] else "none"
        if option["default"] is not None:
            default = f"`{write_value(option['default'])}`"
        cells = (f"`{option['name']}`", taken, default, option["help"])
        lines.append(f"| {' | '.join(cell.replace('|', 'or') for cell in cells)} |")
    return "\n".join(lines)


def write_fields(classes: Mapping[str, type]) -> str:
    """The fields of dataclasses, named by what they are for, with the text below each field."""
    lines = ["| for | field | what it says |", "|---|---|---|"]
    for name, cls in classes.items():
        (tree,) = ast.parse(inspect.getsource(cls)).body
        assert isinstance(tree, ast.ClassDef)
        fields = [field for field in tree.body if isinstance(field, ast.AnnAssign)]
        texts = dict(zip(tree.body, tree.body[1:], strict=False))
        for field in fields:
            text = texts[field]
            if "ClassVar" in ast.unparse(field.annotation):
                continue
            assert isinstance(text, ast.Expr)
            assert isinstance(text.value, ast.Constant)
            words = " ".join(str(text.value.value).split()).replace("|", "\\|")
            lines.append(f"| {name} | `{ast.unparse(field.target)}` | {words} |")
    return "\n".join(lines)


def write_example(kind: str) -> str:
    """The files of a hook's example, a block each."""
    blocks = (f"```python\n# {file}\n{code}```" for file, code in read_template(kind).items())
    return "\n\n".join(blocks)


OPTIONS = {
    "compute": sections.ComputeOptions,
    "threat": sections.ThreatOptions,
    "dataset": sections.DataOptions,
    "architecture": sections.ArchitectureOptions,
    **sections.STAGE_OPTIONS,
    **{
        f"{e.kind} {e.component.name}": e.component.options
        for e in load_registry().entries
        if e.kind in ("optimizer", "schedule", "sparsity_schedule", "rewirer", "wrapper", "backend")
        and e.component.options is not NoOptions
    },
}

CONTEXTS = {
    "all kinds": contexts.Context,
    "dataset": contexts.DatasetContext,
    "architecture": contexts.ArchitectureContext,
    "objective, pruner, evaluator, rewirer, wrapper": contexts.NetworkContext,
    "pruner": contexts.PrunerContext,
    "evaluator": contexts.EvaluatorContext,
    "reporter": contexts.ReporterContext,
    "backend": contexts.BackendContext,
}

GENERATED: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"components": write_components},
    ROOT / "docs/plugins.md": {
        "fields": lambda: write_fields({"all kinds": Component, **KINDS}),
        "contexts": lambda: write_fields(CONTEXTS),
        **{kind: lambda kind=kind: write_example(kind) for kind in KINDS},  # type: ignore[misc]
    },
    ROOT / "docs/recipes.md": {
        name: lambda options=options: write_options(options)  # type: ignore[misc]
        for name, options in OPTIONS.items()
    },
}
"""File -> mark -> what stands there."""


def put(text: str, mark: str, content: str) -> str:
    """Replace what stands between <!-- mark --> and <!-- /mark -->."""
    between = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    if not between.search(text):
        raise SystemExit(f"there is no <!-- {mark} -->")
    return between.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def renew(path: Path) -> str:
    """The text of a file with its generated parts made anew."""
    text = path.read_text(encoding="utf-8")
    for mark, write in GENERATED[path].items():
        text = put(text, mark, write())
    return text


if __name__ == "__main__":
    for path in GENERATED:
        path.write_text(renew(path), encoding="utf-8")
