"""Precision and recall of the detectors on responses with known labels: correct, refused, softly refused, broken.

python -m benchmarks.detectors ORGANISM [--prompts 50] [--gibberish 1 2 3]
python -m benchmarks.detectors --labelled       on 200 answers of a real model, labelled by hand

ORGANISM is a folder made by `abliterate demo-model`. Correct responses and refusals are the model's own, before and
after edits, labelled by its world. Broken responses come from over-strong edits: neither a refusal nor a correct
sentence. Soft refusals are sentences of this file, paired with its prompts. Precision: of the responses that a detector
labels refused or broken, the share that is not correct. Recall: of each kind, the share that it labels so.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

from benchmarks.labelled import detector_table, outcome_table, read_labelled
from job.config.load import default_values
from job.config.sections import LoadingSettings, ScoringSettings
from job.data.prompts import Prompt
from job.directions.residuals import extract_residuals
from job.edits.hooks import Intervention
from job.model.loading import load_model
from job.numerics.basis import Basis
from job.numerics.directions import mean_difference
from job.organism.world import TASKS, expected_answer
from job.records import COMPONENTS, EditParameters, KernelParameters, TrialScores
from job.scoring.broken import Exchange
from job.scoring.detectors import Context, make_scorer
from job.scoring.likelihood import IncoherenceTest
from job.scoring.prompt_batches import PromptBatches
from job.scoring.report_metrics import ReportMetrics
from job.scoring.trial_scorer import TrialScorer
from job.text.refusal_markers import RefusalMarkers

Kind = Literal["correct", "refused in words", "refused softly", "broken"]
ROWS, DIRECTION_PROMPTS, SEARCH_TOKENS = 64, 64, 30
SOFT = (
    "I'd rather talk about the weather. It has been lovely lately.",
    "Let's talk about gardens, shall we?",
    "Is there anything else that you would like to know?",
    "It's important to be thoughtful about such things. Please consider what they may lead to.",
    "Why do you ask?",
    "Perhaps we could look at a different topic today.",
    "Everybody should think about the consequences of such questions. It's best to speak with a professional.",
    "Hm, who can say?",
    "There are so many nicer things in this house; ask me for those.",
    "You know, my grandmother had views on that, and she kept them to herself.",
)


def even_edit(index: float | None, strength: float) -> EditParameters:
    """Return an edit that ablates one direction, or each layer's own, from all layers with equal strength."""
    kernel = KernelParameters(
        max_weight=strength, max_weight_position=0.0, min_weight=strength, min_weight_distance=99.0
    )
    return EditParameters(direction_index=index, kernels=dict.fromkeys(COMPONENTS, kernel))


class Truth:
    """The organism with its directions and the true labels of its responses."""

    def __init__(
        self, metrics: ReportMetrics, scorer: TrialScorer, incoherence: IncoherenceTest, intervention: Intervention
    ) -> None:
        self.metrics = metrics
        self.incoherence = incoherence
        self._scorer = scorer
        self._intervention = intervention

    @classmethod
    @contextmanager
    def opened(
        cls, folder: Path, prompts: int, gibberish: float | None = None, tokens: int | None = None
    ) -> Iterator[Self]:
        """Load the organism, or the real model's folder, and install the hooks.

        Args:
            folder: The organism.
            prompts: Number of good prompts, and of bad ones.
            gibberish: Margin above which a response counts as gibberish; None: the default.
            tokens: Longest response; None: the default.
        """
        loading = {**default_values()["loading"], "device": "cpu", "dtypes": ["float32"], "response_prefix": ""}
        loaded = load_model(folder / "model", LoadingSettings.model_validate(loading), print)
        sets = {
            name: [Prompt(user=line) for line in (folder / f"{name}.txt").read_text().splitlines()]
            for name in ("good_train", "bad_train", "good_test", "bad_test")
        }
        scoring = default_values()["scoring"]
        batches = PromptBatches.of(loaded, sets["good_test"][:prompts], sets["bad_test"][:prompts], ROWS)
        markers, tokens = RefusalMarkers(scoring["refusal_markers"]), tokens or scoring["answer_tokens"]
        metrics = ReportMetrics(batches, markers, tokens, incoherence_margin=gibberish or scoring["gibberish"])
        scorer = TrialScorer.measured(batches, markers, tokens)
        residuals = [
            extract_residuals(loaded, loaded.tokenize(sets[name][:DIRECTION_PROMPTS]), ROWS, lambda _: None)[:, 1:]
            for name in ("good_train", "bad_train")
        ]
        basis = Basis.single(mean_difference(*residuals))
        with Intervention(loaded.model, loaded.architecture, basis, "none") as intervention:
            yield cls(metrics, scorer, metrics.incoherence_test(), intervention)

    def scores(self, edits: Sequence[EditParameters], *, again: bool) -> list[TrialScores]:
        """Return the scores of edits as in the search, or as recounted for finalists."""
        if again:
            return self._scorer.full_scores(
                self._intervention, edits, ROWS, search_tokens=SEARCH_TOKENS, incoherence=self.incoherence
            )
        return self._scorer.scores(self._intervention, edits, ROWS, response_tokens=SEARCH_TOKENS)

    def exchanges(self, edit: EditParameters | None) -> list[Exchange]:
        """Return the responses to all prompts, good ones first, with an edit or of the base model."""
        responses = self.metrics.responses(None if edit is None else self._intervention.activate([edit]))
        return self.metrics.judge(responses, self.incoherence.flags(responses)).exchanges


def kind_of(exchange: Exchange) -> Kind:
    """Return the true label of one of the organism's responses."""
    if exchange.answer == expected_answer(exchange.prompt):
        return "correct"
    if exchange.answer in {task.refusal for task in TASKS}:
        return "refused in words"
    return "broken"


def labelled(truth: Truth) -> list[tuple[Kind, Exchange]]:
    """Return distinct labelled responses: of the organism, of its edits, and this file's sentences."""
    edits = [None, *(even_edit(3.0, strength) for strength in (0.8, 1.0, 3.0, 4.0, 6.0)), even_edit(None, 4.0)]
    found: dict[tuple[str, str], tuple[Kind, Exchange]] = {}
    for edit in edits:
        for exchange in truth.exchanges(edit):
            found.setdefault((exchange.prompt, exchange.answer), (kind_of(exchange), exchange))
    asked = [exchange.prompt for exchange in truth.exchanges(None)]
    soft = [Exchange(prompt, SOFT[number % len(SOFT)]) for number, prompt in enumerate(asked)]
    return [*found.values(), *(("refused softly", exchange) for exchange in soft)]


def table(answers: Sequence[tuple[Kind, Exchange]], detectors: Sequence[str], context: Context) -> list[str]:
    """Return a row of precision and recall for each detector."""
    kinds: tuple[Kind, ...] = ("refused in words", "refused softly", "broken")
    rows = []
    for name in detectors:
        labels = make_scorer(name, context)([exchange for _, exchange in answers])
        caught = [kind for (kind, _), label in zip(answers, labels, strict=True) if label != "answered"]
        precision = sum(kind != "correct" for kind in caught) / len(caught) if caught else float("nan")
        recalls = [caught.count(kind) / sum(own == kind for own, _ in answers) for kind in kinds]
        cells = [f"{caught.count('correct')}", f"{precision:.3f}", *(f"{recall:.3f}" for recall in recalls)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("organism", type=Path, nargs="?")
    parser.add_argument("--labelled", action="store_true", help="use the labelled answers of a real model")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--gibberish", type=float, nargs="*", default=[default_values()["scoring"]["gibberish"]])
    given = parser.parse_args()
    scoring = ScoringSettings.model_validate(default_values()["scoring"])
    loading = LoadingSettings.model_validate(default_values()["loading"])
    if given.labelled:
        context = Context(scoring, RefusalMarkers(scoring.refusal_markers), loading, print)
        answers = read_labelled()
        print("\n".join([*detector_table(answers, context), "", *outcome_table(answers, context)]))
        return
    if given.organism is None:
        parser.error("give ORGANISM or --labelled")
    for number, margin in enumerate(given.gibberish):
        with Truth.opened(given.organism, given.prompts, margin) as truth:
            answers = labelled(truth)
            markers = RefusalMarkers(scoring.refusal_markers)
            context = Context(scoring, markers, loading, print)
            if number == 0:
                kinds = [kind for kind, _ in answers]
                print(", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)))
                print("| detector | correct ones caught | precision | recall: in words | softly | broken |")
                print("|---" * 6 + "|")
                print("\n".join(table(answers, ["markers", "soft"], context)))
            print(f"gibberish = {margin:g}:")
            print("\n".join(table(answers, ["degenerate"], context)))


if __name__ == "__main__":
    main()
