"""Measure one model for a comparison: figures, cross-entropy, benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from job.config.schema import Settings
from job.data.prompts import Prompt
from job.edits.hooks import ActiveEdits
from job.errors import ImpossibleJobError
from job.evaluate.lm_eval import Harness, Scores
from job.evaluate.perplexity import Passage, cross_entropies
from job.evaluate.perplexity import passages_of as cut_up
from job.model.loading import LoadedModel, load_model
from job.model.rendering import Rendering
from job.records import Figures
from job.scoring.kl import KLReference
from job.scoring.likelihood import IncoherenceTest
from job.scoring.report_metrics import ReportMetrics
from job.stages.measuring import metrics_of
from job.storage.events import Events

Pair = tuple[tuple[Prompt, ...], tuple[Prompt, ...]]
# Rows per forward where no job has planned them; halved until they fit.
_ROWS = 32


@dataclass(frozen=True)
class Texts:
    """Plain texts to predict.

    Attributes:
        source: Their source, in words.
        texts: The texts; None: the base model's own responses.
    """

    source: str
    texts: list[str] | None


@dataclass(frozen=True)
class MeasuredModel:
    """Measurements of one model, kept after the model is freed.

    Attributes:
        figures: Its figures.
        first: KL of the first token for every good prompt, in nats; empty unless the figures' KL is over more tokens.
        passages: Passages that it predicted, tokenized.
        losses: Its cross-entropy on each passage.
        scores: Its benchmark scores.
    """

    figures: Figures
    first: list[float]
    passages: list[Passage]
    losses: list[float]
    scores: Scores


@dataclass(frozen=True)
class ModelBench:
    """A loaded model and everything that measures it.

    Attributes:
        loaded: The model.
        metrics: Measures its responses.
        rows: Rows per forward.
        harness: Runs benchmarks, if any.
        report: Receives progress.
    """

    loaded: LoadedModel
    metrics: ReportMetrics
    rows: int
    harness: Harness | None
    report: Callable[[str], None]

    def measure_base(self, passages: list[Passage]) -> tuple[MeasuredModel, IncoherenceTest]:
        """Measure the base model and calibrate the incoherence test on it."""
        responses = self.metrics.responses()
        incoherence = self.metrics.incoherence_test(responses)
        judged = self.metrics.judge(responses, incoherence.flags(responses))
        return self._measured(judged.figures(self.metrics.kl_tokens), [], passages), incoherence

    def measure_edited(
        self,
        passages: list[Passage],
        reference: KLReference | None,
        edits: ActiveEdits | None = None,
        incoherence: IncoherenceTest | None = None,
    ) -> MeasuredModel:
        """Measure the model as the edited one.

        Args:
            passages: Passages to predict.
            reference: What KL is measured against; None: no KL divergence is measured.
            edits: Active edits, of which edit 0 applies; None: the model as it is.
            incoherence: Test of the base model on the same prompts, if it is loaded.
        """
        responses = self.metrics.responses(edits)
        judged = self.metrics.judge(responses, incoherence.flags(responses) if incoherence else None)
        divergences: list[float] | None = None
        first: list[float] = []
        if reference is not None:
            divergences = reference.divergences(self.metrics.batches, edits)
            if reference.tokens > 1:
                first = reference.first_token.divergences(self.metrics.batches, edits)
        figures = judged.figures(self.metrics.kl_tokens, divergences)
        with edits.on_every_row(self.loaded.model) if edits is not None else nullcontext():
            return self._measured(figures, first, passages)

    def _measured(self, figures: Figures, first: list[float], passages: list[Passage]) -> MeasuredModel:
        losses = cross_entropies(self.loaded, passages, self.rows, self.report) if passages else []
        scores = self.harness.scores(self.loaded) if self.harness else {}
        return MeasuredModel(figures, first, passages, losses, scores)

    def passages(self, texts: Texts | None) -> list[Passage]:
        """Tokenize plain texts, or the model's own responses to the good prompts.

        Raises:
            ImpossibleJobError: They contain nothing to predict.
        """
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
            raise ImpossibleJobError(f"{texts.source}: there is no text to predict", remedy="give another --text")
        return passages


@dataclass(frozen=True)
class Asked:
    """How a model was asked, so that another is asked alike.

    Attributes:
        prefix: What every response is made to begin with.
        tokens: Its token ids, None for a text that somebody gave.
        rendering: What the chat template is told beside the conversation.
        vocabulary: The token ids by their text, without which ids say nothing.
    """

    prefix: str
    tokens: tuple[int, ...] | None
    rendering: Rendering
    vocabulary: dict[str, int]

    @classmethod
    def of(cls, loaded: LoadedModel) -> Asked:
        """Return how a model is asked."""
        return cls(loaded.response_prefix, loaded.prefix_tokens, loaded.rendering, loaded.tokenizer.get_vocab())

    def put_to(self, loaded: LoadedModel) -> LoadedModel:
        """Return another model that is asked alike; one with other tokens gets the prefix as text."""
        tokens = self.tokens if loaded.tokenizer.get_vocab() == self.vocabulary else None
        return replace(loaded, response_prefix=self.prefix, prefix_tokens=tokens, rendering=self.rendering)


def opened(
    folder: Path, settings: Settings, pair: Pair, harness: Harness | None, events: Events, like: Asked | None = None
) -> ModelBench:
    """Load a model for measuring.

    Args:
        folder: The model's folder.
        settings: Settings of loading and scoring.
        pair: Good and bad prompts.
        harness: Runs benchmarks, if any.
        events: Receives progress.
        like: How the model is asked where the settings say "auto"; None: without a response prefix.

    Raises:
        ImpossibleJobError: The folder holds no usable model.
        MachineError: The device is missing or too small.
    """
    events.say(f"loading {folder}")
    loaded = load_model(folder, settings.loading, events.say).ending_its_turn()
    given = settings.loading.response_prefix
    if given != "auto":
        loaded = replace(loaded, response_prefix=given)
    elif like is not None:
        loaded = like.put_to(loaded)
    return bench_of(loaded, settings, pair, harness, events)


def bench_of(
    loaded: LoadedModel, settings: Settings, pair: Pair, harness: Harness | None, events: Events, rows: int = 0
) -> ModelBench:
    """Return a bench for a loaded model.

    With `rows` = 0 the settings or a default decide.
    """
    rows = rows or settings.batching.rows or _ROWS
    return ModelBench(loaded, metrics_of(loaded, settings, *pair, rows, events), rows, harness, events.say)
