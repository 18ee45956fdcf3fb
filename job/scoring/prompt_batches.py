"""One model's prompts in batches, shared by the search and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch

from job.data.prompts import Prompt
from job.edits.hooks import ActiveEdits
from job.generation.answer import Answer
from job.generation.forward import RowTrials, read_tokens, shared_prefix
from job.generation.greedy import greedy_answers
from job.generation.kv_cache import SharedPrefix, common_prefix, writable_slots
from job.model.device_faults import halving
from job.model.loading import LoadedModel

T = TypeVar("T")
# A shorter prefix saves less than the forward that computes it once takes (measured, docs/lab-notes/decoding.md).
LEAST_PREFIX = 2


class RowLimit:
    """Rows per forward, permanently halved whenever memory runs out."""

    def __init__(self, rows: int, report: Callable[[str], None]) -> None:
        """Start with `rows` rows; `report` receives a warning for every halving."""
        self._rows = rows
        self._report = report

    def fit(self, compute: Callable[[int], T]) -> T:
        """Return `compute(rows)`, retried with half the rows; MachineError if memory does not suffice for one."""
        result, self._rows = halving(self._rows, compute, self._report)
        return result


@dataclass(frozen=True)
class TokenizedPrompts:
    """Prompts with their token ids, shortest first to save padding.

    Attributes:
        places: Index of each prompt in the set as it was given.
    """

    prompts: tuple[Prompt, ...]
    tokens: tuple[list[int], ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, loaded: LoadedModel, prompts: Sequence[Prompt]) -> Self:
        """Tokenize prompts and sort them by length."""
        tokens = loaded.tokenize(prompts)
        order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
        return cls(tuple(prompts[index] for index in order), tuple(tokens[index] for index in order), tuple(order))

    def __len__(self) -> int:
        return len(self.tokens)

    def as_given(self, values: Sequence[T]) -> list[T]:
        """Return the prompts' values in the order in which the prompts were given."""
        return [value for _, value in sorted(zip(self.places, values, strict=True), key=lambda pair: pair[0])]


@dataclass(frozen=True)
class TrialRows:
    """Rows with their trial's edit and shared-prefix KV cache.

    Attributes:
        trials: Number of trials, indexed from 0.
        prefix: Every trial's KV cache of the shared prefix, or None.
    """

    trials: int
    edits: ActiveEdits | None
    prefix: SharedPrefix | None
    device: torch.device

    def rows(self, trials: Sequence[int], prompts: int) -> RowTrials:
        """Return rows for `prompts` prompts per trial, [len(trials) * prompts], each trial's adjacent."""
        owners = torch.tensor(trials, device=self.device).repeat_interleave(prompts)
        return RowTrials(owners, self.edits, self.prefix)


@dataclass(frozen=True)
class PromptBatches:
    """Good and bad prompts of one model, cut into batches.

    Attributes:
        good: Good prompts, for KL.
        bad: Bad prompts, for refusals.
        prefix: Token ids of the shared prefix, computed once per trial; empty if unsupported or too short.
        read_tokens: Prompt tokens per forward that suit the device; None: no limit.
    """

    loaded: LoadedModel
    good: TokenizedPrompts
    bad: TokenizedPrompts
    prefix: list[int]
    read_tokens: int | None
    row_limit: RowLimit

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        good: Sequence[Prompt],
        bad: Sequence[Prompt],
        rows: int,
        *,
        report: Callable[[str], None] = lambda _: None,
        least_prefix: int = LEAST_PREFIX,
    ) -> Self:
        """Tokenize prompts and find their shared prefix of at least `least_prefix` tokens."""
        own_good, own_bad = TokenizedPrompts.of(loaded, good), TokenizedPrompts.of(loaded, bad)
        common = common_prefix([*own_good.tokens, *own_bad.tokens])[: writable_slots(loaded.model)]
        shared = loaded.architecture.batching.shared and len(common) >= least_prefix
        row_limit = RowLimit(rows, report)
        return cls(loaded, own_good, own_bad, common if shared else [], read_tokens(loaded.model), row_limit)

    @property
    def everything(self) -> list[list[int]]:
        """Token ids of all prompts, good ones first."""
        return [*self.good.tokens, *self.bad.tokens]

    def trial_rows(self, edits: ActiveEdits | None, trials: int = 1) -> TrialRows:
        """Compute the shared prefix under every trial's edit."""
        prefix = shared_prefix(self.loaded.model, self.prefix, trials, edits) if self.prefix else None
        return TrialRows(trials, edits, prefix, self.loaded.device)

    def reading(
        self, prompts: Sequence[list[int]], trial_rows: TrialRows, rows: int, positions: int = 1
    ) -> Iterator[tuple[list[list[int]], RowTrials]]:
        """Yield batches for one forward each with all trials' rows; `rows` limits positions with logits."""
        trials = trial_rows.trials
        tokens = None if self.read_tokens is None else self.read_tokens // trials
        most = max(1, rows // (trials * positions))
        for batch in self.loaded.architecture.batching.chunks(prompts, most, positions, tokens):
            yield batch, trial_rows.rows(range(trials), len(batch))

    def generating(
        self, prompts: Sequence[list[int]], trial_rows: TrialRows, rows: int, trials: Sequence[int] = (0,)
    ) -> Iterator[tuple[list[list[int]], RowTrials]]:
        """Yield batches to decode, with the rows of the given trials."""
        for batch in self.loaded.architecture.batching.chunks(prompts, max(1, rows // len(trials))):
            yield batch, trial_rows.rows(trials, len(batch))

    def generate(
        self,
        prompts: Sequence[list[int]],
        rows: RowTrials,
        limit: int,
        *,
        openings: Sequence[int] | None = None,
        decided: Callable[[int, list[int]], bool] | None = None,
        may_fail: bool = False,
    ) -> list[Answer]:
        """Decode one batch greedily; see `greedy_answers`."""
        return greedy_answers(
            self.loaded.model,
            prompts,
            limit=limit,
            end_tokens=self.loaded.end_tokens,
            openings=openings,
            decided=decided,
            rows=rows,
            batching=self.loaded.architecture.batching,
            may_fail=may_fail,
        )

    def responses(
        self, prompts: Sequence[list[int]], limit: int, rows: int, edits: ActiveEdits | None = None
    ) -> list[Answer]:
        """Generate whole responses of up to `limit` tokens, under edit 0 if edits are active."""
        batches = self.generating(prompts, self.trial_rows(edits), rows)
        return [answer for batch, owners in batches for answer in self.generate(batch, owners, limit)]
