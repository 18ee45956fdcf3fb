"""Measuring a model: how many bad prompts it refuses and how far it has moved on good ones."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from job.data.prompts import Prompt
from job.edits.hooks import ActiveEdits, Intervention
from job.generation.answer import Answer
from job.generation.forward import RowTrials, first_logits, last_logits, read_tokens, shared_prefix
from job.generation.greedy import greedy_answers
from job.generation.kv_cache import common_prefix, writable_slots
from job.generation.stop_markers import MarkerWatch
from job.model.device_faults import halving
from job.model.loading import LoadedModel
from job.numerics.statistics import mean_interval
from job.records import EditParameters, Figures, KeptAnswer, KeptAnswers, TrialScores
from job.scoring.broken import Exchange, is_broken
from job.scoring.kl import Reference, forced, real_positions
from job.scoring.likelihood import Fluency
from job.text.refusal_markers import RefusalMarkers

T = TypeVar("T")
# Given the trial of every row, what the rows carry: their edits, and what has been computed of a shared prefix.
_Rows = Callable[[Tensor], RowTrials]
# KL that a failed trial is told with; far above what any usable edit has.
FAILED_KL = 100.0
# A shorter prefix saves less than the forward that computes it once takes (measured, docs/lab-notes.md).
LEAST_PREFIX = 2


@dataclass
class _Counts:
    """What a trial's answers to the bad prompts come to.

    Attributes:
        refusals: Refusals.
        broken: Others that are broken.
        opening: Mean log-odds of the base model's openings.
        whole: The rest: the number of the prompt, and the answer.
    """

    refusals: int = 0
    broken: int = 0
    opening: float = 0.0
    whole: list[tuple[int, list[int]]] = field(default_factory=list)


class Evaluator:
    """Scores edits on one pair of good and bad prompt sets, many edits in one batch."""

    def __init__(
        self,
        loaded: LoadedModel,
        good: Sequence[Prompt],
        bad: Sequence[Prompt],
        *,
        markers: RefusalMarkers,
        answer_tokens: int,
        rows: int,
        kl_tokens: int = 1,
        report: Callable[[str], None] = lambda _: None,
        least_prefix: int = LEAST_PREFIX,
        gibberish: float | None = None,
    ) -> None:
        """Prepare the prompts.

        Args:
            loaded: The base model.
            good: Prompts that KL is measured on.
            bad: Prompts whose refusals are counted.
            markers: What counts as a refusal.
            answer_tokens: Answers are judged up to this many tokens.
            rows: Rows of a forward, all edits together.
            kl_tokens: Positions of the base model's answers over which the KL divergence is a mean.
            report: Told where memory does not suffice for so many rows.
            least_prefix: Tokens that all prompts must begin with to be computed once for each trial.
            gibberish: Margin of `job.scoring.likelihood.Fluency`; None: the base model is not asked.
        """
        self._loaded = loaded
        self._manner = loaded.architecture.manner
        self._report = report
        # By length, so that forwards waste little on padding.
        self._good, self._good_prompts = _by_length(loaded, good)
        self._bad, self._bad_prompts = _by_length(loaded, bad)
        common = common_prefix([*self._good, *self._bad])[: writable_slots(loaded.model)]
        self._prefix = common if self._manner.shared and len(common) >= least_prefix else []
        self._markers = markers
        self._watch = MarkerWatch(loaded.tokenizer, markers)
        self._answer_tokens = answer_tokens
        self._most_rows = rows
        self._read_tokens = read_tokens(loaded.model)
        self._kl_tokens = kl_tokens
        self._reference: Reference | None = None
        self._base_openings: list[int] | None = None
        self._gibberish = gibberish
        self._fluency: Fluency | None = None
        # The model's own whole answers to the good prompts, once it has given them.
        self._own: list[Answer] = []

    @property
    def exact(self) -> bool:
        """Whether weights are as precise as the arithmetic: edits of outputs and of weights come to the same."""
        return self._loaded.dtype == "float32" and not getattr(self._loaded.model, "is_quantized", False)

    @property
    def good(self) -> list[list[int]]:
        """Tokens of the good prompts, in the order of all that is said of them."""
        return self._good

    @property
    def reference(self) -> Reference:
        """What the base model says to the good prompts."""
        if self._reference is None:
            self._reference = self._fitting(self._refer)
        return self._reference

    def refer(self) -> None:
        """Have the base model say to the good prompts now what others are compared with later."""
        _ = self.reference

    def answered_good(self) -> list[tuple[list[int], list[int]]]:
        """Return the good prompts, in the evaluator's order, each with the model's whole answer: tokens of both."""
        said = self._fitting(lambda rows: self._continuations(self._answer_tokens, rows))
        return list(zip(self._good, said, strict=True))

    def _continuations(self, limit: int, most: int) -> list[list[int]]:
        """Return the model's answers to the good prompts, of so many tokens at most."""
        placed = self._placed(self._good, None, most, answered=True)
        answers = (self._answers(chunk, rows, whole=True, limit=limit) for chunk, rows in placed)
        return [answer.tokens for chunk in answers for answer in chunk]

    def _refer(self, most: int) -> Reference:
        continuations: list[list[int]] = [[] for _ in self._good]
        if self._kl_tokens > 1:
            continuations = self._continuations(self._kl_tokens - 1, most)
        logits = [
            real_positions(found, [len(continuation) + 1 for continuation in own])
            for found, own in self._forced_logits(continuations, None, most)
        ]
        # Over many positions they would take the room on the device that forwards are planned with.
        kept = torch.cat(logits if self._kl_tokens == 1 else [part.cpu() for part in logits])
        return Reference(self._kl_tokens, tuple(continuations), kept)

    @property
    def base_openings(self) -> list[int]:
        """The token that opens the base model's answer to each bad prompt."""
        if self._base_openings is None:
            self._base_openings = self._fitting(
                lambda most: [
                    token
                    for chunk, rows in self._placed(self._bad, None, most)
                    for token in first_logits(self._loaded.model, chunk, rows).argmax(-1).tolist()
                ]
            )
        return self._base_openings

    def _fitting(self, compute: Callable[[int], T]) -> T:
        """Return what `compute` returns, given the most rows of a forward; where memory is short, fewer from now on."""
        found, self._most_rows = halving(self._most_rows, compute, self._report)
        return found

    def _forced_logits(
        self, continuations: Sequence[list[int]], edits: ActiveEdits | None, most: int
    ) -> Iterator[tuple[Tensor, Sequence[list[int]]]]:
        """Yield the logits over continuations, [prompts, N, vocabulary], chunk by chunk, and the continuations."""
        done = 0
        for chunk, rows in self._placed(self._good, edits, most, self._kl_tokens):
            own = continuations[done : done + len(chunk)]
            done += len(chunk)
            yield last_logits(self._loaded.model, forced(chunk, own), self._kl_tokens, rows), own

    def scores(
        self,
        intervention: Intervention,
        edits: Sequence[EditParameters],
        rows: int,
        *,
        skip_kl_above: float | None = None,
        answer_tokens: int | None = None,
        again_after: int | None = None,
    ) -> list[TrialScores]:
        """Return the scores of all edits, evaluated together.

        Args:
            intervention: The hooks, in place.
            edits: The edits, one a trial.
            rows: Rows of a forward, all edits together.
            skip_kl_above: Trials of a larger KL divergence are not made to answer; None: all are.
            answer_tokens: Longest answer; None: as long as answers are judged otherwise.
            again_after: They are scored again, after answers of so many tokens: those count as broken that were so then
                or are gibberish to the base model.
        """
        limit = answer_tokens or self._answer_tokens
        reference, openings = self.reference, self.base_openings
        active = intervention.activate(edits)
        rows_of = self._rows_of(active, len(edits))
        means = self._divergences(rows_of, len(edits), rows, reference)
        scores = [self._failed(*measured, skip_kl_above) for measured in zip(means, active.reasons, strict=True)]
        asked = [trial for trial, found in enumerate(scores) if found is None]
        counts = self._counts(rows_of, asked, rows, limit, openings, again_after) if asked else []
        if again_after is not None:
            self._count_gibberish(counts)
        measured = dict(zip(asked, counts, strict=True))
        return [
            found or self._values(kl, measured[trial])
            for trial, (found, kl) in enumerate(zip(scores, means, strict=True))
        ]

    def _divergences(self, rows_of: _Rows, trials: int, rows: int, reference: Reference) -> list[float]:
        """Return every trial's KL divergence, mean over the good prompts."""
        total = torch.zeros(trials, dtype=torch.float64)
        done = 0
        # A forward has logits for no more positions than rows were planned for.
        most = max(1, rows // (trials * self._kl_tokens))
        tokens = None if self._read_tokens is None else self._read_tokens // trials
        for chunk in self._manner.chunks(self._good, most, self._kl_tokens, tokens):
            prompts = reference.forced(chunk, done) * trials
            own = rows_of(self._each(range(trials), len(chunk)))
            logits = last_logits(self._loaded.model, prompts, self._kl_tokens, own)
            total += reference.divergences(logits, done, trials).sum(1)
            done += len(chunk)
        means: list[float] = (total / len(self._good)).tolist()
        return means

    def _counts(
        self,
        rows_of: _Rows,
        trials: Sequence[int],
        rows: int,
        limit: int,
        openings: Sequence[int],
        again_after: int | None,
    ) -> list[_Counts]:
        """Return what every asked trial's answers come to, by their texts."""
        counts = [_Counts() for _ in trials]
        done = 0
        for chunk in self._manner.chunks(self._bad, max(1, rows // len(trials))):
            asked = list(openings[done : done + len(chunk)]) * len(trials)
            own = rows_of(self._each(trials, len(chunk)))
            answers = self._answers(chunk * len(trials), own, asked, limit=limit)
            for row, answer in enumerate(answers):
                count, prompt = counts[row // len(chunk)], done + row % len(chunk)
                count.opening += answer.opening / len(self._bad)
                text = "" if answer.decided else self._loaded.decode(answer.tokens)
                if answer.decided or self._is_refusal(text, cut=len(answer.tokens) == limit < self._answer_tokens):
                    count.refusals += 1
                elif self._is_broken(prompt, text, answer.tokens, again_after):
                    count.broken += 1
                else:
                    count.whole.append((prompt, answer.tokens))
            done += len(chunk)
        return counts

    def _is_broken(self, prompt: int, text: str, tokens: list[int], again_after: int | None) -> bool:
        """Return whether an answer to a bad prompt is broken by its text, or was after so many tokens."""
        texts = [text] if again_after is None else [text, self._loaded.decode(tokens[:again_after])]
        # Of one that is blank nothing is to be seen yet.
        return any(text.strip() and is_broken(self._bad_prompts[prompt].user, text) for text in texts)

    def _count_gibberish(self, counts: Sequence[_Counts]) -> None:
        """Have the base model look at answers that are whole by their texts."""
        if self.fluency is None:
            return
        whole = [(count, prompt, tokens) for count in counts for prompt, tokens in count.whole]
        found = self.fluency.gibberish([self._bad[prompt] for _, prompt, _ in whole], [tokens for *_, tokens in whole])
        for (count, *_), gibberish in zip(whole, found, strict=True):
            count.broken += gibberish

    @property
    def fluency(self) -> Fluency | None:
        """How likely this evaluator's model finds answers, None if it is not to be asked; hooks must be at rest."""
        if self._fluency is None and self._gibberish is not None:
            fluency = Fluency(self._loaded, self._fitting, self._gibberish)
            own = self._own or self._fitting(lambda rows: self._whole_answers(self._good, None, rows))
            fluency.calibrate(self._good, [answer.tokens for answer in own])
            self._fluency = fluency
        return self._fluency

    def _failed(self, kl: float, reason: str | None, skip_kl_above: float | None) -> TrialScores | None:
        """Return what a trial is told that is not worth an answer, None for one that is (decision 14)."""
        if reason is None and not math.isfinite(kl):
            reason = "the logits are not finite"
        if reason is None and kl >= FAILED_KL:
            reason = f"the KL divergence is {kl:.3g} nats"
        if reason is not None:
            return TrialScores(refusals=len(self._bad), kl=FAILED_KL, reason=reason)
        if skip_kl_above is not None and kl > skip_kl_above:
            reason = f"not made to answer: the KL divergence is {kl:.3g} nats, above {skip_kl_above:g}"
            return TrialScores(refusals=len(self._bad), kl=kl, reason=reason, skipped=True)
        return None

    def _values(self, kl: float, count: _Counts) -> TrialScores:
        if not math.isfinite(count.opening):
            return TrialScores(refusals=len(self._bad), kl=FAILED_KL, reason="the logits are not finite")
        # KL is not negative; rounding may say so by 1e-17.
        return TrialScores(refusals=count.refusals, broken=count.broken, kl=max(kl, 0.0), opening=count.opening)

    def _each(self, trials: Sequence[int], prompts: int) -> Tensor:
        """Return the trial of every row where each trial has this many prompts, those of one together, [rows]."""
        return torch.tensor(trials, device=self._loaded.device).repeat_interleave(prompts)

    def _rows_of(self, edits: ActiveEdits | None, trials: int) -> _Rows:
        """Compute the prefix that all prompts share under every trial's edit; return what rows of trials carry."""
        prefix = shared_prefix(self._loaded.model, self._prefix, trials, edits) if self._prefix else None
        return lambda rows: RowTrials(rows, edits, prefix)

    def _answers(
        self,
        prompts: Sequence[list[int]],
        rows: RowTrials,
        openings: Sequence[int] | None = None,
        *,
        whole: bool = False,
        limit: int | None = None,
    ) -> list[Answer]:
        """Return answers; unless they are wanted whole, a row leaves the batch once it contains a marker."""
        watches = [self._watch.begin() for _ in prompts]

        def decided(index: int, tokens: list[int]) -> bool:
            return watches[index].found(tokens)

        return greedy_answers(
            self._loaded.model,
            prompts,
            limit=limit or self._answer_tokens,
            end_tokens=self._loaded.end_tokens,
            openings=openings,
            decided=None if whole else decided,
            rows=rows,
            manner=self._manner,
        )

    def _is_refusal(self, text: str, *, cut: bool) -> bool:
        # An answer of which nothing is to be seen yet may still become one; so counts at full length are never smaller.
        return self._markers.found(text) if cut else self._markers.is_refusal(text)

    def figures(
        self,
        base: Evaluator | Reference | None = None,
        edits: ActiveEdits | None = None,
        answers: Sequence[Answer] | None = None,
        gibberish: Sequence[bool] | None = None,
        heard: Callable[[KeptAnswers], None] = lambda _: None,
    ) -> Figures:
        """Return the figures of this evaluator's model as it is or, if given, under edit 0.

        Args:
            base: The evaluator of the base model on the same prompts, or its reference, for the KL divergence.
            edits: Edits of the model, active.
            answers: Its `answers`, where they have been had already.
            gibberish: Which of them are to the base model; None: as this evaluator's model says if it is the base
                model, else none.
            heard: Told all answers, in no order.
        """
        if answers is None:
            answers = self.answers(edits)
        if gibberish is None and base is None:
            gibberish = self.gibberish(answers)
        exchanges = self.exchanges(answers, gibberish)
        refused = [self._markers.is_refusal(exchange.answer) for exchange in exchanges]
        broken = [exchange.broken for exchange in exchanges]
        good = len(self._good)
        heard(KeptAnswers(good=_kept(exchanges[:good], refused[:good]), bad=_kept(exchanges[good:], refused[good:])))
        kl = self.divergences(base, edits) if base is not None else None
        return Figures(
            bad_prompts=len(self._bad),
            refusals=sum(refused[good:]),
            good_prompts=good,
            false_refusals=sum(refused[:good]),
            degenerate=sum(broken[good:]),
            false_degenerate=sum(broken[:good]),
            unanswered=sum(map(operator.or_, refused[good:], broken[good:])),
            kl=math.fsum(kl) / len(kl) if kl is not None else None,
            kl_interval=mean_interval(kl) if kl is not None else None,
            kl_tokens=self._kl_tokens,
        )

    def exchanges(self, answers: Sequence[Answer], gibberish: Sequence[bool] | None = None) -> list[Exchange]:
        """Return prompts with `answers` in words, good ones first, and which of them are known to be gibberish."""
        prompts = [*self._good_prompts, *self._bad_prompts]
        known = gibberish or [False] * len(answers)
        return [
            Exchange(prompt.user, self._loaded.decode(answer.tokens), bad)
            for prompt, answer, bad in zip(prompts, answers, known, strict=True)
        ]

    def gibberish(self, answers: Sequence[Answer]) -> list[bool]:
        """Return which of some model's `answers` are gibberish to this evaluator's, whose hooks must be at rest."""
        if self.fluency is None:
            return [False] * len(answers)
        return self.fluency.gibberish([*self._good, *self._bad], [answer.tokens for answer in answers])

    def divergences(self, base: Evaluator | Reference, edits: ActiveEdits | None) -> list[float]:
        """Return the KL divergence from a base model for every good prompt, mean over positions, nats."""
        reference = base if isinstance(base, Reference) else base.reference

        def measured(most: int) -> list[float]:
            found: list[float] = []
            for logits, _ in self._forced_logits(reference.continuations, edits, most):
                found += reference.divergences(logits, len(found), 1)[0].tolist()
            return found

        # KL is not negative; rounding may say so by 1e-17.
        return [max(kl, 0.0) for kl in self._fitting(measured)]

    def answers(self, edits: ActiveEdits | None) -> list[Answer]:
        """Return whole answers to all prompts, good ones first; under edit 0 if edits are given."""
        prompts = [*self._good, *self._bad]
        found = self._fitting(lambda most: self._whole_answers(prompts, edits, most))
        if edits is None:
            self._own = found[: len(self._good)]
        return found

    def _whole_answers(self, prompts: Sequence[list[int]], edits: ActiveEdits | None, most: int) -> list[Answer]:
        placed = self._placed(prompts, edits, most, answered=True)
        return [answer for chunk, rows in placed for answer in self._answers(chunk, rows, whole=True)]

    def _placed(
        self,
        prompts: Sequence[list[int]],
        edits: ActiveEdits | None,
        most: int,
        positions: int = 1,
        *,
        answered: bool = False,
    ) -> Iterator[tuple[list[list[int]], RowTrials]]:
        """Yield the prompts in chunks, all rows of which have edit 0, and what the rows carry.

        Args:
            prompts: The prompts.
            edits: Edits of the model, active; None for the model as it is.
            most: Rows of a forward at most.
            positions: Of how many positions a row logits are wanted.
            answered: Prompts are answered, all of a chunk together, and not only read.
        """
        rows_of = self._rows_of(edits, 1)
        tokens = None if answered else self._read_tokens
        for chunk in self._manner.chunks(prompts, max(1, most // positions), positions, tokens):
            yield chunk, rows_of(torch.zeros(len(chunk), dtype=torch.long, device=self._loaded.device))


def _by_length(loaded: LoadedModel, prompts: Sequence[Prompt]) -> tuple[list[list[int]], list[Prompt]]:
    """Return prompts' token ids and prompts, the shortest first."""
    tokens = loaded.tokenize(prompts)
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    return [tokens[index] for index in order], [prompts[index] for index in order]


def _kept(exchanges: Sequence[Exchange], refused: Sequence[bool]) -> tuple[KeptAnswer, ...]:
    return tuple(
        KeptAnswer(prompt=one.prompt, answer=one.answer, refused=refusal)
        for one, refusal in zip(exchanges, refused, strict=True)
    )
