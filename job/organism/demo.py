"""`abliterate demo`: the whole job on the organism."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.organism.folder import write_organism
from job.organism.training import matches
from job.organism.world import (
    expected_answer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from job.storage.run_folder import RunFolder

BEHAVIOUR = "refusing requests about anything hexed, a benign stand-in of the built-in model organism"


def run_demo(
    workspace: str | None,
    trials: int | None,
    run: Callable[..., Any],
    report: Callable[[str], None],
) -> None:
    """Train the organism, run the whole job on it and check the export's responses; `run` runs a job."""
    from job.config.load import default_workspace, load_settings

    folder = Path(workspace or default_workspace())
    organism = folder / "organism"
    write_organism(organism, arch="llama", size="tiny", seed=0, report=report)
    options = {
        "model": str(organism / "model"),
        "workspace": str(folder),
        "good_prompts": str(organism / "good_train.txt"),
        "bad_prompts": str(organism / "bad_train.txt"),
        "good_eval_prompts": str(organism / "good_test.txt"),
        "bad_eval_prompts": str(organism / "bad_test.txt"),
        "trials": trials,
        "card.behaviour": BEHAVIOUR,
    }
    settings = load_settings(options).settings
    outcome = run(settings, new=False)
    _report_correctness(outcome.folder, report)


def _report_correctness(folder: RunFolder, report: Callable[[str], None]) -> None:
    from job.data.prompts import PromptSets
    from job.storage.atomic import read_record

    prompts = read_record(folder.prompts_file, PromptSets)
    right = []
    loaded, tokenizer = _load_plainly(folder.export_link)
    for group in (prompts.good_report, prompts.bad_report):
        pairs = [(prompt.user, expected_answer(prompt.user)) for prompt in group]
        right.append(f"{matches(loaded, tokenizer, pairs)}/{len(pairs)}")
    report(f"correct responses on these prompts: {right[0]} ordinary requests, {right[1]} enchanted ones")


def _load_plainly(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return (
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True),
        AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left"),
    )
