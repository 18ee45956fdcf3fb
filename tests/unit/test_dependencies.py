"""The code's imports match the dependencies that pyproject.toml declares, and none is unused."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Imported only for features that a user requests.
EXTRAS = ("bnb", "gguf", "ray", "lm-eval", "real")
# Used without an import of ours: transformers loads models with accelerate, and 4-bit ones with bitsandbytes.
BY_OTHERS = {"accelerate", "bitsandbytes"}


def imported(file: Path) -> Iterator[str]:
    """Yield the top-level name of every absolute import of a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def named(requirements: list[str]) -> set[str]:
    found = (re.match(r"[\w.-]+", requirement) for requirement in requirements)
    return {match[0].lower().replace("_", "-") for match in found if match}


def test_declared_dependencies_are_the_imported_ones() -> None:
    modules = {name for file in (ROOT / "job").rglob("*.py") for name in imported(file)}
    modules -= {*sys.stdlib_module_names, "job", "__future__"}
    owners = importlib.metadata.packages_distributions()
    unknown = {module for module in modules if module not in owners}
    optional = named([one for extra in EXTRAS for one in PROJECT["optional-dependencies"][extra]])
    assert unknown <= {name.replace("-", "_") for name in optional}
    used = {owner.lower().replace("_", "-") for module in modules - unknown for owner in owners[module]}
    declared = named(PROJECT["dependencies"])
    assert used - optional <= declared
    assert declared - BY_OTHERS <= used
