"""The folder of an organism: its model and prompt files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from job.errors import UsageError
from job.organism.training import SIZES, train_organism
from job.organism.world import (
    prompt_files,
)

ARCHITECTURES = ("llama", "qwen3", "gemma2", "mixtral", "qwen3_moe")


def write_organism(folder: Path, *, arch: str, size: str, seed: int, report: Callable[[str], None]) -> None:
    """Train an organism and write it and its prompt files into a folder, unless it is there.

    The folder holds ``model`` in Hugging Face format and good_train.txt, good_test.txt, bad_train.txt and bad_test.txt,
    one prompt per line. Raises UsageError for other contents, or JobError if a test prompt's response is wrong.
    """
    if arch not in ARCHITECTURES:
        raise UsageError(f"no organism of architecture {arch!r}", remedy=f"choose from {', '.join(ARCHITECTURES)}")
    if size not in SIZES:
        raise UsageError(f"no organism of size {size!r}", remedy=f"choose from {', '.join(SIZES)}")
    description = json.dumps({"arch": arch, "size": size, "seed": seed}, sort_keys=True)
    mark = folder / "organism.json"
    if mark.exists() and mark.read_text() == description:
        report(f"the organism in {folder} already exists")
        return
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", remedy="name a new or empty folder")
    files = prompt_files(seed)
    model, tokenizer = train_organism(arch, size, seed, files, report)
    from job.model.loading import quieten_transformers

    quieten_transformers()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial / "model")
    tokenizer.save_pretrained(partial / "model")
    for name, requests in files.items():
        (partial / name).write_text("".join(request.prompt + "\n" for request in requests))
    (partial / mark.name).write_text(description)
    partial.replace(folder)
