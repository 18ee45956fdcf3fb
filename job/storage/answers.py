"""Sampled responses behind the report's metrics, stored on this machine only.

They are in no mirror or export, and readable by their owner only: responses without refusals may be harmful.
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
    """Store the responses to the first report prompts, in random order. Raises MachineError."""
    kept = KeptAnswers(good=_first(heard.good, prompts.good_report), bad=_first(heard.bad, prompts.bad_report))
    file = folder.answers_file(subject)
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise cannot_write(file.parent, error) from error
    write_record(file, kept, mode=PRIVATE)


def read_answers(folder: RunFolder, subject: str) -> KeptAnswers | None:
    """Return a subject's stored responses, None if missing or unreadable."""
    try:
        return read_record(folder.answers_file(subject), KeptAnswers)
    except JobError:
        return None


def _first(heard: Sequence[KeptAnswer], prompts: Sequence[Prompt]) -> tuple[KeptAnswer, ...]:
    by_prompt = {one.prompt: one for one in heard}
    return tuple(by_prompt[prompt.user] for prompt in prompts[:KEPT])
