"""Measure one model for a comparison: metrics, cross-entropy, benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

from job.config.schema import Settings
from job.data.prompts import Prompt
from job.edits.hooks import ActiveEdits
from job.errors import ImpossibleJobError
from job.evaluate.subject import Subject
from job.lifecycle.running import OpenJob
from job.model.loading import LoadedModel
from job.model.rendering import Rendering
from job.records import Figures
from job.scoring.broken import Exchange
from job.scoring.kl import KLReference
from job.scoring.likelihood import IncoherenceTest
from job.scoring.lm_eval import Harness, Scores
from job.scoring.perplexity import Passage, cross_entropies
from job.scoring.perplexity import passages_of as cut_up
from job.scoring.report_metrics import JudgedResponses, ReportMetrics
from job.stages.measuring import metrics_of
from job.storage.events import Events
from job.text.refusal_markers import RefusalMarkers

Pair = tuple[tuple[Prompt, ...], tuple[Prompt, ...]]
# Of the figures' KL, and of the scorecard's second one.
KLReferences = tuple[KLReference, KLReference]
# Rows per forward where no job has planned them; halved until they fit.
_ROWS = 32


@dataclass(frozen=True)
class Texts:
    """Plain texts with a description of their source; None: the base model's own responses."""

    source: str
    texts: list[str] | None


@dataclass(frozen=True)
class MeasuredModel:
    """Measurements of one model, kept after it is freed.

    Attributes:
        first: KL of the first token per good prompt, in nats; empty if the metrics' KL already is.
        exchanges: All prompts with the responses, good ones first.
    """

    figures: Figures
    first: list[float]
    exchanges: list[Exchange]
    passages: list[Passage]
    losses: list[float]
    scores: Scores


@dataclass(frozen=True)
class ModelBench:
    """A loaded model and everything that measures it."""

    loaded: LoadedModel
    metrics: ReportMetrics
    rows: int
    harness: Harness | None
    report: Callable[[str], None]

    def measure_base(
        self, passages: list[Passage], *, flagged: bool = True
    ) -> tuple[MeasuredModel, IncoherenceTest, KLReferences]:
        """Measure the base model, calibrate the incoherence test on it and record its KL references.

        `flagged` applies that test to its own responses, too.
        """
        responses = self.metrics.responses()
        incoherence = self.metrics.incoherence_test(responses)
        judged = self.metrics.judge(responses, incoherence.flags(responses) if flagged else None)
        reference = self.metrics.reference()
        references = reference, self.metrics.more_reference(reference, responses)
        figures = judged.figures(self.metrics.kl_tokens, thinking=self.metrics.thinking())
        return self._measured(judged, figures, [], passages), incoherence, references

    def measure_edited(
        self,
        passages: list[Passage],
        references: KLReferences | None,
        edits: ActiveEdits | None = None,
        incoherence: IncoherenceTest | None = None,
    ) -> MeasuredModel:
        """Measure the model under edit 0, if edits are active; KL needs references."""
        responses = self.metrics.responses(edits)
        judged = self.metrics.judge(responses, incoherence.flags(responses) if incoherence else None)
        thinking, first = self.metrics.thinking(edits), list[float]()
        figures = judged.figures(self.metrics.kl_tokens, thinking=thinking)
        if references is not None:
            divergences, others = (one.divergences(self.metrics.batches, edits) for one in references)
            first = others if references[0].tokens > 1 else []
            more = references[1].tokens, others
            figures = judged.figures(self.metrics.kl_tokens, divergences, more, thinking)
        with edits.on_every_row(self.loaded.model) if edits is not None else nullcontext():
            return self._measured(judged, figures, first, passages)

    def _measured(
        self, judged: JudgedResponses, figures: Figures, first: list[float], passages: list[Passage]
    ) -> MeasuredModel:
        losses = cross_entropies(self.loaded, passages, self.rows, self.report) if passages else []
        scores = self.harness.scores(self.loaded) if self.harness else {}
        return MeasuredModel(figures, first, judged.exchanges, passages, losses, scores)

    def passages(self, texts: Texts | None) -> list[Passage]:
        """Tokenize plain texts, or own responses to the good prompts. Raises ImpossibleJobError if they are empty."""
        if texts is None:
            return []
        if texts.texts is not None:
            passages = cut_up(self.loaded, texts.texts)
        else:
            prompts, responses = self.metrics.batches.good.tokens, self.metrics.good_responses()
            passages = [
                Passage(prompt + response.tokens, len(prompt))
                for prompt, response in zip(prompts, responses, strict=True)
            ]
        passages = [passage for passage in passages if passage.count > 0]
        if not passages:
            raise ImpossibleJobError(f"{texts.source} holds no text", remedy="give another --text")
        return passages


@dataclass(frozen=True)
class Asked:
    """Prompting of a model, to repeat with another.

    Attributes:
        tokens: Its token ids, None for a given text.
        vocabulary: Token ids by text, within which ids are valid.
        dtype: Type of its arithmetic.
    """

    prefix: str
    tokens: tuple[int, ...] | None
    rendering: Rendering
    vocabulary: dict[str, int]
    dtype: str

    @classmethod
    def of(cls, loaded: LoadedModel) -> Asked:
        """Return a model's prompting."""
        vocabulary = loaded.tokenizer.get_vocab()
        return cls(loaded.response_prefix, loaded.prefix_tokens, loaded.rendering, vocabulary, loaded.dtype)

    def put_to(self, loaded: LoadedModel) -> LoadedModel:
        """Prompt another model in the same way; with a different vocabulary the prefix is passed as text."""
        tokens = self.tokens if loaded.tokenizer.get_vocab() == self.vocabulary else None
        return replace(loaded, response_prefix=self.prefix, prefix_tokens=tokens, rendering=self.rendering)


def opened(
    subject: Subject,
    settings: Settings,
    pair: Pair,
    harness: Harness | None,
    events: Events,
    like: Asked | None = None,
) -> ModelBench:
    """Load a model to measure, prompted `like` another and in its type. Raises ImpossibleJobError or MachineError."""
    loaded = subject.load(settings.loading, events.say, like.dtype if like else None).ending_its_turn()
    given = settings.loading.response_prefix
    if given != "auto":
        loaded = replace(loaded, response_prefix=given)
    elif like is not None:
        loaded = like.put_to(loaded)
    return bench_of(loaded, settings, pair, harness, events)


def bench_of(
    loaded: LoadedModel,
    settings: Settings,
    pair: Pair,
    harness: Harness | None,
    events: Events,
    job: OpenJob | None = None,
) -> ModelBench:
    """Return a bench for a loaded model; without a job, the settings or a default decide the rows per forward."""
    rows = job.resolution.rows if job else settings.batching.rows or _ROWS
    markers = job.markers if job else RefusalMarkers(settings.scoring.refusal_markers)
    return ModelBench(loaded, metrics_of(loaded, settings, markers, *pair, rows, events), rows, harness, events.say)
