"""Prompt sets: read, cleaned and split."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from job.errors import ImpossibleJobError
from job.settings import PromptSettings, Settings


@dataclass(frozen=True)
class Prompt:
    """One prompt as the model will see it.

    Attributes:
        user: The user's message.
        system: The system prompt, None for none.
    """

    user: str
    system: str | None = None


@dataclass(frozen=True)
class PromptSets:
    """All prompts of a job.

    Attributes:
        good: Prompts without the behaviour, for the directions.
        bad: Prompts with the behaviour, for the directions.
        good_search: Prompts without the behaviour, for the search.
        bad_search: Prompts with the behaviour, for the search.
        good_report: Prompts without the behaviour, for the reported figures.
        bad_report: Prompts with the behaviour, for the reported figures.
    """

    good: tuple[Prompt, ...]
    bad: tuple[Prompt, ...]
    good_search: tuple[Prompt, ...]
    bad_search: tuple[Prompt, ...]
    good_report: tuple[Prompt, ...]
    bad_report: tuple[Prompt, ...]


def read_prompts(source: PromptSettings) -> tuple[Prompt, ...]:
    """Return the prompts of a text file, one a line, without blank lines and repetitions.

    Raises:
        ImpossibleJobError: The file cannot be read or holds no prompt.
    """
    path = Path(source.spec)
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise ImpossibleJobError(f"there is no prompt file {path}", remedy="check its path") from None
    except UnicodeDecodeError:
        raise ImpossibleJobError(
            f"the prompt file {path} is not UTF-8 text", remedy="give a text file, one prompt a line"
        ) from None
    except OSError as error:
        raise ImpossibleJobError(
            f"cannot read the prompt file {path}: {error.strerror}", remedy="check its path"
        ) from error
    texts = dict.fromkeys(line.strip() for line in lines if line.strip())
    if not texts:
        raise ImpossibleJobError(f"the prompt file {path} is empty", remedy="write one prompt a line")
    return tuple(Prompt(user=f"{source.prefix}{text}{source.suffix}", system=source.system_prompt) for text in texts)


def load_prompts(settings: Settings) -> PromptSets:
    """Read all prompt sets; evaluation sets are split in two by the seed unless report sets are given.

    Raises:
        ImpossibleJobError: A set cannot be read, is empty, or too small to be split.
    """
    good_search, good_report = _evaluation(
        "good_eval_prompts", settings.good_eval_prompts, settings.good_report_prompts, settings.seed
    )
    bad_search, bad_report = _evaluation(
        "bad_eval_prompts", settings.bad_eval_prompts, settings.bad_report_prompts, settings.seed
    )
    return PromptSets(
        good=read_prompts(settings.good_prompts),
        bad=read_prompts(settings.bad_prompts),
        good_search=good_search,
        bad_search=bad_search,
        good_report=good_report,
        bad_report=bad_report,
    )


def _evaluation(
    name: str, source: PromptSettings, report: PromptSettings | None, seed: int
) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Return the prompts for the search and those for the reported figures."""
    prompts = read_prompts(source)
    if report is not None:
        return prompts, read_prompts(report)
    if len(prompts) < 2:
        raise ImpossibleJobError(
            f"{name} has a single prompt, which cannot be split into search and report",
            remedy=f"give more prompts or {name.replace('eval', 'report')}",
        )
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)
    half = (len(order) + 1) // 2
    search, rest = sorted(order[:half]), sorted(order[half:])
    return tuple(prompts[i] for i in search), tuple(prompts[i] for i in rest)
