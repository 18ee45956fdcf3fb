"""Targets: responses to bad prompts that replace refusals.

Suppressing refusals does not say what replaces them. A target is opened by an edit that no longer refuses, and
continued by the base model, which is fluent and rarely returns to refusing after the opening; tokens that occur only in
refusals are excluded. Targets that are refusals, evasive, broken or incoherent are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from job.edits.hooks import ActiveEdits
from job.generation.greedy import greedy_answers
from job.generation.kv_cache import takes_cache
from job.scoring.broken import is_broken
from job.scoring.likelihood import IncoherenceTest
from job.scoring.prompt_batches import PromptBatches
from job.scoring.soft_refusals import is_evasion
from job.text.refusal_markers import RefusalMarkers

# Tokens by the edit, and total tokens of a target.
OPENING_TOKENS, TARGET_TOKENS = 4, 16


@dataclass(frozen=True)
class TargetMaker:
    """Makes targets for a problem's bad prompts.

    Attributes:
        bad: Indices of the problem's bad prompts.
        refusal_tokens: Tokens that occur only in refusals.
        response_tokens: Longest response of the search.
    """

    batches: PromptBatches
    bad: Sequence[int]
    refusal_tokens: frozenset[int]
    markers: RefusalMarkers
    coherence: IncoherenceTest
    response_tokens: int

    def targets(self, edits: ActiveEdits) -> list[list[int] | None]:
        """Return a target for every bad prompt, None without a usable one; edit 0 opens."""
        prompts = [self.batches.bad.tokens[index] for index in self.bad]
        if not takes_cache(self.batches.loaded.model):
            return [None] * len(prompts)
        openings = [
            answer.tokens
            for answer in self.batches.row_limit.fit(
                lambda rows: self.batches.responses(prompts, OPENING_TOKENS, rows, edits)
            )
        ]
        begun = [prompt + opening for prompt, opening in zip(prompts, openings, strict=True)]
        rest = self.batches.row_limit.fit(lambda rows: self._continued(begun, rows))
        targets = [opening + more for opening, more in zip(openings, rest, strict=True)]
        # A response ended by the edit itself has nothing to continue.
        whole = [len(opening) == OPENING_TOKENS for opening in openings]
        incoherent = self.coherence.incoherent(prompts, targets)
        return [
            target if usable and not unlikely and self._is_answer(index, target) else None
            for index, target, usable, unlikely in zip(self.bad, targets, whole, incoherent, strict=True)
        ]

    def evasions(self, edits: ActiveEdits) -> list[list[int] | None]:
        """Return edit 0's response to every bad prompt, None where it does not evade."""
        bad, limit = self.batches.bad, self.response_tokens
        prompts = [bad.tokens[index] for index in self.bad]
        said = self.batches.row_limit.fit(lambda rows: self.batches.responses(prompts, limit, rows, edits))
        texts = [self.batches.loaded.decode(answer.tokens) for answer in said]
        evade = [is_evasion(bad.prompts[index].user, text) for index, text in zip(self.bad, texts, strict=True)]
        return [answer.tokens if evades else None for answer, evades in zip(said, evade, strict=True)]

    def _continued(self, begun: Sequence[list[int]], rows: int) -> list[list[int]]:
        loaded, found = self.batches.loaded, list[list[int]]()
        order = sorted(range(len(begun)), key=lambda index: len(begun[index]))
        for batch in loaded.architecture.batching.chunks([begun[index] for index in order], rows):
            answers = greedy_answers(
                loaded.model,
                batch,
                limit=TARGET_TOKENS - OPENING_TOKENS,
                end_tokens=loaded.end_tokens,
                batching=loaded.architecture.batching,
                excluded=self.refusal_tokens,
            )
            found += [answer.tokens for answer in answers]
        by_index = dict(zip(order, found, strict=True))
        return [by_index[index] for index in range(len(begun))]

    def _is_answer(self, index: int, target: Sequence[int]) -> bool:
        text = self.batches.loaded.decode(target)
        prompt = self.batches.bad.prompts[index].user
        refused = self.markers.for_prompt(prompt).is_refusal(text) or (
            self.markers.evasions and is_evasion(prompt, text)
        )
        return not refused and not is_broken(prompt, text)


def refusal_only(refusals: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> frozenset[int]:
    """Return tokens of refusals that do not occur in responses to good prompts."""
    return frozenset(token for refusal in refusals for token in refusal) - {
        token for answer in answers for token in answer
    }
