"""The folder of the real model: model, prompt files, and the command that runs a job on them."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from job.errors import ImpossibleJobError, MachineError, UsageError
from job.realmodel.candidates import KINDS, candidates
from job.realmodel.conversion import convert
from job.realmodel.wheel import GgufModel, installed_model

PROMPTS_PER_FILE = 100
# Trials of the job that is proposed: a first front, in minutes.
TRIALS = 24
_MARK = "real-model.json"


def write_real_model(folder: Path, report: Callable[[str], None]) -> None:
    """Convert the installed model and write it, with prompts that it declines and answers, unless it is there.

    The folder holds ``model`` in Hugging Face format (bfloat16) and good_train.txt, good_test.txt, bad_train.txt and
    bad_test.txt, one prompt per line. Raises UsageError for other contents, MachineError without the model or
    permission, or ImpossibleJobError.
    """
    if folder.name in ("", ".."):
        raise UsageError(f"{folder} cannot be replaced", remedy="name a new or empty folder, not the current one")
    folder, source = Path(os.path.realpath(folder)), installed_model()
    description = json.dumps(_describe(source), sort_keys=True)
    mark = folder / _MARK
    if mark.exists() and mark.read_text() == description:
        report(f"the real model in {folder} already exists")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty", remedy="name a new or empty folder")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_model(source, partial / "model", report)
        _write_prompts(partial, report)
        (partial / mark.name).write_text(description)
        partial.replace(folder)
    except OSError as error:
        raise MachineError(
            f"cannot write {folder}: {error.strerror or error}", remedy="name a writable folder"
        ) from error


def run_command(folder: Path) -> str:
    """Return the command that runs a job on a folder's model and prompts."""
    return shlex.join(run_words(folder))


def run_words(folder: Path) -> list[str]:
    """Return the words of `run_command`."""
    files = {
        "good-prompts": "good_train",
        "bad-prompts": "bad_train",
        "good-eval-prompts": "good_test",
        "bad-eval-prompts": "bad_test",
    }
    prompts = [word for option, name in files.items() for word in (f"--{option}", str(folder / f"{name}.txt"))]
    return ["abliterate", "run", str(folder / "model"), *prompts, "--trials", str(TRIALS)]


def _describe(source: GgufModel) -> dict[str, str]:
    found = {"wheel": source.version, "gguf_sha256": hashlib.sha256(source.file.read_bytes()).hexdigest()}
    return found | {
        f"{kind}_sha256": hashlib.sha256("\n".join(candidates(kind)).encode()).hexdigest() for kind in KINDS
    }


def _write_model(source: GgufModel, folder: Path, report: Callable[[str], None]) -> None:
    report(f"converting {source.file.name}")
    convert(source.file, folder)
    if source.licence:
        (folder / "LICENSE").write_text(source.licence)


def _write_prompts(folder: Path, report: Callable[[str], None]) -> None:
    from job.config.load import default_values
    from job.config.sections import LoadingSettings
    from job.model.loading import load_model
    from job.realmodel.behaviour import first_prompts
    from job.text.refusal_markers import RefusalMarkers

    defaults = default_values()
    given = {"dtypes": ["float32"], "response_prefix": ""}
    loaded = load_model(folder / "model", LoadingSettings.model_validate({**defaults["loading"], **given}), report)
    markers = RefusalMarkers(defaults["scoring"]["refusal_markers"])
    wanted = 2 * PROMPTS_PER_FILE
    for kind, verb in (("bad", "declines"), ("good", "answers")):
        asked = candidates(kind)
        found = first_prompts(
            loaded,
            asked,
            markers,
            declined=kind == "bad",
            count=wanted,
            progress=partial(_report_count, report, f"of {wanted} prompts that the model {verb}"),
        )
        if len(found) < wanted:
            raise ImpossibleJobError(
                f"the model {verb} only {len(found)} of {len(asked)} prompts, and {wanted} are needed",
                remedy="install the version of the package that constraints.txt names",
            )
        for name, part in (("train", found[:PROMPTS_PER_FILE]), ("test", found[PROMPTS_PER_FILE:])):
            (folder / f"{kind}_{name}.txt").write_text("".join(prompt + "\n" for prompt in part))


def _report_count(report: Callable[[str], None], of_what: str, count: int) -> None:
    report(f"{count} {of_what}")
