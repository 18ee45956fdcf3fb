"""Inputs as people have them, and what `preflight` and `run` have to make of each."""

from __future__ import annotations

import json
import re
import shutil
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.helpers import Result, abliterate

# Lines of each file of prompts.
LINES = 8
# A file that `git clone` has not fetched.
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 400\n"
SETS = {
    "bad_prompts": "bad_train.txt",
    "good_prompts": "good_train.txt",
    "bad_eval_prompts": "bad_test.txt",
    "good_eval_prompts": "good_test.txt",
}
# A changed model may answer anything: whatever it says counts as a refusal.
MARKERS = json.dumps([*string.ascii_lowercase, *string.digits, *"<>:.,▁"])
BRIEF = (
    *("--startup-trials", 1, "--set", f"scoring.refusal_markers={MARKERS}"),
    *("--set", "scoring.answer_tokens=2", "--set", "scoring.search_tokens=2"),
)


@dataclass(frozen=True)
class Case:
    """An input, and the verdict that `preflight` and `run` must both reach.

    Attributes:
        told: Parts of what preflight's checks say, or of the error's line.
        code: Exit code of both.
        check: Start of the names of the checks that tell it; "": all.
        model: Changes the files of a valid model; a text is a model's name in place of the folder.
        prompts: Writes a set of prompts into a folder, given its usual lines; returns the SPEC.
        read: Returns the prompts that must be read, given the usual lines; None: those lines.
        options: Further words of the command, or a function that returns them, given a folder to write in.
        environment: Further variables.
        proof: Checks the finished job, given its run folder and the model's.
        row: Row of the table in docs/lab-notes/data-and-models.md.
    """

    told: Sequence[str] = ()
    code: int = 0
    check: str = ""
    model: Callable[[Path], Any] | str | None = None
    prompts: Callable[[Path, list[str]], str] | None = None
    read: Callable[[list[str]], list[str]] | None = None
    options: Sequence[str] | Callable[[Path], Sequence[str]] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    proof: Callable[[Path, Path], None] | None = None
    row: int | None = None


@dataclass(frozen=True)
class Verdicts:
    """What `preflight --json` and `run` come to.

    Attributes:
        checks: preflight's checks, without any if it ended with an error.
    """

    checked: Result
    checks: Sequence[Mapping[str, str]]
    ran: Result

    @property
    def refusal(self) -> str:
        """What preflight refuses the job for first: measurement and remedy, or the line of its error."""
        failed = [one for one in self.checks if one["status"] == "fail"]
        if not failed:
            return error_of(self.checked)
        first = min(failed, key=lambda one: one["scope"])
        return _line(first)

    @property
    def end(self) -> str:
        """Why the run ends, without the name of the check and the count of others."""
        line = re.sub(r"^preflight: [\w.-]+: ", "", error_of(self.ran))
        return re.sub(r" \(and \d+ more, see `abliterate preflight`\)", "", line)

    def said(self, check: str) -> str:
        """What the checks say whose names begin like this, or the error."""
        lines = [_line(one) for one in self.checks if one["name"].startswith(check)]
        return "\n".join(lines) or error_of(self.checked)


def _line(check: Mapping[str, str]) -> str:
    return " ".join(f"{check['measured']} — {check['remedy']}".split()) if check["remedy"] else check["measured"]


def error_of(ended: Result) -> str:
    """Return the one line of an error, "" without one."""
    lines = [line.removeprefix("error: ") for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(lines) <= 1, ended.err
    return lines[0] if lines else ""


def write_brief(organism: Path, folder: Path) -> None:
    """Write an organism with few layers and prompts, which takes less time."""
    shutil.copytree(organism / "model", folder / "model")
    shorten(folder / "model")
    for file in organism.glob("*.txt"):
        (folder / file.name).write_text("".join(file.read_text().splitlines(keepends=True)[:LINES]))


def shorten(model: Path) -> None:
    """Leave the first two layers of a model."""
    weights, config = model / "model.safetensors", model / "config.json"
    tensors = load_file(weights).items()
    kept = {name: tensor for name, tensor in tensors if not re.search(r"layers\.[2-9]\.", name)}
    save_file(kept, weights, metadata={"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 2}, indent=1))


def verdicts(cases: Sequence[Case], brief: Path, folder: Path) -> Verdicts:
    """Return what the commands come to with these inputs; several cases differ in their prompts alone.

    Args:
        cases: At most one for every set of prompts.
        brief: What `write_brief` wrote.
        folder: A new folder, for the inputs (`model`, and one by the name of each set) and the jobs (`runs`).
    """
    folder.mkdir(exist_ok=True)
    first, specs = cases[0], {name: str(brief / file) for name, file in SETS.items()}
    model = first.model if isinstance(first.model, str) else str(brief / "model")
    if callable(first.model):
        shutil.copytree(brief / "model", folder / "model")
        first.model(folder / "model")
        model = str(folder / "model")
    for case, setting in zip(cases, SETS, strict=False):
        if case.prompts is not None:
            (folder / setting).mkdir()
            specs[setting] = case.prompts(folder / setting, usual_lines(brief, setting))
    options = first.options(folder) if callable(first.options) else first.options
    words = [model, "--workspace", folder / "runs", "--trials", 1, *BRIEF]
    words += [word for name, spec in specs.items() for word in (f"--{name.replace('_', '-')}", spec)]
    before = contents(folder / "model")
    checked, ran = (
        abliterate(*command, *words, *options, **first.environment) for command in (("preflight", "--json"), ("run",))
    )
    assert contents(folder / "model") == before, "a command has changed the user's model"
    checks = json.loads(checked.out)["checks"] if checked.out else ()
    return Verdicts(checked, checks, ran)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def usual_lines(brief: Path, setting: str) -> list[str]:
    return (brief / SETS[setting]).read_text().splitlines()
