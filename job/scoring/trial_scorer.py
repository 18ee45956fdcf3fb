"""Scores for the search: KL divergence, refusals and broken responses of many edits in one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

from job.edits.hooks import Intervention
from job.records import EditParameters, TrialScores
from job.scoring.broken import Exchange
from job.scoring.kl import KLReference
from job.scoring.likelihood import IncoherenceTest
from job.scoring.prompt_batches import PromptBatches, TrialRows
from job.scoring.race import Race
from job.scoring.refusals import RefusalCounter, ResponseCounts
from job.text.refusal_markers import RefusalMarkers

# KL recorded for a failed trial, in nats; far above any usable edit's.
FAILED_KL = 100.0
_NOT_FINITE = "the logits are not finite"


@dataclass(frozen=True)
class TrialOutcome:
    """A trial's scores, and its responses where they are kept: none of a trial that was rejected before."""

    scores: TrialScores
    bad: tuple[Exchange, ...] = ()
    good: tuple[Exchange, ...] = ()


@dataclass(frozen=True)
class TrialScorer:
    """Scores edits of the base model on good and bad prompts."""

    reference: KLReference
    counter: RefusalCounter

    @classmethod
    def measured(
        cls, batches: PromptBatches, markers: RefusalMarkers, response_tokens: int, kl_tokens: int = 1
    ) -> Self:
        """Measure the base model's reference, with inactive hooks; KL is a mean over `kl_tokens` positions."""
        reference = KLReference.measured(batches, kl_tokens)
        return cls(reference, RefusalCounter.measured(batches, markers, response_tokens))

    @property
    def batches(self) -> PromptBatches:
        """The base model's prompts."""
        return self.counter.batches

    @property
    def by_markers(self) -> Self:
        """The same scorer, to which evasive responses without a marker are no refusals."""
        return replace(self, counter=self.counter.by_markers)

    def scores(
        self,
        intervention: Intervention,
        edits: Sequence[EditParameters],
        rows: int,
        *,
        skip_kl_above: float | None = None,
        response_tokens: int | None = None,
    ) -> list[TrialScores]:
        """Score all edits in one batch with hooks in place; no generation above a KL of `skip_kl_above` nats."""
        found = self.outcomes(intervention, edits, rows, skip_kl_above=skip_kl_above, response_tokens=response_tokens)
        return [one.scores for one in found]

    def full_scores(
        self,
        intervention: Intervention,
        edits: Sequence[EditParameters],
        rows: int,
        *,
        search_tokens: int,
        incoherence: IncoherenceTest,
    ) -> list[TrialScores]:
        """Score finalists on full-length responses, where incoherent ones and those broken before count as broken."""
        found = self.outcomes(intervention, edits, rows, search_tokens=search_tokens, incoherence=incoherence)
        return [one.scores for one in found]

    def outcomes(
        self,
        intervention: Intervention,
        edits: Sequence[EditParameters],
        rows: int,
        *,
        keep: Collection[str] = (),
        skip_kl_above: float | None = None,
        response_tokens: int | None = None,
        search_tokens: int | None = None,
        incoherence: IncoherenceTest | None = None,
        race: Race | None = None,
    ) -> list[TrialOutcome]:
        """Score all edits as `scores` and `full_scores` do, and keep responses to "bad" or "good" prompts.

        Trials that lose a `race` are counted on its first prompts only.
        """
        active = intervention.activate(edits)
        trial_rows = self.batches.trial_rows(active, len(edits))
        kls = self.reference.trial_means(self.batches, trial_rows, rows)
        rejected = [self._rejected(kl, reason, skip_kl_above) for kl, reason in zip(kls, active.reasons, strict=True)]
        generated = [trial for trial, scores in enumerate(rejected) if scores is None]
        counts: list[ResponseCounts] = []
        good: list[list[Exchange]] = [[] for _ in generated]
        if generated:
            count = partial(
                self.counter.count,
                trial_rows,
                rows=rows,
                response_tokens=response_tokens,
                search_tokens=search_tokens,
                keep="bad" in keep,
            )
            counts = count(trials=generated) if race is None else self._raced(count, generated, kls, race)
            if "good" in keep:
                good = self._good_exchanges(trial_rows, generated, rows, response_tokens)
        if incoherence is not None:
            self._add_incoherent(counts, incoherence)
        by_trial = {trial: TrialOutcome(scores) for trial, scores in enumerate(rejected) if scores is not None}
        for trial, counted, heard in zip(generated, counts, good, strict=True):
            bad = [counted.exchanges[prompt] for prompt in sorted(counted.exchanges)]
            by_trial[trial] = TrialOutcome(self._counted(kls[trial], counted), tuple(bad), tuple(heard))
        return [by_trial[trial] for trial in range(len(edits))]

    def _raced(
        self,
        count: Callable[..., list[ResponseCounts]],
        trials: Sequence[int],
        kls: Sequence[float],
        race: Race,
    ) -> list[ResponseCounts]:
        """Return the counts over the race's first prompts, and over all of them for trials that have not lost."""
        every = range(len(self.batches.bad))
        first, others = race.parts(len(every))
        beaten = [race.beaten(kls[trial]) for trial in trials]
        counts = count(trials=trials, prompts=[first if one else every for one in beaten])
        left = [
            (trial, counted)
            for trial, counted, one in zip(trials, counts, beaten, strict=True)
            if one and not race.lost(counted.unanswered, kls[trial])
        ]
        if left:
            more = count(trials=[trial for trial, _ in left], prompts=[others] * len(left))
            for (_, counted), rest in zip(left, more, strict=True):
                counted.add(rest)
        return counts

    def _good_exchanges(
        self, trial_rows: TrialRows, trials: Sequence[int], rows: int, response_tokens: int | None
    ) -> list[list[Exchange]]:
        """Return each trial's responses to the good prompts."""
        batches, start = self.batches, 0
        found: list[list[Exchange]] = [[] for _ in trials]
        limit = response_tokens or self.counter.response_tokens
        for batch, owners in batches.generating(batches.good.tokens, trial_rows, rows, trials):
            responses = batches.generate(batch * len(trials), owners, limit, may_fail=True)
            for row, response in enumerate(responses):
                prompt = batches.good.prompts[start + row % len(batch)].user
                found[row // len(batch)].append(Exchange(prompt, batches.loaded.decode(response.tokens)))
            start += len(batch)
        return found

    def _rejected(self, kl: float, reason: str | None, skip_kl_above: float | None) -> TrialScores | None:
        """Return scores for a trial rejected before generation, else None."""
        if reason is None and not math.isfinite(kl):
            reason = _NOT_FINITE
        if reason is None and kl >= FAILED_KL:
            reason = f"the KL divergence is {kl:.3g} nats"
        if reason is not None:
            return self._failed(reason)
        if skip_kl_above is not None and kl > skip_kl_above:
            reason = f"no answers were generated: the KL divergence is {kl:.3g} nats, above {skip_kl_above:g}"
            return TrialScores(refusals=len(self.batches.bad), kl=kl, reason=reason, skipped=True)
        return None

    def _failed(self, reason: str) -> TrialScores:
        return TrialScores(refusals=len(self.batches.bad), kl=FAILED_KL, reason=reason)

    def _counted(self, kl: float, counts: ResponseCounts) -> TrialScores:
        if not math.isfinite(counts.opening):
            return self._failed(_NOT_FINITE)
        refusals, broken, opening, asked = counts.refusals, counts.broken, counts.opening, len(self.batches.bad)
        if counts.prompts < asked:
            share = asked / counts.prompts
            refusals, opening = round(refusals * share), opening * share
            broken = min(round(broken * share), asked - refusals)
        projected_from = counts.prompts if counts.prompts < asked else 0
        # Rounding may make a KL divergence as small as -1e-17.
        return TrialScores(
            refusals=refusals, broken=broken, kl=max(kl, 0.0), opening=opening, projected_from=projected_from
        )

    def _add_incoherent(self, counts: Sequence[ResponseCounts], incoherence: IncoherenceTest) -> None:
        rest = [(count, prompt, tokens) for count in counts for prompt, tokens in count.rest]
        prompts = [self.batches.bad.tokens[prompt] for _, prompt, _ in rest]
        incoherent = incoherence.incoherent(prompts, [tokens for *_, tokens in rest])
        for (count, prompt, _), broken in zip(rest, incoherent, strict=True):
            if broken:
                count.add_incoherent(prompt)
