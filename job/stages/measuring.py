"""Metrics of a model by a job's settings, on one pair of prompt sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from job.config.schema import Settings
from job.data.prompts import Prompt, PromptSets
from job.edits.hooks import Intervention
from job.generation.forward import counted_tokens
from job.model.loading import LoadedModel
from job.records import FORCED_TOKENS, EditParameters, Figures, FinalistScores, TrialScores
from job.scoring.kl import KLReference
from job.scoring.likelihood import IncoherenceTest
from job.scoring.measures import EditMeasures
from job.scoring.prompt_batches import PromptBatches
from job.scoring.race import Race
from job.scoring.report_metrics import JudgedResponses, ReportMetrics
from job.scoring.trial_scorer import FAILED_KL, TrialOutcome, TrialScorer
from job.storage.events import Events
from job.text.refusal_markers import RefusalMarkers

# Kinds of prompts whose responses are kept, for objectives that judge them: "bad", "good".
Keep = tuple[str, ...]
# Returns a model's metrics of good and bad prompts.
Measure = Callable[[Sequence[Prompt], Sequence[Prompt]], ReportMetrics]


def metrics_of(
    model: LoadedModel,
    settings: Settings,
    markers: RefusalMarkers,
    good: Sequence[Prompt],
    bad: Sequence[Prompt],
    rows: int,
    events: Events,
) -> ReportMetrics:
    """Return metrics of a model on good prompts (KL) and bad prompts (refusals)."""
    return ReportMetrics(
        PromptBatches.of(model, good, bad, rows, report=events.say),
        markers,
        settings.scoring.answer_tokens,
        settings.kl_tokens,
        settings.scoring.gibberish,
        settings.scoring.thinking_tokens,
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

    def __init__(
        self, metrics: ReportMetrics, hooks: Intervention, settings: Settings, measures: Callable[[], EditMeasures]
    ) -> None:
        """Take the base model's metrics; `measures` makes what is measured beside responses."""
        self.metrics = metrics
        self._hooks = hooks
        self._settings = settings
        self._make_measures = measures

    @cached_property
    def trials(self) -> TrialScorer:
        """Scores batches of edits."""
        return scorer_of(self.metrics)

    @cached_property
    def measures(self) -> EditMeasures:
        """Measures edits beside their responses."""
        return self._make_measures()

    @cached_property
    def incoherence(self) -> IncoherenceTest:
        """Detects incoherent responses; calibrated by `baseline`, else on first use."""
        return self.metrics.incoherence_test()

    def baseline(self) -> tuple[Figures, JudgedResponses]:
        """Return the base model's metrics and the responses behind them."""
        responses = self.metrics.responses()
        self.incoherence = self.metrics.incoherence_test(responses)
        judged = self.metrics.judge(responses, self.incoherence.flags(responses))
        return judged.figures(self.metrics.kl_tokens), judged

    def prepare(self) -> None:
        """Measure now what the first batch needs of the base model. Raises MemoryError or JobError."""
        _ = self.trials, self.measures

    def outcomes(
        self, edits: Sequence[EditParameters], rows: int, whole: bool, keep: Keep, race: Race | None = None
    ) -> list[TrialOutcome]:
        """Score edits in one batch; `whole` uses full-length responses without the search's shortcuts."""
        searched = self._settings.scoring.effective_search_tokens
        if whole:
            found = self.trials.outcomes(
                self._hooks, edits, rows, keep=keep, search_tokens=searched, incoherence=self.incoherence
            )
        else:
            limit = self._settings.skip_kl_above
            found = self.trials.outcomes(
                self._hooks, edits, rows, keep=keep, skip_kl_above=limit, response_tokens=searched, race=race
            )
        return [self._with_measures(one, edit) for one, edit in zip(found, edits, strict=True)]

    def _with_measures(self, outcome: TrialOutcome, edit: EditParameters) -> TrialOutcome:
        """Add what is measured beside responses, one edit at a time."""
        if outcome.scores.reason is not None:
            others = self.measures.failed()
        else:
            with self._hooks.activate([edit]).on_every_row(self.metrics.batches.loaded.model):
                others = self.measures.scores()
        return replace(outcome, scores=outcome.scores.model_copy(update={"others": others})) if others else outcome


@dataclass(frozen=True)
class FinalistOutcome:
    """A finalist's scores, and its responses to the prompts held out where they are kept."""

    scores: FinalistScores
    heard: TrialOutcome


class FinalistScorer:
    """Scores finalists on the prompts held out for the choice, and their KL divergence per prompt.

    The base model is measured on first use.
    """

    def __init__(
        self, scorer: EditScorer, hooks: Intervention, settings: Settings, prompts: PromptSets, measure: Measure
    ) -> None:
        """Take the search's scorer; `measure` returns the base model's metrics of good and bad prompts."""
        self._scorer, self._hooks, self._settings = scorer, hooks, settings
        self._prompts, self._measure = prompts, measure

    @cached_property
    def _trials(self) -> TrialScorer:
        """Scores on all good prompts of search and choice, and the choice's bad ones."""
        prompts = self._prompts
        return scorer_of(self._measure((*prompts.good_search, *prompts.good_choice), prompts.bad_choice))

    @cached_property
    def _forced(self) -> tuple[PromptBatches, KLReference]:
        """The choice's good prompts, with references at several positions."""
        batches = self._measure(self._prompts.good_choice, ()).batches
        return batches, KLReference.measured(batches, FORCED_TOKENS)

    def outcomes(self, edits: Sequence[EditParameters], rows: int, keep: Keep) -> list[FinalistOutcome]:
        """Score edits in one batch, on responses of full length."""
        trials, searched = self._trials, self._settings.scoring.effective_search_tokens
        test = IncoherenceTest(trials.batches, self._scorer.incoherence.bound)  # the bound of the search's responses
        heard = trials.outcomes(self._hooks, edits, rows, keep=keep, search_tokens=searched, incoherence=test)
        first = self._divergences(trials.batches, trials.reference, edits, rows)
        forced: list[list[float]] = [[] for _ in edits]
        if self._prompts.good_choice:
            forced = self._divergences(*self._forced, edits, rows)
        return [
            FinalistOutcome(_finalist(one.scores, kl, forced_kl), self._held_out(one))
            for one, kl, forced_kl in zip(heard, first, forced, strict=True)
        ]

    def _held_out(self, outcome: TrialOutcome) -> TrialOutcome:
        """Leave out responses to the search's prompts."""
        prompts = {prompt.user for prompt in self._prompts.good_choice}
        return replace(outcome, good=tuple(one for one in outcome.good if one.prompt in prompts))

    def _divergences(
        self, batches: PromptBatches, reference: KLReference, edits: Sequence[EditParameters], rows: int
    ) -> list[list[float]]:
        """Return each edit's KL per good prompt in nats, in the order in which the prompts were given."""
        trial_rows = batches.trial_rows(self._hooks.activate(edits), len(edits))
        return [batches.good.as_given(kl) for kl in reference.trial_divergences(batches, trial_rows, rows).tolist()]


def _finalist(scores: TrialScores, kl: Sequence[float], forced_kl: Sequence[float]) -> FinalistScores:
    return FinalistScores(
        refusals=scores.refusals,
        broken=scores.broken,
        kl=_kept(scores, kl),
        forced_kl=_kept(scores, forced_kl),
    )


def _kept(scores: TrialScores, divergences: Sequence[float]) -> tuple[float, ...]:
    """Return divergences for the record: rounding may make one -1e-17; a failed edit or position gets the largest."""
    failed = scores.reason is not None
    return tuple(FAILED_KL if failed or not math.isfinite(kl) else max(kl, 0.0) for kl in divergences)
