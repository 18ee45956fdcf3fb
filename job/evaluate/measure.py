"""Measuring one model for a comparison: figures, cross-entropy, benchmarks; what is kept of it is small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from job.config.schema import Settings
from job.data.prompts import Prompt
from job.edits.hooks import ActiveEdits
from job.errors import ImpossibleJobError
from job.evaluate.lm_eval import Harness, Scores
from job.evaluate.perplexity import Passage, cross_entropies
from job.evaluate.perplexity import passages_of as cut_up
from job.model.loading import LoadedModel, load_model
from job.records import Figures
from job.scoring.kl import Reference
from job.scoring.trial_scorer import Evaluator
from job.stages.measuring import evaluator_of
from job.storage.events import Events

Pair = tuple[tuple[Prompt, ...], tuple[Prompt, ...]]
# Rows of a forward where no job has planned them; halved until they fit.
_ROWS = 32


@dataclass(frozen=True)
class Texts:
    """Plain texts.

    Attributes:
        source: In words what they are.
        texts: The texts, None for the base model's own answers.
    """

    source: str
    texts: list[str] | None


@dataclass(frozen=True)
class MeasuredModel:
    """What is kept of a model when it is given up for the next.

    Attributes:
        figures: Its figures.
        first: KL of the first token for every good prompt, where the figures' is over more; else none.
        passages: What it had to predict, as its tokenizer cuts it up.
        losses: Its cross-entropy on each.
        scores: Benchmarks.
    """

    figures: Figures
    first: list[float]
    passages: list[Passage]
    losses: list[float]
    scores: Scores


@dataclass(frozen=True)
class ModelBench:
    """A loaded model and how it is measured.

    Attributes:
        loaded: The model.
        evaluator: Returns what measures it, given the positions that KL is a mean over.
        kl_tokens: Number of those positions.
        rows: Rows of a forward.
        harness: What runs benchmarks, if any.
        report: Told what is going on.
    """

    loaded: LoadedModel
    evaluator: Callable[[int], Evaluator]
    kl_tokens: int
    rows: int
    harness: Harness | None
    report: Callable[[str], None]

    def measure(
        self, passages: list[Passage], reference: Reference | None = None, edits: ActiveEdits | None = None
    ) -> MeasuredModel:
        """Measure the model, as it is or under edit 0."""
        evaluator = self.evaluator(self.kl_tokens)
        answers = evaluator.answers(edits)
        # The same model, unedited, is the base model that knows gibberish.
        gibberish = evaluator.gibberish(answers) if edits is not None else None
        figures = evaluator.figures(reference, edits, answers, gibberish)
        first: list[float] = []
        if reference is not None and self.kl_tokens > 1:
            first = self.evaluator(1).divergences(reference.first, edits)

        def rest() -> tuple[list[float], Scores]:
            losses = cross_entropies(self.loaded, passages, self.rows, self.report) if passages else []
            return losses, self.harness.scores(self.loaded) if self.harness else {}

        if edits is None:
            return MeasuredModel(figures, first, passages, *rest())
        with edits.on_every_row(self.loaded.model):
            return MeasuredModel(figures, first, passages, *rest())

    def passages(self, texts: Texts | None) -> list[Passage]:
        """Return plain texts, or what the model itself answers, as this model's tokenizer cuts them up.

        Raises:
            ImpossibleJobError: There is nothing to predict in them.
        """
        if texts is None:
            return []
        if texts.texts is not None:
            found = cut_up(self.loaded, texts.texts)
        else:
            answered = self.evaluator(1).answered_good()
            found = [Passage(prompt + answer, len(prompt)) for prompt, answer in answered]
        found = [passage for passage in found if passage.count > 0]
        if not found:
            raise ImpossibleJobError(f"{texts.source}: there is no text to predict", remedy="give another --text")
        return found


def opened(
    folder: Path, settings: Settings, pair: Pair, harness: Harness | None, events: Events, prefix: str
) -> ModelBench:
    """Load a model to be measured.

    Args:
        folder: The model's folder.
        settings: How it is loaded and its answers are judged.
        pair: Good and bad prompts.
        harness: What runs benchmarks, if any.
        events: Where progress goes.
        prefix: What answers are made to begin with, where the settings leave that open.

    Raises:
        ImpossibleJobError: The folder holds no usable model.
        MachineError: The device is not there, or too small.
    """
    events.say(f"loading {folder}")
    loaded = load_model(folder, settings.loading, events.say)
    given = settings.loading.response_prefix
    loaded = replace(loaded, response_prefix=prefix if given == "auto" else given)
    return bench_of(loaded, settings, pair, harness, events)


def bench_of(
    loaded: LoadedModel, settings: Settings, pair: Pair, harness: Harness | None, events: Events, rows: int = 0
) -> ModelBench:
    """Return what measures a loaded model; with so many rows a forward, 0: as the settings say, or some."""
    rows = rows or settings.batching.rows or _ROWS
    evaluator = cache(partial(evaluator_of, loaded, settings, *pair, rows, events))
    return ModelBench(loaded, evaluator, settings.kl_tokens, rows, harness, events.say)
