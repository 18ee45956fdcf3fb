"""Metrics for reports, from one model's whole responses to all prompts."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from job.edits.hooks import ActiveEdits
from job.generation.answer import Answer
from job.numerics.statistics import mean_interval
from job.records import FORCED_TOKENS, Figures, KeptAnswer, KeptAnswers, KLFigures, KLSpread, Outcomes, Thinking
from job.records.scorecard import ScoredPrompts
from job.scoring.broken import Exchange
from job.scoring.kl import KLReference
from job.scoring.likelihood import IncoherenceTest
from job.scoring.outcomes import count_outcomes
from job.scoring.prompt_batches import PromptBatches
from job.scoring.thinking import measure_thinking
from job.text.refusal_markers import RefusalMarkers


@dataclass(frozen=True)
class JudgedResponses:
    """One model's responses to the good and bad prompts, and which of them are refusals.

    Attributes:
        places: Index of each good prompt in its set as it was given.
    """

    places: Sequence[int]
    good: list[Exchange]
    bad: list[Exchange]
    good_refused: list[bool]
    bad_refused: list[bool]

    @property
    def exchanges(self) -> list[Exchange]:
        """All prompts with their responses, good ones first."""
        return [*self.good, *self.bad]

    @property
    def kept(self) -> KeptAnswers:
        """The responses as the run folder stores them."""
        return KeptAnswers(
            good=_kept_responses(self.good, self.good_refused), bad=_kept_responses(self.bad, self.bad_refused)
        )

    def figures(
        self,
        kl_tokens: int,
        divergences: Sequence[float] | None = None,
        more: tuple[int, Sequence[float]] | None = None,
        thinking: Thinking | None = None,
    ) -> Figures:
        """Return the model's metrics; `divergences` are its KL per good prompt in nats, None for the base model.

        `more` is a number of positions with the KL per good prompt over these.
        """
        good_broken, bad_broken = ([exchange.broken for exchange in kind] for kind in (self.good, self.bad))
        return Figures(
            bad_prompts=len(self.bad),
            refusals=sum(self.bad_refused),
            good_prompts=len(self.good),
            false_refusals=sum(self.good_refused),
            degenerate=sum(bad_broken),
            false_degenerate=sum(good_broken),
            unanswered=sum(map(operator.or_, self.bad_refused, bad_broken)),
            kl=math.fsum(divergences) / len(divergences) if divergences is not None else None,
            kl_interval=mean_interval(divergences) if divergences is not None else None,
            kl_tokens=kl_tokens,
            kl_spread=KLSpread.of(divergences, self.places) if divergences is not None else None,
            kl_more=self._kl(*more) if more is not None else None,
            outcomes=(
                *count_outcomes("bad", self.bad, self.bad_refused),
                *count_outcomes("good", self.good, self.good_refused),
            ),
            thinking=thinking,
        )

    def _kl(self, tokens: int, values: Sequence[float]) -> KLFigures:
        return KLFigures(
            tokens=tokens,
            mean=math.fsum(values) / len(values),
            interval=mean_interval(values),
            spread=KLSpread.of(values, self.places),
        )


@dataclass(frozen=True)
class ReportMetrics:
    """Measures one model on whole responses, with or without an edit.

    Attributes:
        kl_tokens: Positions of the base model's responses averaged in KL.
        incoherence_margin: Margin of `IncoherenceTest.calibrated`.
        thinking_tokens: Longest response with thinking on; 0: not measured.
    """

    batches: PromptBatches
    markers: RefusalMarkers
    response_tokens: int
    kl_tokens: int = 1
    incoherence_margin: float | None = None
    thinking_tokens: int = 0

    @property
    def most_tokens(self) -> int:
        """Tokens that `responses` reads at most: fewer where responses end early or prompts share a prefix."""
        prompts = self.batches.everything
        return sum(map(len, prompts)) + len(prompts) * self.response_tokens

    def responses(self, edits: ActiveEdits | None = None) -> list[Answer]:
        """Generate whole responses to all prompts, good ones first, under edit 0 if edits are active."""
        return self._responses(self.batches.everything, edits)

    def good_responses(self) -> list[Answer]:
        """Generate the model's whole responses to the good prompts only."""
        return self._responses(self.batches.good.tokens, None)

    def _responses(self, prompts: Sequence[list[int]], edits: ActiveEdits | None) -> list[Answer]:
        batches, limit = self.batches, self.response_tokens
        return batches.row_limit.fit(lambda rows: batches.responses(prompts, limit, rows, edits))

    def good_outcomes(self, prompts: ScoredPrompts, edits: ActiveEdits | None = None) -> tuple[Outcomes, ...]:
        """Count the outcomes of responses to the good prompts, under edit 0 if edits are active."""
        judged = self.judge(self.responses(edits))
        return tuple(count_outcomes(prompts, judged.good, judged.good_refused))

    def thinking(self, edits: ActiveEdits | None = None) -> Thinking | None:
        """Judge responses with thinking on, under edit 0 if edits are active; None if not asked for or not known."""
        if not self.thinking_tokens:
            return None
        return measure_thinking(self.batches, self.markers, self.thinking_tokens, edits)

    def reference(self) -> KLReference:
        """Measure the KL reference of this model."""
        return KLReference.measured(self.batches, self.kl_tokens)

    def more_reference(self, reference: KLReference, responses: Sequence[Answer]) -> KLReference:
        """Return the KL reference for the scorecard's second figure; `responses` are this base model's.

        It is the first token's if `reference` has several positions, else that of the responses' first positions.
        """
        if reference.tokens > 1:
            return reference.first_token
        return KLReference.of_responses(self.batches, FORCED_TOKENS, responses[: len(self.batches.good)])

    def incoherence_test(self, responses: Sequence[Answer] | None = None) -> IncoherenceTest:
        """Calibrate the incoherence test on this base model's responses; generate those to good prompts if needed."""
        if responses is None:
            responses = [] if self.incoherence_margin is None else self.good_responses()
        good = responses[: len(self.batches.good)]
        return IncoherenceTest.calibrated(self.batches, self.incoherence_margin, good)

    def judge(self, responses: Sequence[Answer], incoherent: Sequence[bool] | None = None) -> JudgedResponses:
        """Judge responses to all prompts, good ones first; `incoherent` comes from `IncoherenceTest.flags`."""
        prompts = [*self.batches.good.prompts, *self.batches.bad.prompts]
        exchanges = [
            Exchange(prompt.user, self.batches.loaded.decode(response.tokens), flag, prompt.groups)
            for prompt, response, flag in zip(prompts, responses, incoherent or [False] * len(prompts), strict=True)
        ]
        refused = [self.markers.for_prompt(one.prompt).is_refusal(one.answer) for one in exchanges]
        good = len(self.batches.good)
        places = self.batches.good.places
        return JudgedResponses(places, exchanges[:good], exchanges[good:], refused[:good], refused[good:])


def _kept_responses(exchanges: Sequence[Exchange], refused: Sequence[bool]) -> tuple[KeptAnswer, ...]:
    return tuple(
        KeptAnswer(prompt=one.prompt, answer=one.answer, refused=refusal)
        for one, refusal in zip(exchanges, refused, strict=True)
    )
