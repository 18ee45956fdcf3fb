"""The shape of the code: sizes, names, packages and their declarations."""

from __future__ import annotations

import ast
import copy
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests import code_map

ROOT = Path(__file__).parents[2]
JOB = ROOT / "job"
FILES = sorted(JOB.rglob("*.py"))
FILE_LINES, CLASS_LINES, FUNCTION_LINES, LONGEST_FUNCTION = 400, 250, 50, 85
# A function above the limit gives its reason in a comment above it that starts with this.
REASON = "# Long: "
MODULES_AT_THE_TOP = 8
# Functions with smaller bodies, in nodes of their syntax tree, may be equal.
TWIN_NODES = 12

Function = ast.FunctionDef | ast.AsyncFunctionDef


def definitions(code: str, kind: type[ast.ClassDef] | type[Function]) -> Iterator[tuple[str, int, bool]]:
    """Yield the name of every class or function, its lines with decorators, and whether it gives a reason."""
    lines = code.splitlines()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, kind):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert node.end_lineno is not None
            reason = lines[first - 2].strip().startswith(REASON) if first > 1 else False
            yield node.name, node.end_lineno - node.lineno + 1, reason


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(JOB).as_posix())
def test_nothing_is_larger_than_one_can_read_at_once(file: Path) -> None:
    code = file.read_text()
    assert len(code.splitlines()) <= FILE_LINES
    assert [name for name, size, _ in definitions(code, ast.ClassDef) if size > CLASS_LINES] == []
    functions = list(definitions(code, Function))
    assert [name for name, size, reason in functions if size > (LONGEST_FUNCTION if reason else FUNCTION_LINES)] == []


def test_sizes_are_seen() -> None:
    code = "# Long: a table\n@decorated\ndef one():\n    a\n    b\n\nclass Two:\n    async def three(self): ...\n"
    assert list(definitions(code, Function)) == [("one", 3, True), ("three", 1, False)]
    assert list(definitions(code, ast.ClassDef)) == [("Two", 2, False)]


def test_no_two_classes_have_one_name() -> None:
    names = Counter(name for file in FILES for name, *_ in definitions(file.read_text(), ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


class Numbered(ast.NodeTransformer):
    """Replaces a function's own names by numbers in the order of their use."""

    def __init__(self, function: Function) -> None:
        self._own = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
        self._own |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self._numbers: dict[str, str] = {}

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self._numbers.setdefault(node.id, str(len(self._numbers))) if node.id in self._own else node.id)


def body_of(function: Function) -> str:
    """Return a function's body without docstring and its own names, "" if it is small."""
    found = copy.deepcopy(function)
    body = found.body[1:] if ast.get_docstring(found) else found.body
    if sum(1 for statement in body for _ in ast.walk(statement)) < TWIN_NODES:
        return ""
    numbered = Numbered(function)
    return "\n".join(ast.dump(numbered.visit(statement)) for statement in body)


def twins(codes: Mapping[str, str]) -> list[list[str]]:
    """Return the functions that have one body, whatever they and their variables are called, by file."""
    found = defaultdict(list)
    for file, code in codes.items():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, Function) and (body := body_of(node)):
                found[body].append(f"{file}: {node.name}")
    return [names for names in found.values() if len(names) > 1]


def test_no_function_is_written_twice() -> None:
    files = [*FILES, *sorted((ROOT / "benchmarks").rglob("*.py"))]
    assert twins({file.relative_to(ROOT).as_posix(): file.read_text() for file in files}) == []


def test_twins_are_seen_under_other_names() -> None:
    one = 'def plain(name):\n    """Say so."""\n    text = name.lower()\n    return re.sub("[^a-z]", "", text)\n'
    two = 'def bare(label):\n    low = label.lower()\n    return re.sub("[^a-z]", "", low)\n'
    other = two.replace("a-z", "0-9")
    assert twins({"a": one, "b": two, "c": other}) == [["a: plain", "b: bare"]]


def test_the_contract_names_every_package() -> None:
    packages = {path.name for path in JOB.iterdir() if path.is_dir() and list(path.rglob("*.py"))}
    modules = {path.stem for path in JOB.glob("*.py")} - {"__init__"}
    assert sorted(code_map.packages()) == sorted(packages | modules)
    assert len(list(JOB.glob("*.py"))) <= MODULES_AT_THE_TOP


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(JOB).as_posix())
def test_packages_and_modules_say_what_they_are(file: Path) -> None:
    said = ast.get_docstring(ast.parse(file.read_text()))
    assert said
    assert "TODO" not in said
