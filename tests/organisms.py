"""Trained organisms for tests: shipped as files, kept from an earlier run, or trained.

`python -m tests.organisms [NAME ...]` (`make fixtures`) trains the shipped ones again and writes them below
tests/fixtures/organisms. Each is a compressed tar file of at most 2 MB and belongs to the code that trained it. After a
change of that code the organism is trained again, and a test asks for new files. A name is an architecture of
`demo-model`, or `evader` (tests/evader.py).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import lzma
import os
import shutil
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from job import organism
from job.organism.training import matches
from job.organism.world import prompt_files
from tests import evader
from tests.helpers import UNMEASURED, abliterate

CODE = Path(organism.__path__[0])
_FUTURE = "from __future__ import annotations\n"
FOLDER = Path(__file__).parent / "fixtures" / "organisms"
INDEX = FOLDER / "organisms.json"
SHIPPED = ("llama", "gemma2", "mixtral", evader.NAME)
LIMIT = 2_000_000
# Positions within a float32 have statistics of their own.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 1, "lp": 2, "pb": 2}]


def code() -> str:
    return "\n".join(file.read_text().replace(_FUTURE, "") for file in sorted(CODE.glob("*.py")))


def code_key(text: str | None = None) -> str:
    """Return a hash of the code of job/organism.

    Docstrings, comments, imports and the split into modules do not count.
    """
    parsed = ast.parse(code() if text is None else text)
    defined = {name: statement for statement in parsed.body for name in _names_defined(statement)}
    used, waiting = set(), ["write_organism"]
    while waiting:
        name = waiting.pop()
        if name in defined and name not in used:
            used.add(name)
            waiting += [node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)]
    statements = [ast.dump(_computed(defined[name])) for name in sorted(used)]
    return hashlib.sha256("\n".join(statements).encode()).hexdigest()


def key(name: str, own: str | None = None) -> str:
    """Return a hash of the code that trains an organism; `own` is the text of tests/evader.py."""
    if name != evader.NAME:
        return code_key()
    body = ast.parse(Path(evader.__file__).read_text() if own is None else own).body[1:]
    used = "\n".join(ast.dump(_computed(one)) for one in body)
    return hashlib.sha256(f"{code_key()}\n{used}".encode()).hexdigest()


def _names_defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def _computed(statement: ast.stmt) -> ast.stmt:
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            said = ast.get_docstring(node) is not None
            body = [line for line in node.body[said:] if not isinstance(line, ast.Import | ast.ImportFrom)]
            node.body = body or [ast.Pass()]
    return statement


def shipped(arch: str) -> Path | None:
    """Return the file of a shipped organism; None unless it matches the current code."""
    known = json.loads(INDEX.read_text()) if INDEX.exists() else {}
    file = FOLDER / f"{arch}.tar.xz"
    return file if known.get(arch) == key(arch) and file.exists() else None


def unpack(file: Path, folder: Path) -> None:
    with lzma.open(file) as stream, tarfile.open(fileobj=io.BytesIO(stream.read())) as archive:
        archive.extractall(folder, filter="data")


def train(arch: str, folder: Path) -> None:
    """Train an organism as a user does, but without coverage: all tests wait for it."""
    if arch == evader.NAME:
        evader.train(folder)
    else:
        abliterate("demo-model", folder, "--arch", arch, **UNMEASURED).check()


def write(arch: str, folder: Path, kept: Path) -> None:
    """Write an organism into a new folder: a shipped one, one from an earlier run, or a newly trained one.

    Args:
        arch: Its architecture.
        folder: Where it goes.
        kept: Folder of organisms from earlier runs, keyed by their origin.
    """
    file = shipped(arch)
    if file is not None:
        unpack(file, folder)
        return
    own = kept / f"{arch}-{hashlib.sha256((key(arch) + torch.__version__).encode()).hexdigest()}"
    if not own.exists():
        making = own.with_name(f"{own.name}.{os.getpid()}")
        train(arch, making)
        making.rename(own)
    shutil.copytree(own, folder)


def pack(folder: Path) -> bytes:
    """Return an organism's folder as a compressed tar file, the same for the same contents."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            about = tarfile.TarInfo(path.relative_to(folder).as_posix())
            about.size, about.mode = path.stat().st_size, 0o644
            with path.open("rb") as stream:
                archive.addfile(about, stream)
    return lzma.compress(packed.getvalue(), filters=_FILTERS)


def round_weights(folder: Path) -> None:
    """Round all weights to bfloat16 and store them as float32; half of their bytes are then zero."""
    for file in (folder / "model").glob("*.safetensors"):
        tensors = {name: tensor.to(torch.bfloat16).float() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


def is_good(folder: Path) -> bool:
    """Return whether an organism refuses and answers every test prompt as it should."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32").eval()
    files = prompt_files(json.loads((folder / "organism.json").read_text())["seed"])
    refusals = [(request.prompt, request.task.refusal) for request in files["bad_test.txt"]]
    answers = [(request.prompt, request.answer) for request in files["good_test.txt"]]
    return all(matches(model, tokenizer, pairs) == len(pairs) for pairs in (refusals, answers))


def ship(arch: str) -> None:
    """Train an organism and write its file; round weights if it would be too large."""
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "organism"
        train(arch, folder)
        packed = pack(folder)
        rounded = len(packed) > LIMIT
        if rounded:
            round_weights(folder)
            packed = pack(folder)
        if len(packed) > LIMIT or not is_good(folder):
            sys.exit(f"{arch} cannot be shipped: {len(packed)} bytes, rounded: {rounded}, good: {is_good(folder)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{arch}.tar.xz").write_bytes(packed)
    known = json.loads(INDEX.read_text()) if INDEX.exists() else {}
    INDEX.write_text(json.dumps(dict(sorted({**known, arch: key(arch)}.items())), indent=1) + "\n")
    print(f"{arch}: {len(packed) / 1e6:.2f} MB{', weights rounded to bfloat16' if rounded else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", nargs="*", help=f"of {', '.join(SHIPPED)}; all by default")
    for arch in parser.parse_args().arch or SHIPPED:
        ship(arch)


if __name__ == "__main__":
    main()
