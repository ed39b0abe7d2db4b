"""Write the generated parts of README.md: `uv run python docs/readme_tables.py`.

The table of components comes from the registry; a test fails where it is not current.
"""

from __future__ import annotations

import re
from pathlib import Path

from prunekit.registry import load_registry

README = Path(__file__).parent.parent / "README.md"


def write_components() -> str:
    """The registry as a table, one line a kind and name."""
    entries = load_registry().entries
    lines = ["| kind | name | what it is |", "|---|---|---|"]
    lines += [f"| {e.kind} | `{e.component.name}` | {e.component.summary} |" for e in entries]
    return "\n".join(lines)


def put(text: str, mark: str, content: str) -> str:
    """Replace what stands between <!-- mark --> and <!-- /mark -->."""
    between = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    if not between.search(text):
        raise SystemExit(f"README.md has no <!-- {mark} -->")
    return between.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


if __name__ == "__main__":
    README.write_text(put(README.read_text(), "components", write_components()))
