"""Metrics of a model by a job's settings, on one pair of prompt sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

from job.config.schema import Settings
from job.data.prompts import Prompt
from job.edits.hooks import Intervention
from job.generation.forward import counted_tokens
from job.model.loading import LoadedModel
from job.records import FORCED_TOKENS, EditParameters, Figures, FinalistScores, TrialScores
from job.scoring.kl import KLReference
from job.scoring.likelihood import IncoherenceTest
from job.scoring.prompt_batches import PromptBatches
from job.scoring.report_metrics import ReportMetrics
from job.scoring.trial_scorer import FAILED_KL, TrialScorer
from job.storage.events import Events
from job.text.refusal_markers import RefusalMarkers

# Returns the metrics of the prompts held out for the choice.
HeldOut = Callable[[], ReportMetrics]


def metrics_of(
    model: LoadedModel, settings: Settings, good: Sequence[Prompt], bad: Sequence[Prompt], rows: int, events: Events
) -> ReportMetrics:
    """Return metrics of a model on good prompts (KL) and bad prompts (refusals)."""
    return ReportMetrics(
        PromptBatches.of(model, good, bad, rows, report=events.say),
        RefusalMarkers(settings.scoring.refusal_markers),
        settings.scoring.answer_tokens,
        settings.kl_tokens,
        settings.scoring.gibberish,
    )


@contextmanager
def shown_generating(events: Events, label: str, most_tokens: int) -> Iterator[None]:
    """Show progress within the block by tokens read, `most_tokens` at most; `label` says what is under way."""
    with (
        events.progress(f"{label} (tokens; the total is an upper bound)", most_tokens) as advance,
        counted_tokens(advance),
    ):
        yield


def scorer_of(metrics: ReportMetrics) -> TrialScorer:
    """Return a scorer of edits with the base model's metrics."""
    return TrialScorer.measured(metrics.batches, metrics.markers, metrics.response_tokens, metrics.kl_tokens)


class EditScorer:
    """Scores edits on the search split, with metrics of the base model; its responses are measured on first use."""

    def __init__(self, metrics: ReportMetrics, hooks: Intervention, settings: Settings) -> None:
        self.metrics = metrics
        self._hooks = hooks
        self._settings = settings

    @cached_property
    def trials(self) -> TrialScorer:
        """Scores batches of edits."""
        return scorer_of(self.metrics)

    @cached_property
    def incoherence(self) -> IncoherenceTest:
        """Detects incoherent responses; calibrated by `baseline`, else on first use."""
        return self.metrics.incoherence_test()

    def baseline(self) -> Figures:
        """Return the base model's metrics."""
        responses = self.metrics.responses()
        self.incoherence = self.metrics.incoherence_test(responses)
        judged = self.metrics.judge(responses, self.incoherence.flags(responses))
        return judged.figures(self.metrics.kl_tokens)

    def scores(self, edits: Sequence[EditParameters], rows: int, whole: bool) -> Sequence[TrialScores]:
        """Score edits in one batch; `whole` uses full-length responses without the search's shortcuts."""
        searched = self._settings.scoring.effective_search_tokens
        if whole:
            return self.trials.full_scores(
                self._hooks, edits, rows, search_tokens=searched, incoherence=self.incoherence
            )
        limit = self._settings.skip_kl_above
        return self.trials.scores(self._hooks, edits, rows, skip_kl_above=limit, response_tokens=searched)


class FinalistScorer:
    """Scores finalists on the prompts held out for the choice, and their KL divergence per prompt.

    The base model is measured on first use.
    """

    def __init__(self, scorer: EditScorer, hooks: Intervention, settings: Settings, held_out: HeldOut) -> None:
        """Take the search's scorer; `held_out` returns metrics on the choice's bad prompts.

        Its good prompts are those of the search, then those held out.
        """
        self._scorer, self._hooks, self._settings, self._held_out = scorer, hooks, settings, held_out

    @cached_property
    def _base(self) -> tuple[TrialScorer, KLReference, IncoherenceTest]:
        """The base model's references, and the incoherence test with the search's bound."""
        metrics = self._held_out()
        test = IncoherenceTest(metrics.batches, self._scorer.incoherence.bound)
        return scorer_of(metrics), KLReference.measured(metrics.batches, FORCED_TOKENS), test

    def scores(self, edits: Sequence[EditParameters], rows: int) -> list[FinalistScores]:
        """Score edits in one batch, on responses of full length."""
        trials, forced, test = self._base
        batches, searched = trials.batches, self._settings.scoring.effective_search_tokens
        counted = trials.full_scores(self._hooks, edits, rows, search_tokens=searched, incoherence=test)
        trial_rows = batches.trial_rows(self._hooks.activate(edits), len(edits))
        first, more = (one.trial_divergences(batches, trial_rows, rows) for one in (trials.reference, forced))
        return [
            FinalistScores(
                refusals=scores.refusals,
                broken=scores.broken,
                kl=self._kept(scores, batches.good.as_given(kl)),
                forced_kl=self._kept(scores, batches.good.as_given(forced_kl)),
            )
            for scores, kl, forced_kl in zip(counted, first.tolist(), more.tolist(), strict=True)
        ]

    def _kept(self, scores: TrialScores, divergences: Sequence[float]) -> tuple[float, ...]:
        """Return divergences for the record: rounding may make one -1e-17; a failed edit gets the largest."""
        return tuple(FAILED_KL if scores.reason is not None else max(kl, 0.0) for kl in divergences)
