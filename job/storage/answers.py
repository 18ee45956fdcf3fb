"""Answers that are kept for people to read: a few of those that the figures come from, on this machine alone.

They stay out of mirrors and exports, and only their owner may read them: what a model says without its refusals may be
what nobody should find lying about.
"""

from __future__ import annotations

from collections.abc import Sequence

from job.data.prompts import Prompt, PromptSets
from job.errors import JobError
from job.records import KeptAnswer, KeptAnswers
from job.storage.atomic import PRIVATE, cannot_write, read_record, write_record
from job.storage.run_folder import RunFolder

# Of each kind of prompts.
KEPT = 8


def keep_answers(folder: RunFolder, subject: str, heard: KeptAnswers, prompts: PromptSets) -> None:
    """Keep the answers to the first prompts of the report split, which stand in it in a random order.

    Args:
        folder: The run folder.
        subject: "base" or "trial-NNNN".
        heard: All its answers.
        prompts: All prompt sets.

    Raises:
        MachineError: They cannot be written.
    """
    kept = KeptAnswers(good=_first(heard.good, prompts.good_report), bad=_first(heard.bad, prompts.bad_report))
    file = folder.answers_file(subject)
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise cannot_write(file.parent, error) from error
    write_record(file, kept, mode=PRIVATE)


def read_answers(folder: RunFolder, subject: str) -> KeptAnswers | None:
    """Return the answers that are kept of a subject; None where there are none, or none that can be read."""
    try:
        return read_record(folder.answers_file(subject), KeptAnswers)
    except JobError:
        return None


def _first(heard: Sequence[KeptAnswer], prompts: Sequence[Prompt]) -> tuple[KeptAnswer, ...]:
    by_prompt = {one.prompt: one for one in heard}
    return tuple(by_prompt[prompt.user] for prompt in prompts[:KEPT])
