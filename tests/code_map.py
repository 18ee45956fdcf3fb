"""The map of the code: every module in the order of the import contract, with what it says of itself.

`python -m tests.code_map --write docs/code-map.md` writes it.
"""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

from tests.generated import write_or_print

ROOT = Path(__file__).parents[1]
_INTRODUCTION = """# Map of the code

One way leads through a job: settings → preflight → prompts → model → residuals → directions → search → export → upload
→ report; `job/pipeline.py` tells it from top to bottom. Below are all modules, in the order of the import contract in
`pyproject.toml`: one may use those of lower rows, none of its own row or above. What stands in no row is used by
several and uses little. Written by `python -m tests.code_map --write docs/code-map.md`.

| Modules | What they are |
|---|---|
"""


def page() -> str:
    """Return docs/code-map.md."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract for contract in contracts if contract["type"] == "layers")["layers"]
    rows = [[name.strip() for name in layer.split(":")] for layer in layers]
    placed = {name for row in rows for name in row}
    modules = {f"job.{path.stem}" for path in (ROOT / "job").glob("*.py")}
    others = sorted(modules - placed - {"job.__init__"})
    lines = [f"| `{'`, `'.join(row)}` | {'; '.join(map(_about, row))} |" for row in rows]
    lines += [f"| `{name}` (in no row) | {_about(name)} |" for name in others]
    return _INTRODUCTION + "\n".join(lines) + "\n"


def _about(name: str) -> str:
    path = ROOT / name.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    said = ast.get_docstring(ast.parse(file.read_text())) or ""
    return said.partition("\n")[0].rstrip(".").replace("|", "\\|")


if __name__ == "__main__":
    write_or_print(page())
